"""Soft labels by a teacher: of images as they are, and of every augmented batch while networks train on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.functional.to_device import to_device
from ftd_lightning.training.side_by_side import SideBySide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

AS_IT_IS = Augmentation("")
IMAGES_PER_PASS = 1000  # bounds the memory of a forward pass


@torch.no_grad()
def teacher_labels(teacher: nn.Module, images: Tensor) -> Tensor:
    """Label images by a teacher's softmax, at temperature 1.

    Args:
        teacher: put into evaluation mode.
        images: (N, C, H, W), of the teacher's dtype; they go to its device part by part.

    Returns:
        (N, K) probabilities, float32, on the device of the images.

    Example:
        >>> teacher_labels(torch.nn.Flatten(), torch.zeros(3, 2, 1, 1))[0]
        tensor([0.5000, 0.5000])
    """
    teacher.eval()
    device = next((weight.device for weight in teacher.parameters()), images.device)
    parts = [teacher(to_device(part, device)).float().softmax(1) for part in images.split(IMAGES_PER_PASS)]
    return torch.cat(parts).to(images.device)


class TeacherLabels(SideBySide):
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
            targets = teacher_labels(self.teacher, batch)
            losses.append(super().__call__([network], batch, targets, seeds=[seed], augment=AS_IT_IS))
        return torch.cat(losses)
