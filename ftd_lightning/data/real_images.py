"""The real images of a data set: split into parts, and transformed when they are first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ftd_lightning.contracts import Images
from ftd_lightning.data.held_out import hold_out, limit_per_class
from ftd_lightning.data.images import unit_range
from ftd_lightning.data.schema import check_images, check_labels
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ftd_lightning.contracts import ImageTransform, Part
    from ftd_lightning.data.images import ImageDataset, Pictures

CHUNK = 5000  # images transformed at a time: bounds the memory of whitening


class RealImages:
    """The parts of a data set.

    Args:
        spec: the data set, which is read.
        val_fraction: share of every class's training images that is held out, unless the data set says which are.
        max_per_class: keep at most so many images of each class in each part; None keeps all.
        seed: decides which.
    """

    def __init__(self, spec: ImageDataset, *, val_fraction: float, max_per_class: int | None, seed: int) -> None:
        train, test = spec.load()
        kept = limit_per_class(train.labels, max_per_class, seed)
        if spec.held_out is None:
            used, left = hold_out(train.labels[kept], val_fraction, seed)
            kept, val = kept[used], (train, kept[left])
        else:
            held_out = spec.held_out()
            val = held_out, limit_per_class(held_out.labels, max_per_class, seed)
        # Whole parts, which may be mapped from files, and the indices of what is used of them.
        self._parts: dict[Part, tuple[Pictures, Tensor]] = {
            "train": (train, kept),
            "val": val,
            "test": (test, limit_per_class(test.labels, max_per_class, seed)),
        }
        self._done = spec.transform
        self._images: dict[Part, Images] = {}

    def count(self, name: Part) -> int:
        """Number of images of a part."""
        return len(self._parts[name][1])

    def pictures(self, name: Part) -> Tensor:
        """Return the pictures of a part, (N, C, H, W)."""
        pictures, index = self._parts[name]
        return pictures.pictures[index]

    def images(self, name: Part, transform: ImageTransform) -> Images:
        """Return the images of a part; later calls return the same tensors.

        Args:
            name: the part.
            transform: the same in every call.
        """
        if name not in self._images:
            (pictures, labels), index = self._parts[name]
            images = torch.empty(len(index), *pictures.shape[1:])  # filled chunk by chunk: torch.cat would take twice
            chunks = range(0, len(index), CHUNK)
            for i in tqdm(chunks, desc=f"transforming {name} images", disable=len(chunks) < 3, leave=False):
                images[i : i + CHUNK] = self._transformed(pictures[index[i : i + CHUNK]], transform)
            self._images[name] = Images(images, labels[index])
        return self._images[name]

    def _transformed(self, pictures: Tensor, transform: ImageTransform) -> Tensor:
        if self._done is None:
            return transform.apply(unit_range(pictures))
        # They are images already; a set may have another transform, though.
        same = self._done.describe() == transform.describe()
        return pictures if same else transform.apply(self._done.invert(pictures))


def given_images(real: Sequence[Tensor]) -> Images:
    """Check real images that are given as tensors.

    Args:
        real: images (N, C, H, W) of floats, and their classes, (N,) int64.

    Raises:
        InputError: for other shapes or types, values that are not finite, or another number of labels than images.
    """
    if len(real) != 2 or not all(isinstance(part, torch.Tensor) for part in real):
        raise InputError("real: is not a pair of tensors, images and labels")
    images, labels = real
    check_images(images.float(), "images", "real")
    check_labels(labels, len(images), None, "class", "real")
    return Images(images, labels)
