"""Rules for the labels that a student learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch.nn.functional import one_hot

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError
from ftd_lightning.rules.base import LabelRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor


LabelInit = Literal["teachers", "one_hot"]
CONFIDENCE = 0.9  # of "one_hot" in an image's class


def mean_right_logits(classes: Tensor, answers: Iterable[Tensor]) -> Tensor:
    """Average, for each image, the logits of the teachers that classify it correctly, or of all if none does.

    Args:
        classes: (N,) int64.
        answers: logits (N, K) of every teacher, one or more.
    """
    total, of_right, right, count = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0), 0
    for logits in answers:
        correct = (logits.argmax(1) == classes).to(logits.dtype)[:, None]
        total, of_right = total.to(logits) + logits, of_right.to(logits) + logits * correct
        right, count = right.to(logits) + correct, count + 1
    return torch.where(right > 0, of_right / right.clamp(min=1), total / count)


@dataclass(frozen=True)
class LearnedLabels(LabelRule):
    """Learn the labels as logits y (DATM, Guo et al., ICLR 2024, Sec. 3.4).

    The student's loss is the cross entropy with ``softmax(y)``; y is updated by SGD together with the images.

    Args:
        lr: learning rate of the logits.
        momentum: of the logits.
        init: "teachers": each initial image's mean logits over the teachers that classify it correctly after their
            last recorded epoch. "one_hot": 0.9 on the image's class, the rest equally on the others; an exact one-hot
            softmax has no gradient.

    Example:
        >>> logits = LearnedLabels(lr=1.0, init="one_hot").initial_logits(torch.tensor([1]), 3, list)
        >>> torch.softmax(logits, 1)
        tensor([[0.0500, 0.9000, 0.0500]])
    """

    lr: float
    momentum: float = 0.9
    init: LabelInit = "teachers"

    name: ClassVar[str] = "labels"
    made: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        check_bounds(LearnedLabels, vars(self))
        if self.init not in get_args(LabelInit):
            raise InputError(f"LearnedLabels: init={self.init!r} is unknown: choose from {list(get_args(LabelInit))}")

    def initial_logits(self, classes: Tensor, num_classes: int, answers: Callable[[], Iterable[Tensor]]) -> Tensor:
        """Return the logits to start from, (N, K)."""
        if self.init == "teachers":
            return mean_right_logits(classes, answers())
        odds = CONFIDENCE / (1 - CONFIDENCE) * (num_classes - 1)
        return math.log(odds) * one_hot(classes, num_classes).float()

    def optimizer_options(self) -> dict[str, float]:
        """Return learning rate and momentum."""
        return {"lr": self.lr, "momentum": self.momentum}

    def labels(self, logits: Tensor | None, answers: Callable[[], Tensor]) -> Tensor:
        """Return softmax(y), (N, K)."""
        assert logits is not None
        return torch.softmax(logits, 1)


@dataclass(frozen=True)
class TargetLabels(LabelRule):
    """Take labels from the target's weights: soft label assignment (TESLA, Cui et al., ICML 2023, Sec. 4.2).

    In every iteration the labels are ``softmax(f(X; theta*_{t+m}))`` of the images, not augmented and without gradient.
    A set holds the labels of the last iteration's first segment.
    """

    name: ClassVar[str] = "target-labels"
    made: ClassVar[str] = "teacher"

    def labels(self, logits: Tensor | None, answers: Callable[[], Tensor]) -> Tensor:
        """Return the target's probabilities, (N, K)."""
        return torch.softmax(answers(), 1)
