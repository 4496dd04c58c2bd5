"""Coresets: real images chosen to represent their class, by their features.

Herding (Welling, ICML 2009) and K-center greedy (Sener and Savarese, ICLR 2018), as the dataset condensation
literature uses them: class by class, on features of a network trained on the real images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Ipc = int | list[int]  # images of every class, or a list of the images of each, in label order
First = Literal["mean", "random"]

# Rows per block of float64 differences: 8 MB at 2048 features.
ROWS_PER_BLOCK = 512


def images_per_class(ipc: Ipc, available: Sequence[int], names: Sequence[str] = ()) -> list[int]:
    """Return the images of each class; refuse more than are ``available`` of one, with a list that works.

    ``names`` are those of the classes in label order, for errors; without them classes are numbered.
    """
    wanted = list(ipc) if isinstance(ipc, list | tuple) else [ipc] * len(available)
    if len(wanted) != len(available):
        raise InputError(f"ipc={wanted}: names {len(wanted)} classes, there are {len(available)}")
    works = [min(pair) for pair in zip(wanted, available, strict=True)]
    if works != wanted:
        short = next(label for label, count in enumerate(wanted) if count > works[label])
        of, fitting = names[short] if names else short, ",".join(map(str, works))
        raise InputError(f"ipc={ipc}: class {of} has {works[short]} images to train on; this works: [{fitting}]")
    return wanted


def _squared_distances(features: Tensor, point: Tensor) -> Tensor:
    """Compute the squared distance of each row from a point, (n,) in float64."""
    # Not |a|^2 - 2 a b + |b|^2, which cancels, and rounds to TF32.
    parts = [(rows.double() - point).square().sum(dim=1) for rows in features.split(ROWS_PER_BLOCK)]
    return torch.cat(parts)


def _mean(features: Tensor) -> Tensor:
    """Average the rows, (d,) in float64."""
    return torch.stack([rows.double().sum(dim=0) for rows in features.split(ROWS_PER_BLOCK)]).sum(dim=0) / len(features)


def _check(features: Tensor, count: int) -> None:
    if not 1 <= count <= len(features):
        raise InputError(f"cannot choose {count} of a class's {len(features)} images: ask for 1 to {len(features)}")


@torch.no_grad()
def herding(features: Tensor, count: int) -> Tensor:
    """Choose images one by one so that the mean of those chosen stays close to the mean of all.

    With mu the mean row and S the sum of the rows chosen so far, the k-th minimises ``|| (k mu - S) - f_i ||`` among
    the others; of equally good rows it is the first.

    Args:
        features: (n, d), of one class; any floating dtype and device.
        count: number of images to choose, 1 to n.

    Returns:
        (count,) int64 row indices on the device of ``features``, in the order chosen; a smaller count gives a prefix.

    Raises:
        InputError: for a count outside 1 to n.

    Example:
        >>> herding(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), 2)  # the mean is 3; the next target is 2 * 3 - 2 = 4
        tensor([2, 1])
    """
    _check(features, count)
    mean = _mean(features)
    chosen: list[Tensor] = []
    target = torch.zeros_like(mean)
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    for _ in range(count):
        target = target + mean
        index = _squared_distances(features, target).masked_fill(taken, torch.inf).argmin()
        target = target - features[index].double()
        taken[index] = True
        chosen.append(index)
    return torch.stack(chosen)


@torch.no_grad()
def k_center(
    features: Tensor, count: int, *, first: First = "mean", generator: torch.Generator | None = None
) -> Tensor:
    """Choose images one by one, each the one farthest from all that were chosen before (K-center greedy).

    Args:
        features: (n, d), of one class; any floating dtype and device.
        count: number of images to choose, 1 to n.
        first: "mean" starts with the image nearest to the mean of all (the authors of DC), "random" with a random one
            (DeepCore).
        generator: draws the first image; needed for "random" only.

    Returns:
        (count,) int64 row indices on the device of ``features``, in the order chosen; a smaller count gives a prefix.

    Raises:
        InputError: for a count outside 1 to n.
    """
    _check(features, count)
    if first == "random":
        assert generator is not None
        index = torch.randint(len(features), (), generator=generator, device=generator.device).to(features.device)
    else:
        index = _squared_distances(features, _mean(features)).argmin()
    chosen = [index]
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, _squared_distances(features, features[index].double()))
        nearest[index] = -torch.inf  # never chosen again, even if all others coincide with chosen ones
        index = nearest.argmax()
        chosen.append(index)
    return torch.stack(chosen)
