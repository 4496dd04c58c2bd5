"""A teacher at evaluation: it labels every augmented batch while networks train on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftd_lightning.data.teacher_labels import class_probabilities
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.training.side_by_side import SideBySide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

AS_IT_IS = Augmentation("")


class LabelledByTeacher(SideBySide):
    """Computes the losses of networks that learn a teacher's labels of the very images that they see.

    A network's batch is augmented first; the teacher then labels the augmented images, so that its labels are a
    function of them. The labels that come with the images are not used. It takes the place of ``losses`` in
    :func:`~ftd_lightning.training.evaluation_protocol.train_fresh_networks`.

    Args:
        teacher: a trained network on the device of the images; put into evaluation mode.
        device: of the networks.
    """

    def __init__(self, teacher: nn.Module, device: torch.device) -> None:
        super().__init__(compile=False, device=device)
        self.teacher = teacher

    def __call__(
        self,
        networks: Sequence[nn.Module],
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int],
        augment: Augmentation,
    ) -> Tensor:
        """Compute the networks' losses (n,), differentiable in their weights; see :class:`SideBySide`."""
        losses = []
        for network, seed in zip(networks, seeds, strict=True):
            batch = augment(images, make_generator(seed))
            targets = class_probabilities(self.teacher, batch)
            losses.append(super().__call__([network], batch, targets, seeds=[seed], augment=AS_IT_IS))
        return torch.cat(losses)
