"""Building blocks that several LightningModules share."""

from ftd_lightning.core.evaluation import EvaluationProtocol, accuracies, train_fresh_networks
from ftd_lightning.core.linear_probe import LinearProbe
from ftd_lightning.core.networks import NetworkFactory

__all__ = ["EvaluationProtocol", "LinearProbe", "NetworkFactory", "accuracies", "train_fresh_networks"]
