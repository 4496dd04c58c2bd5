"""The LightningModules, teachers, distillations and evaluation, and the measure of what they leave apart."""

from ftd_lightning.modules.distribution_matching import DistributionMatching
from ftd_lightning.modules.evaluation import SyntheticEvaluation
from ftd_lightning.modules.feature_alignment import FeatureAlignment
from ftd_lightning.modules.gradient_matching import GradientMatching
from ftd_lightning.modules.networks import FreshNetworks
from ftd_lightning.modules.protocol import train_fresh_networks
from ftd_lightning.modules.teacher import FlatTeacher
from ftd_lightning.modules.trajectory_error import TrajectoryErrorCurve, measure_trajectory_error
from ftd_lightning.modules.trajectory_matching import TrajectoryMatching

__all__ = [
    "DistributionMatching",
    "FeatureAlignment",
    "FlatTeacher",
    "FreshNetworks",
    "GradientMatching",
    "SyntheticEvaluation",
    "TrajectoryErrorCurve",
    "TrajectoryMatching",
    "measure_trajectory_error",
    "train_fresh_networks",
]
