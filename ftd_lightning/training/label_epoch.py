"""Which epoch of a teacher gives the best labels: fresh networks try each, and held-out images decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.training.evaluation_protocol import accuracies, mean_and_std, train_fresh_networks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from ftd_lightning.contracts import Images
    from ftd_lightning.training.evaluation_protocol import EvaluationProtocol
    from ftd_lightning.training.side_by_side import SideBySide


def try_labels(
    labelled: Iterable[tuple[int, Tensor]],
    images: Tensor,
    held_out: Images,
    build: Callable[[], Sequence[nn.Module]],
    protocol: EvaluationProtocol,
    *,
    seed: int = 0,
    losses: SideBySide | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train fresh networks on images with each of several labellings, and measure them on held-out images.

    Networks, batches and augmentation are the same for every labelling, so that the labels make the difference.

    Args:
        labelled: epochs of a teacher and its labels of the images after them, (N, K) each.
        images: (N, C, H, W).
        held_out: real images that none of these networks trains on.
        build: makes the fresh networks, on the device of the images; the same ones at every call.
        protocol: how they are trained.
        seed: decides batches and augmentation.
        losses: computes the losses; None makes what does.
        progress: show bars.

    Returns:
        ``{"epoch", "mean", "std", "n"}`` for each: accuracy on the held-out images, fractions, over the networks.
    """
    measured = []
    for epoch, labels in labelled:
        networks = build()
        train_fresh_networks(
            networks,
            images,
            labels,
            protocol,
            seed=derive_seed(seed, "label epoch"),
            losses=losses,
            progress=f"labels of epoch {epoch}" if progress else None,
        )
        measured.append({"epoch": epoch, **mean_and_std(torch.tensor(accuracies(networks, *held_out)))})
    return measured


def best_epoch(measured: Sequence[dict[str, Any]]) -> int:
    """Return the epoch with the highest mean accuracy, the first of equal ones.

    Example:
        >>> best_epoch([{"epoch": 1, "mean": 0.2}, {"epoch": 2, "mean": 0.4}, {"epoch": 4, "mean": 0.4}])
        2
    """
    return int(max(measured, key=lambda one: float(one["mean"]))["epoch"])
