"""The LightningModules, under the names that the field gives them."""

from ftd_lightning.modules.backbone import BackboneDistillation
from ftd_lightning.modules.bilevel import BilevelDistillation
from ftd_lightning.modules.class_matching import DistributionMatching, GradientMatching
from ftd_lightning.modules.evaluation import SyntheticEvaluation
from ftd_lightning.modules.feature_alignment import FeatureAlignment
from ftd_lightning.modules.ridge_distillation import FeatureRegression, KernelInducingPoints, kernel_accuracy
from ftd_lightning.modules.teacher import FlatTeacher
from ftd_lightning.modules.trajectory_matching import TrajectoryMatching

__all__ = [
    "BackboneDistillation",
    "BilevelDistillation",
    "DistributionMatching",
    "FeatureAlignment",
    "FeatureRegression",
    "FlatTeacher",
    "GradientMatching",
    "KernelInducingPoints",
    "SyntheticEvaluation",
    "TrajectoryMatching",
    "kernel_accuracy",
]
