"""Splits of images by their labels alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.functional.selection import Ipc, images_per_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ftd_lightning.contracts import Part


def share_of(count: int, share: float) -> int:
    """Return how many of a class's images a share is; one is always left."""
    return min(round(share * count), max(count - 1, 0))


def sample_per_class(labels: Tensor, count: Ipc | float, generator: torch.Generator) -> Tensor:
    """Draw images of every class, a number as for ``images_per_class`` or a share in [0, 1) (float) that leaves one.

    Returns:
        Indices, class by class; an InputError refuses more images than a class has.
    """
    there = labels.bincount().tolist()
    counts = [share_of(size, count) for size in there] if isinstance(count, float) else images_per_class(count, there)
    chosen = []
    for label, wanted in enumerate(counts):
        members = (labels == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    return torch.cat(chosen)


def limit_per_class(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Choose at most ``limit`` images per class at random, None keeps all; return their indices, ascending."""
    if limit is None:
        return torch.arange(len(labels))
    shuffled = torch.randperm(len(labels), generator=make_generator(seed, "limit"))
    kept = [shuffled[labels[shuffled] == label][:limit] for label in labels.unique()]
    return torch.cat(kept).sort().values


def split(
    labels: Mapping[str, Tensor], *, val_fraction: float, max_per_class: int | None, seed: int
) -> dict[Part, tuple[str, Tensor]]:
    """Choose the images that are trained on, held out and tested on, at most ``max_per_class`` of each class and part.

    Where ``labels`` have no "val", the share ``val_fraction`` of every class's training images is held out.

    Returns:
        By part, the key of ``labels`` that its images come from, and their indices there, ascending.
    """
    kept = {name: limit_per_class(part, max_per_class, seed) for name, part in labels.items()}
    train, test = kept["train"], kept["test"]
    if "val" in labels:
        return {"train": ("train", train), "val": ("val", kept["val"]), "test": ("test", test)}
    held_out = torch.zeros(len(train), dtype=torch.bool)
    share, generator = float(val_fraction), make_generator(seed, "held out")
    held_out[sample_per_class(labels["train"][train], share, generator)] = True
    return {"train": ("train", train[~held_out]), "val": ("train", train[held_out]), "test": ("test", test)}
