"""Labels of the teacher: what the network that is to be matched makes of the synthetic images (TESLA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ftd_lightning.functional.rules import LabelRule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class TargetLabels(LabelRule):
    """Soft label assignment (TESLA, Cui et al., ICML 2023, Sec. 4.2): labels from the weights that are to be matched.

    In every iteration the labels are ``softmax(f(X; theta*_{t+m}))`` of the images as they are, without gradient. A set
    holds those of the last iteration's first segment.

    Example:
        >>> TargetLabels().labels(None, lambda: torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    name: ClassVar[str] = "target-labels"
    made: ClassVar[str] = "teacher"

    def labels(self, logits: Tensor | None, answers: Callable[[], Tensor]) -> Tensor:
        """Return the target's probabilities, (N, K)."""
        return torch.softmax(answers(), 1)
