"""Feature alignment (CAFE: Wang et al., CVPR 2022): its two losses on class means, and the watcher of its loops.

With m_l^c the mean over the images of class c of the features of level l, and f the embedding (the last level)::

    sum_l w_l sum_c || m_l^c(real) - m_l^c(synthetic) ||^2                                        alignment
    sum_{i real} CE( (<f(x_i), m^c(synthetic)>)_c , y_i )      a sum, not a mean; times 0.01      discrimination
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

Leave = Literal["below", "above"]


def class_means(features: Tensor, *, counts: Sequence[int]) -> Tensor:
    """Average the features of each class.

    Args:
        features: (N, ...), grouped by class: those of class 0 first.
        counts: number of features of each class, each at least 1; their sum is N.

    Returns:
        (C, ...), one mean per class.

    Raises:
        ValueError: for counts that do not add up to N, or a class without features.

    Example:
        >>> class_means(torch.tensor([[1.0], [3.0], [5.0]]), counts=[2, 1])
        tensor([[2.],
                [5.]])
    """
    if min(counts) < 1 or sum(counts) != len(features):
        raise ValueError(f"counts {list(counts)} do not split {len(features)} features into classes")
    return torch.stack([part.mean(dim=0) for part in features.split(list(counts))])


def level_weights(levels: int) -> list[float]:
    """Return CAFE's weights of the levels: 1 for the last three, 0.1 for those before.

    Convention: for the five levels of depth 3 these are those of the released script. It supports no other depth; the
    small weight of further shallow levels is our extension.

    Args:
        levels: number of levels that ``feature_levels`` returned.

    Example:
        >>> level_weights(5)
        [0.1, 0.1, 1.0, 1.0, 1.0]
    """
    return [0.1] * (levels - 3) + [1.0] * min(levels, 3)


def alignment_loss(synthetic: Sequence[Tensor], real: Sequence[Tensor], *, weights: Sequence[float]) -> Tensor:
    """Sum the squared distances of the class means over levels, classes and features.

    Args:
        synthetic: the class means of each level, (C, ...).
        real: the same of real images; the caller detaches them where they need no gradient.
        weights: w_l, one per level; see :func:`level_weights`.

    Returns:
        A scalar, differentiable in both.

    Raises:
        ValueError: for different numbers of levels or weights.

    Example:
        >>> zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
        >>> float(alignment_loss([zeros, zeros], [ones, 2 * ones], weights=[0.5, 1.0]))
        27.0
    """
    if not len(synthetic) == len(real) == len(weights):
        raise ValueError(f"{len(synthetic)} synthetic and {len(real)} real levels, but {len(weights)} weights")
    terms = [w * (r - s).square().sum() for w, s, r in zip(weights, synthetic, real, strict=True)]
    return torch.stack(terms).sum()


def discrimination_loss(real: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Classify real features by their inner products with the synthetic class centres.

    ``sum_i CE((<real_i, centre_c>)_c, y_i)``: a sum over the real images, so its size grows with their number. CAFE
    weights it by 0.01, which is left to the caller.

    Args:
        real: embeddings of real images, (N, D); the caller detaches them where they need no gradient.
        labels: their classes, (N,) int64.
        centres: mean embeddings of the synthetic images of each class, (C, D).

    Returns:
        A scalar, differentiable in ``real`` and ``centres``.

    Example:
        >>> loss = discrimination_loss(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), torch.zeros(2, 2))
        >>> round(float(loss) / 4, 4)  # log 2
        0.6931
    """
    return cross_entropy(real @ centres.T, labels, reduction="sum")


class Watcher:
    """Decides when to leave a loop of CAFE, from the spread of the last accuracies.

    The outer loop (image steps) is left once accuracies settle: max - min *below* lambda_1 = 0.04. The inner one
    (epochs on the synthetic set) is left once they have moved: max - min *above* lambda_2 = 0.03. Neither is certain to
    happen, so a maximum ends the loop in any case.

    Convention: one watcher per loop; a loop that is entered again needs a new one. Accuracies are the plain values
    of each check (the released script adds a tenth of the previous value to the next, with 10 classes).

    Args:
        threshold: lambda, a fraction.
        leave: "below" (outer loop) or "above" (inner loop).
        maximum: number of updates after which to leave whatever the accuracies.
        window: number of accuracies that are compared; with fewer, the loop continues.

    Raises:
        ValueError: for an unknown ``leave``, or a maximum or window below 1.

    Example:
        >>> watcher = Watcher(0.05, leave="below", maximum=100, window=3)
        >>> [watcher.update(accuracy) for accuracy in (0.1, 0.3, 0.31, 0.32)]
        [False, False, False, True]
    """

    def __init__(self, threshold: float, *, leave: Leave, maximum: int, window: int = 10) -> None:
        if leave not in get_args(Leave):
            raise ValueError(f"leave {leave!r} is unknown: choose from {list(get_args(Leave))}")
        if maximum < 1 or window < 1:
            raise ValueError(f"maximum={maximum} and window={window} must be at least 1")
        self.threshold, self.leave, self.maximum = threshold, leave, maximum
        self.accuracies: deque[float] = deque(maxlen=window)
        self.updates = 0

    def update(self, accuracy: float) -> bool:
        """Record the next accuracy, a fraction, and return whether to leave the loop."""
        self.updates += 1
        self.accuracies.append(accuracy)
        if self.updates >= self.maximum:
            return True
        if len(self.accuracies) < (self.accuracies.maxlen or 0):
            return False
        spread = max(self.accuracies) - min(self.accuracies)
        return spread < self.threshold if self.leave == "below" else spread > self.threshold
