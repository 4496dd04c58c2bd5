"""The loops of CAFE (Wang et al., CVPR 2022): when a round ends, and the training within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Loops:
    """When a round of CAFE ends, and the training between two of its iterations.

    Attributes:
        kind: "dynamic" decides by accuracies; "fixed": ``outer_max`` iterations per round, ``inner_max`` epochs between
            two.
        outer_max: most iterations of a round. Accuracies alone need not end it; the released script has no such bound.
        inner_max: most epochs of training between two iterations; likewise.
        lambda_1: the spread of accuracies below which a round ends, a fraction; 0.04 in the released script.
        lambda_2: the spread above which the training ends, a fraction; 0.03 there.
        window: accuracies that each loop looks at.

    Raises:
        InputError: for numbers out of range or another kind.
    """

    kind: Literal["dynamic", "fixed"] = "dynamic"
    outer_max: int = 50
    inner_max: int = 50
    lambda_1: float = 0.04
    lambda_2: float = 0.03
    window: int = 10

    def __post_init__(self) -> None:
        if self.kind not in ("dynamic", "fixed"):
            raise InputError(f"loops: kind={self.kind!r} is unknown: choose from ['dynamic', 'fixed']")
        check_bounds(Loops, vars(self))

    @classmethod
    def of(cls, value: Loops | Mapping[str, Any] | None) -> Loops:
        """Build from the fields as a mapping; None takes the defaults."""
        if isinstance(value, Loops):
            return value
        try:
            return cls(**(value or {}))
        except TypeError as error:
            raise InputError(f"loops: {error}") from error
