"""How well kernel regression on a synthetic set classifies real images: the protocol of KIP's authors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.functional.kernels import nngp_kernel, ntk_kernel
from ftd_lightning.functional.ridge import centred_targets, ridge_weights
from ftd_lightning.functional.to_device import to_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ftd_lightning.contracts import Images
    from ftd_lightning.data.synthetic_set import SyntheticSet

KERNELS = {"ntk": ntk_kernel, "nngp": nngp_kernel}
BATCH = 2048  # real images whose kernel with the set is in memory at a time


def ridge_accuracy(cross: Callable[[Tensor], Tensor], own: Tensor, targets: Tensor, reg: float, real: Images) -> Tensor:
    """Measure the share of real images that ridge regression classifies correctly, in [0, 1]: a scalar.

    Args:
        cross: maps real images (M, C, H, W) to their kernel with the set, (M, N).
        own: kernel of the set, (N, N).
        targets: of the set, (N, K).
        reg: as for ``functional.ridge_predictions``.
        real: on any device.
    """
    right, weights = torch.zeros((), device=own.device), ridge_weights(own, targets, reg=reg)
    for images, labels in zip(real.images.split(BATCH), real.labels.split(BATCH), strict=True):
        predictions = cross(to_device(images, own.device)).double() @ weights
        right += (predictions.argmax(1) == to_device(labels, own.device)).sum()
    return right / len(real.labels)


@torch.no_grad()
def kernel_accuracy(synthetic: SyntheticSet, real: Images) -> float:
    """Measure the accuracy of kernel regression with the images and labels of a set that was learned by KIP.

    The kernel and the regularisation are those that the set was learned with (``metadata["kernel"]``); its labels are
    taken as the targets that they are, classes as centred one-hot vectors. In float64, on the set's device.

    Args:
        synthetic: written by ``KernelInducingPoints``.
        real: images as networks see them, with the set's transform, and classes.

    Returns:
        The share of correct classifications, in [0, 1].

    Raises:
        InputError: for a set without a closed-form kernel, and where there are no real images, or of another shape.
    """
    kernel: dict[str, Any] = synthetic.metadata.get("kernel", {})
    if kernel.get("name") not in KERNELS:
        raise InputError(f"kernel_accuracy: the set's metadata name no kernel of {', '.join(KERNELS)}: KIP's sets do")
    shapes = [tuple(images.shape[1:]) for images in (real.images, synthetic.images)]
    if not len(real.labels) or shapes[0] != shapes[1]:
        raise InputError(f"kernel_accuracy: {len(real.labels)} real images of {shapes[0]}, the set's are {shapes[1]}")
    labels, scale = synthetic.labels, synthetic.metadata.get("target_scale", 1.0)
    targets = centred_targets(labels, len(synthetic.class_names), scale=scale) if labels.ndim == 1 else labels
    options = {"depth": kernel["depth"], "bias_variance": kernel["bias_variance"]}

    def between(images: Tensor, others: Tensor) -> Tensor:
        return KERNELS[kernel["name"]](images.double().flatten(1), others.double().flatten(1), **options)

    own = between(synthetic.images, synthetic.images)
    cross = lambda images: between(images, synthetic.images)  # noqa: E731
    return float(ridge_accuracy(cross, own, targets, kernel["reg"], real))
