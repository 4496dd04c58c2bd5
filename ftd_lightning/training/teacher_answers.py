"""What recorded teachers say of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftd_lightning.data.coresets import estimate_running_statistics
from ftd_lightning.data.teacher_labels import logits_of
from ftd_lightning.functional.batch_norm import batch_norms
from ftd_lightning.functional.unroll import load_flat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from ftd_lightning.data.trajectory_store import TrajectoryStore


class StoreTeachers:
    """The teachers of a store after their last recorded epoch, in evaluation mode; see ``functional.Teachers``.

    Args:
        store: the teachers.
        network: of their architecture; its weights are overwritten.
        real: training images (M, C, H, W), of which the running statistics of BatchNorm layers are taken: trajectories
            hold none.
    """

    def __init__(self, store: TrajectoryStore, network: nn.Module, real: Tensor) -> None:
        self._store, self._network, self._real = store, network.eval(), real
        self._loaded: int | None = None

    def __len__(self) -> int:
        return len(self._store)

    @torch.no_grad()
    def logits(self, teacher: int, images: Tensor) -> Tensor:
        """Classify images (N, C, H, W) with a teacher; (N, K), on the images' device."""
        device = next(self._network.parameters()).device
        if teacher != self._loaded:
            load_flat(self._network, self._store.trained(teacher).to(device))
            if batch_norms(self._network):  # else all of the training images would go to the device for nothing
                estimate_running_statistics(self._network, self._real.to(device))
            self._loaded = teacher
        return logits_of(self._network, images)

    def answers(self, images: Tensor) -> Iterator[Tensor]:
        """Classify images with every teacher in turn; (N, K) each."""
        return (self.logits(teacher, images) for teacher in range(len(self)))
