"""Real images to measure on, copied to the device once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftd_lightning.contracts import Images
from ftd_lightning.data.loader import fits_on
from ftd_lightning.training.evaluation_protocol import accuracies
from ftd_lightning.training.ranks import from_all_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

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

    def accuracies(self, networks: Sequence[nn.Module], count: int) -> dict[Part, Tensor]:
        """Measure networks on held-out and on test images; a part without images is left out.

        Args:
            networks: of this rank, as ``ranks.own_share`` deals them out; their modes (training, evaluation) stay.
            count: how many there are on all ranks.

        Returns:
            The share of correct classifications of each of all networks, (count,) float32 on the CPU.
        """
        modes = [(module, module.training) for network in networks for module in network.modules()]
        parts: tuple[Part, ...] = ("val", "test")
        real = {part: self(part) for part in parts}
        measured = {
            part: torch.tensor(from_all_ranks(accuracies(networks, *images), count))
            for part, images in real.items()
            if len(images.labels)
        }
        for module, training in modes:
            module.training = training
        return measured
