"""Which modules of a network normalise by statistics of the batch."""

from __future__ import annotations

from torch import nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """List the batch normalisation layers of a network.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(2, 2))))
        1
    """
    return [module for module in network.modules() if isinstance(module, BatchNorm)]
