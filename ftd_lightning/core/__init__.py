"""Building blocks that several LightningModules share."""

from ftd_lightning.core.evaluation import train_fresh_networks
from ftd_lightning.core.networks import NetworkFactory

__all__ = ["NetworkFactory", "train_fresh_networks"]
