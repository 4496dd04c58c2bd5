"""Splits of the training images."""

from __future__ import annotations

import torch
from torch import Tensor

from ftd_lightning.data.sources import sample_per_class
from ftd_lightning.functional.seeding import make_generator


def limit_per_class(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Choose at most ``limit`` images per class at random; None keeps all.

    Args:
        labels: (N,) int64.
        limit: images per class, >= 1; classes that have fewer keep all of theirs.
        seed: decides which.

    Returns:
        Indices, ascending.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1])
        >>> labels[limit_per_class(labels, 2, seed=0)]
        tensor([0, 0, 1])
    """
    if limit is None:
        return torch.arange(len(labels))
    shuffled = torch.randperm(len(labels), generator=make_generator(seed, "limit"))
    kept = [shuffled[labels[shuffled] == label][:limit] for label in labels.unique()]
    return torch.cat(kept).sort().values


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images into those used and those held out, the same share of every class.

    Args:
        labels: (N,) int64.
        fraction: share that is held out, in [0, 1).
        seed: decides which.

    Returns:
        Indices of the images used and of those held out, both ascending.

    Example:
        >>> used, held_out = hold_out(torch.tensor([0, 0, 1, 1]), 0.5, seed=0)
        >>> len(used), len(held_out)
        (2, 2)
    """
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    is_held_out[sample_per_class(labels, float(fraction), make_generator(seed, "held out"))] = True
    return (~is_held_out).nonzero().squeeze(1), is_held_out.nonzero().squeeze(1)
