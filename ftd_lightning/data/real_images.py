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
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ftd_lightning.contracts import ImageTransform, Part
    from ftd_lightning.data.images import ImageDataset

PARTS: tuple[Part, ...] = ("train", "val", "test")
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
        _refuse_constant(train.pictures)
        whole = {"train": train, "test": test, **({} if spec.held_out is None else {"val": spec.held_out()})}
        labels = {name: part.labels for name, part in whole.items()}
        chosen = choose(labels, val_fraction=val_fraction, max_per_class=max_per_class, seed=seed)
        # Whole parts, which may be mapped from files, and the indices of what is used of them.
        self._parts = {name: (whole[source], index) for name, (source, index) in chosen.items()}
        self._done = spec.transform
        self._images: dict[Part, Images] = {}

    def labels(self, name: Part) -> Tensor:
        """Return the labels of a part, (N,) int64; no image is transformed for it."""
        pictures, index = self._parts[name]
        return pictures.labels[index]

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


def choose(
    labels: Mapping[str, Tensor], *, val_fraction: float, max_per_class: int | None, seed: int
) -> dict[Part, tuple[str, Tensor]]:
    """Choose which images are trained on, held out and tested on.

    Args:
        labels: of "train", "test" and, where images are given as held out, "val".
        val_fraction: as for :class:`RealImages`.
        max_per_class: as for :class:`RealImages`.
        seed: as for :class:`RealImages`.

    Returns:
        By part, the key of ``labels`` that its images come from, and their indices there, ascending.
    """
    kept = {name: limit_per_class(of, max_per_class, seed) for name, of in labels.items()}
    if "val" in labels:
        return {name: (name, kept[name]) for name in PARTS}
    used, left = hold_out(labels["train"][kept["train"]], val_fraction, seed)
    train = kept["train"]
    return {"train": ("train", train[used]), "val": ("train", train[left]), "test": ("test", kept["test"])}


def _refuse_constant(pictures: Tensor) -> None:
    if not any(bool((some != some[..., :1, :1]).any()) for some in pictures.split(100)):
        raise InputError("every training image is of a single colour: check the images, and how they are read")


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
