"""Matching rules: the places of the matching loss where ideas of the field plug in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MatchingRule:
    """A variant of trajectory matching, written as what it changes in the matching loss.

    Subclasses are frozen dataclasses that override the hooks they need; the hooks here change nothing. All are pure
    functions of tensors on one device. ``trajectory_matching_loss`` applies several rules in their order: each one's
    ``begin`` receives where the rules before it let the student start, and parameters count that all rules keep.

    Attributes:
        name: short name of the idea, appended to the name of the method ("ftd+robust"); seeds its random draws.

    Example:
        >>> import torch
        >>> class FirstHalf(MatchingRule):
        ...     name = "half"
        ...
        ...     def keep(self, student, start, target):
        ...         return torch.arange(len(start)) < len(start) // 2
        >>> FirstHalf().keep(torch.ones(4), torch.zeros(4), torch.ones(4))
        tensor([ True,  True, False, False])
    """

    name: ClassVar[str] = ""

    def begin(self, start: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Return the weights that the student starts from, (P,).

        Args:
            start: theta*_t, the teacher's weights, (P,).
            target: theta*_{t+m}, (P,).
            generator: a CPU generator, seeded for this rule and segment.
        """
        return start

    def compared(self, student: Tensor, noise: Tensor) -> Tensor:
        """Return the weights that are compared with the target, (P,), differentiable in ``student``.

        Args:
            student: theta_n, the student's weights after its last step, (P,).
            noise: by how much :meth:`begin` moved the start, (P,).
        """
        return student

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor | None:
        """Return which parameters the distance is taken over, (P,) bool; None for all.

        Args:
            student: what is compared with the target, (P,), detached.
            start: theta*_t, (P,).
            target: theta*_{t+m}, (P,).
        """
        return None
