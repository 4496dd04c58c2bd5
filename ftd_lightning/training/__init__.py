"""What several LightningModules share: base classes, the evaluation protocol, ranks, fresh networks, finite steps."""

from ftd_lightning.training.evaluation_protocol import train_fresh_networks
from ftd_lightning.training.fresh_networks import FreshNetworks
from ftd_lightning.training.kernel_accuracy import kernel_accuracy

__all__ = ["FreshNetworks", "kernel_accuracy", "train_fresh_networks"]
