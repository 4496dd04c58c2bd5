"""Real images to measure on, copied to the device once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftd_lightning.contracts import Images
from ftd_lightning.data.loader import fits_on

if TYPE_CHECKING:
    import torch

    from ftd_lightning.contracts import DataSource, Part


class PartsOnDevice:
    """Gives the parts of a data source on a device. A part that does not fit there stays in host memory.

    Args:
        source: of real images.
        device: where networks are measured.
    """

    def __init__(self, source: DataSource, device: torch.device) -> None:
        self.source = source
        self.device = device
        self._parts: dict[Part, Images] = {}

    def __call__(self, name: Part) -> Images:
        """Return a part, (N, C, H, W) images and (N,) labels."""
        if name not in self._parts:
            part = self.source.part(name)
            place = self.device if fits_on(self.device, part.images) else part.images.device
            self._parts[name] = Images(part.images.to(place), part.labels.to(place))
        return self._parts[name]
