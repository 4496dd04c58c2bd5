"""Results of evaluations: did the networks learn, did the set see the held-out images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.functional import cross_entropy

from ftd_lightning.core.ranks import from_all_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lightning.pytorch import Trainer
    from torch import Tensor, nn


class Fit(NamedTuple):
    """How well a network fits its training images.

    Attributes:
        loss: mean cross entropy.
        accuracy: share of images that it classifies correctly, in [0, 1].
        guessing: accuracy of always naming the most frequent class.
        images: how many.
    """

    loss: float
    accuracy: float
    guessing: float
    images: int


def failure(fit: Fit) -> str | None:
    """Say why a network is not to be trusted; None where it is.

    Its loss is not finite, or its training accuracy lies within two standard errors of guessing.

    Example:
        >>> failure(Fit(0.1, 1.0, 0.1, 10)), failure(Fit(float("nan"), 0.1, 0.1, 10))
        (None, 'its loss is not finite')
        >>> failure(Fit(2.3, 0.2, 0.1, 10))
        'its training accuracy, 20.0 %, is that of guessing'
    """
    if not math.isfinite(fit.loss):
        return "its loss is not finite"
    # Two standard errors leave no room for 1, which is not guessing, where there are few images.
    most = min(fit.guessing + 2 * math.sqrt(fit.guessing * (1 - fit.guessing) / fit.images), math.nextafter(1, 0))
    if fit.guessing < 1 and fit.accuracy <= most:
        return f"its training accuracy, {100 * fit.accuracy:.1f} %, is that of guessing"
    return None


@torch.no_grad()
def fits(networks: Sequence[nn.Module], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> list[Fit]:
    """Measure how well networks fit the batches that they were trained on.

    Args:
        networks: on the device; put into evaluation mode.
        batches: images (N, C, H, W), and classes (N,) or probabilities (N, K).
        device: where to compute.
    """
    losses, right = (torch.zeros(len(networks), dtype=torch.float64, device=device) for _ in range(2))
    frequencies: Tensor | None = None
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        classes = labels.argmax(1) if labels.ndim == 2 else labels
        for index, network in enumerate(networks):
            network.eval()
            weight = next(network.parameters(), images)
            logits = network(images.to(weight.dtype)).float()
            targets = labels.float() if labels.ndim == 2 else labels
            losses[index] += cross_entropy(logits, targets, reduction="sum")
            right[index] += (logits.argmax(1) == classes).sum()
            if frequencies is None:
                frequencies = torch.zeros(logits.shape[1], device=device, dtype=torch.int64)
        if frequencies is not None:
            frequencies += classes.bincount(minlength=len(frequencies))
    count = 0 if frequencies is None else int(frequencies.sum())
    if frequencies is None or not count:
        return []
    guessing = int(frequencies.max()) / count
    return [
        Fit(loss / count, correct / count, guessing, count)
        for loss, correct in zip(losses.tolist(), right.tolist(), strict=True)
    ]


def summary(failed: Mapping[str, str], total: int) -> str:
    """Sum up failures in one line.

    Example:
        >>> summary({"1": "its loss is not finite"}, 5)
        '1 of 5 networks did not learn the set, so their accuracy says nothing: network 1: its loss is not finite'
    """
    each = "; ".join(f"network {index}: {why}" for index, why in failed.items())
    return f"{len(failed)} of {total} networks did not learn the set, so their accuracy says nothing: {each}"


def check_learning(trainer: Trainer, networks: Iterable[nn.Module], device: torch.device, total: int) -> dict[str, str]:
    """Find the networks of all ranks that did not learn their training images, and warn of them.

    Args:
        trainer: whose training batches they were; where it has none, those of its datamodule. Nothing is found without.
        networks: of this rank, as ``ranks.own_share`` deals them out.
        device: where they are.
        total: how many networks count.

    Returns:
        The number of each such network, and why.
    """
    batches, data = trainer.train_dataloader, trainer.datamodule  # type: ignore[attr-defined]
    if batches is None and data is not None:
        batches = data.train_dataloader()
    own = [] if batches is None else [failure(fit) for fit in fits(list(networks), batches, device)]
    if not own:
        return {}
    failed = {str(index): why for index, why in enumerate(from_all_ranks(own, total)) if why}
    if failed:
        rank_zero_warn(summary(failed, total))
    return failed


def held_out_seen(of_set: Any, here: Any) -> bool:
    """Tell whether a set was distilled from images that this data source holds out.

    Both hold out a share of the same training images by a seed; other shares or seeds hold out other images.

    Args:
        of_set: ``metadata["dataset"]`` of the set; anything else than a mapping is unknown data.
        here: the description of the data source.

    Example:
        >>> held_out_seen({"name": "a", "val_fraction": 0.0, "seed": 0}, {"name": "a", "val_fraction": 0.1, "seed": 0})
        True
        >>> held_out_seen({"name": "a", "val_fraction": 0.1, "seed": 0}, {"name": "a", "val_fraction": 0.1, "seed": 0})
        False
    """
    if not isinstance(of_set, dict) or not isinstance(here, dict) or not here.get("val_fraction"):
        return False
    if any(of_set.get(key) != here.get(key) for key in ("name", "fingerprint") if key in of_set and key in here):
        return False
    return any(of_set.get(key) != here.get(key) for key in ("val_fraction", "seed", "max_per_class"))
