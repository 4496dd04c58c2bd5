"""The three LightningModules: teachers, distillation, evaluation."""

from ftd_lightning.modules.evaluation import SyntheticEvaluation, train_fresh_networks
from ftd_lightning.modules.networks import FreshNetworks
from ftd_lightning.modules.teacher import FlatTeacher
from ftd_lightning.modules.trajectory_matching import TrajectoryMatching

__all__ = ["FlatTeacher", "FreshNetworks", "SyntheticEvaluation", "TrajectoryMatching", "train_fresh_networks"]
