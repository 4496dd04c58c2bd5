"""Scores of a synthetic set against real images: HLR, IOR, LRS and ARS of DD-Ranking, as fractions.

Source: Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation" (2025). With accuracies in [0, 1],

- HLR = acc(all real images) - acc(set, hard labels): what hard labels lose; lower is better;
- IOR = acc(set) - acc(random real images, as many of each class, labels of the same kind, same recipe);
- LRS = n(alpha) with alpha = w IOR - (1 - w) HLR;
- ARS = n(beta) with beta = g IOR(augmented) + (1 - g) IOR(not augmented);
- n(x) = (e^x - e^-1) / (e - e^-1), which maps [-1, 1] to [0, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ftd_lightning.training.evaluation_protocol import mean_and_std

if TYPE_CHECKING:
    from collections.abc import Sequence

SCORES = ("hlr", "ior", "lrs", "ars")


def normalised(value: float) -> float:
    """Map a weighted difference of accuracies in [-1, 1] to a score in [0, 1].

    Example:
        >>> [round(normalised(value), 4) for value in (-1.0, 0.0, 1.0)]
        [0.0, 0.2689, 1.0]
    """
    least = math.exp(-1)
    return (math.exp(value) - least) / (math.e - least)


def hard_label_recovery(real: float, hard: float) -> float:
    """HLR, in [-1, 1]; lower is better.

    Args:
        real: accuracy of a network trained on all real images, a fraction.
        hard: of one trained on the set with hard labels.

    Example:
        >>> hard_label_recovery(0.875, 0.5)
        0.375
    """
    return real - hard


def improvement_over_random(own: float, random: float) -> float:
    """IOR, in [-1, 1]; higher is better.

    Args:
        own: accuracy of a network trained on the set with labels of its own kind, a fraction.
        random: of one trained in the same way on as many random real images of each class.

    Example:
        >>> improvement_over_random(0.75, 0.5)
        0.25
    """
    return own - random


def label_robust_score(ior: float, hlr: float, *, w: float = 0.5) -> float:
    """LRS, in [0, 1]; higher is better.

    Args:
        ior: from :func:`improvement_over_random`.
        hlr: from :func:`hard_label_recovery`.
        w: weight of ``ior``, in [0, 1].

    Example:
        >>> round(label_robust_score(0.2, 0.2), 4)  # alpha = 0
        0.2689
        >>> label_robust_score(1.0, -1.0)
        1.0
    """
    return normalised(w * ior - (1 - w) * hlr)


def augmentation_robust_score(augmented: float, plain: float, *, g: float = 0.5) -> float:
    """ARS, in [0, 1]; higher is better.

    Args:
        augmented: IOR where training images are augmented.
        plain: IOR where they are not.
        g: weight of ``augmented``, in [0, 1].

    Example:
        >>> round(augmentation_robust_score(0.5, -0.5), 4)  # beta = 0
        0.2689
    """
    return normalised(g * augmented + (1 - g) * plain)


def scores(
    real: Sequence[float],
    hard: Sequence[float],
    own: tuple[Sequence[float], Sequence[float]],
    plain: tuple[Sequence[float], Sequence[float]],
) -> dict[str, dict[str, float | int]]:
    """Compute all four scores of a set, network by network, so that networks of one seed are compared.

    Args:
        real: accuracies of n networks trained on all real images, fractions.
        hard: on the set with hard labels.
        own: on the set with labels of its own kind, and on random real images.
        plain: the same two without augmentation.

    Returns:
        {"mean", "std", "n"} of "hlr", "ior", "lrs" and "ars" over the networks.

    Example:
        >>> found = scores([0.9, 0.8], [0.5, 0.6], ([0.5, 0.6], [0.25, 0.35]), ([0.5, 0.6], [0.5, 0.6]))
        >>> {name: round(score["mean"], 4) for name, score in found.items()}
        {'hlr': 0.3, 'ior': 0.25, 'lrs': 0.259, 'ars': 0.3256}
    """
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for whole, hard_one, own_one, random, plain_one, plain_random in zip(real, hard, *own, *plain, strict=True):
        hlr, ior = hard_label_recovery(whole, hard_one), improvement_over_random(own_one, random)
        found["hlr"].append(hlr)
        found["ior"].append(ior)
        found["lrs"].append(label_robust_score(ior, hlr))
        found["ars"].append(augmentation_robust_score(ior, improvement_over_random(plain_one, plain_random)))
    return {name: mean_and_std(torch.tensor(values, dtype=torch.float64)) for name, values in found.items()}
