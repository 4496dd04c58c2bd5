"""Comparison of a training batch with the description of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from ftd_lightning.contracts import DataSource

FEWEST = 8  # images; the pixels of fewer vary too much
SAMPLED = 1000  # described images whose pixels are measured
# Pixels in [0, 1] have a standard deviation of at most 0.5, standardised ones of about 1. Augmentation changes it less.
TOLERANCE = 0.6


def refuse_other_batch(batch: Any, described: DataSource) -> None:
    """Refuse a batch whose images contradict their description.

    The images have to have the described shape (C, H, W). Their pixels have to have nearly the mean and the standard
    deviation of the described training images: the deviations may differ by a factor below 1/0.6, the means by less
    than 0.6 deviations. This tells images in [0, 1], or in [0, 255], from standardised ones, but not two
    standardisations by similar constants. Pixels of fewer than 8 images, and batches without an image tensor, are not
    checked.

    Args:
        batch: of a training loader: a tensor (N, C, H, W), or a list or mapping with one.
        described: the source of the description.

    Raises:
        InputError: for such images.
    """
    images = _images(batch)
    if images is None:
        return
    shape = tuple(described.description().shape.zeros(0).shape[1:])
    if tuple(images.shape[1:]) != shape:
        raise InputError(
            f"TrajectoryRecorder: data= describes images of shape {shape}, but the first training batch has "
            f"{tuple(images.shape[1:])}: give data= that describes the loader's images"
        )
    if len(images) < FEWEST:
        return
    known = described.part("train").images
    known = known[:: -(-len(known) // SAMPLED)]
    (mean, std), (wanted, spread) = ((float(x.float().mean()), float(x.float().std())) for x in (images, known))
    least = TOLERANCE * spread
    if not (least < std < spread / TOLERANCE and abs(mean - wanted) < least):
        raise InputError(
            f"TrajectoryRecorder: data= describes images whose pixels have mean {wanted:.2f} and standard deviation "
            f"{spread:.2f}, but the first training batch has {mean:.2f} and {std:.2f}: give data= that describes the "
            "loader's images with their normalisation"
        )


def _images(batch: Any) -> Tensor | None:
    """Find the first (N, C, H, W) tensor in a batch."""
    if isinstance(batch, Tensor):
        return batch.detach() if batch.ndim == 4 else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _images(part)) is not None), None)
