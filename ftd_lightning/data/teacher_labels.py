"""Labels that a recorded teacher gives to images, after any of its epochs.

Random real images with such labels are a base line for whatever learns images: much of what soft labels gain is in the
labels alone, and the best teacher is one that was stopped early (Qin et al., A Label is Worth a Thousand Images in
Dataset Distillation, NeurIPS 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftd_lightning.data.coresets import IMAGES_PER_PASS, estimate_running_statistics, teacher_network
from ftd_lightning.functional.to_device import to_device

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftd_lightning.data.trajectory_store import TrajectoryStore


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Classify images as they are, part by part, so that memory does not grow with their number.

    Args:
        network: put into evaluation mode.
        images: (N, C, H, W), of the network's dtype, on any device.

    Returns:
        (N, K), on the device of the images.
    """
    network.eval()
    device = next((weight.device for weight in network.parameters()), images.device)
    parts = [network(to_device(part, device)) for part in images.split(IMAGES_PER_PASS)]
    return torch.cat(parts).to(images.device)


def class_probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """Label images with a network's softmax, (N, K) float32; see :func:`logits_of`.

    Example:
        >>> class_probabilities(torch.nn.Flatten(), torch.zeros(3, 2, 1, 1))[0]
        tensor([0.5000, 0.5000])
    """
    return logits_of(network, images).float().softmax(dim=1)


@torch.no_grad()
def teacher_labels(
    store: TrajectoryStore,
    images: Tensor,
    *,
    epoch: int,
    teacher: int = 0,
    statistics: Tensor | None = None,
    network: nn.Module | None = None,
) -> Tensor:
    """Give images the class probabilities of a teacher: the softmax of its logits, without augmentation.

    Args:
        store: the teachers.
        images: (N, C, H, W), transformed as the teachers saw theirs.
        epoch: after which the teacher is asked, 0 (its initialisation) to its last one.
        teacher: its number, from 0.
        statistics: images (M, C, H, W) over which the running statistics of BatchNorm layers are estimated, which
            trajectories do not hold; None takes ``images``.
        network: of the teachers' architecture, which receives the weights; None builds it, if it is of this library.

    Returns:
        (N, K) float32, each row of sum 1, on the device of the images.

    Raises:
        InputError: for a teacher or an epoch that is not recorded, or a network that is not of this library.
    """
    network = teacher_network(store, teacher, epoch, network).to(images.device)
    estimate_running_statistics(network, (images if statistics is None else statistics).to(images.device))
    return class_probabilities(network, images)


def candidate_epochs(epochs: int, count: int = 8) -> list[int]:
    """List epochs of a teacher to choose from: all but the initialisation, or of more than ``count`` some.

    Those are spread evenly in the logarithm, because a teacher changes fastest at first; rounding may leave fewer.

    Args:
        epochs: that the teacher has, >= 1.
        count: how many at most, >= 2.

    Example:
        >>> candidate_epochs(4), candidate_epochs(50)
        ([1, 2, 3, 4], [1, 2, 3, 5, 9, 16, 29, 50])
    """
    if epochs <= count:
        return list(range(1, epochs + 1))
    return sorted({round(epochs ** (index / (count - 1))) for index in range(count)})
