"""Building blocks that several LightningModules share."""

from ftd_lightning.core.evaluation import train_fresh_networks
from ftd_lightning.core.networks import FreshNetworks

__all__ = ["FreshNetworks", "train_fresh_networks"]
