"""The bases of matching rules: the hooks by which ideas of the field change trajectory matching."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import Tensor

    from ftd_lightning.functional.selection import Ipc

# Hooks that at most one rule may override.
EXCLUSIVE = ("distance", "start_epochs", "initial_images", "labels")


class Teachers(Protocol):
    """Trained teachers, which rules may ask about images."""

    def __len__(self) -> int:
        """Return their number."""

    def logits(self, teacher: int, images: Tensor) -> Tensor:
        """Classify images (N, C, H, W), not augmented, with a teacher's last weights; (N, K) on the images' device."""


class MatchingRule:
    """A change of trajectory matching.

    Subclasses are frozen dataclasses that override the hooks they need; the hooks here change nothing. All are pure
    functions of their arguments. Constructors raise InputError (a ValueError) for arguments out of their range.

    ``TrajectoryMatching`` applies a list of rules in order: ``begin`` of one rule takes the start that the rules before
    it return, the distance is over the parameters that all rules keep, and a step is made if all accept it. At most one
    rule may override each exclusive hook: ``distance``, ``start_epochs``, ``initial_images``, and ``labels`` of a
    ``LabelRule``. ``trajectory_matching_loss`` uses ``begin``, ``compared``, ``keep`` and ``distance``.

    Convention: start is theta*_t, target theta*_{t+m}, student the present theta_i or the last theta_n, all flat, (P,).
    Only ``compared`` gets a student that is not detached.

    Attributes:
        name: short name, appended to the name of the method ("ftd+robust"); seeds the rule's random draws.

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
        """Return the weights that the student starts from, (P,); the CPU generator is seeded for rule and segment."""
        return start

    def distance(self, student: Tensor, target: Tensor) -> Tensor | None:
        """Return the student's distance from the target after an inner step, a scalar; None to choose no step.

        With a distance, the student is unrolled only up to the step of the smallest one, the later of equal steps.
        """
        return None

    def compared(self, student: Tensor, noise: Tensor) -> Tensor:
        """Return the weights that are compared with the target, (P,), differentiable in ``student``.

        ``noise`` is the change that :meth:`begin` made to the start, (P,).
        """
        return student

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor | None:
        """Return which parameters the distance from the target is taken over, (P,) bool; None for all."""
        return None

    def start_epochs(self, iteration: int, max_start_epoch: int) -> range | None:
        """Return the epochs below ``max_start_epoch`` that an iteration's segments may start at; None for all."""
        return None

    def initial_images(self, candidates: Sequence[Tensor], ipc: Ipc, teachers: Teachers) -> list[Tensor] | None:
        """Choose the real images to start from: indices into each class's candidates; None for the first ones.

        Args:
            candidates: for each class all real images (M, C, H, W), in random order.
            ipc: images per class, or a list of those of each, in label order.
            teachers: to classify images with.
        """
        return None

    def accepts(self, loss: Tensor) -> Tensor | None:
        """Return whether the optimizer may step after a loss, averaged over all segments and ranks; None for yes.

        Both are scalars on the device.
        """
        return None


class LabelRule(MatchingRule):
    """A rule for the labels of the synthetic images, in place of their classes.

    Attributes:
        made: recorded in the set: "learned" or "teacher".
    """

    made: ClassVar[str] = ""

    def initial_logits(
        self, classes: Tensor, num_classes: int, answers: Callable[[], Iterable[Tensor]]
    ) -> Tensor | None:
        """Return initial logits, (N, K), where labels are learned; None where they are not.

        Args:
            classes: of the initial images, (N,) int64.
            num_classes: K.
            answers: returns each teacher's logits (N, K) of the initial images.
        """
        return None

    def optimizer_options(self) -> dict[str, float]:
        """Return "lr" and "momentum" of learned logits."""
        return {}

    def labels(self, logits: Tensor | None, answers: Callable[[], Tensor]) -> Tensor:
        """Return the labels of an iteration: probabilities (N, K), differentiable in learned logits.

        Args:
            logits: learned logits, (N, K), which then decide alone; None where none are learned.
            answers: returns the logits (N, K) that the target's weights theta*_{t+m} give the synthetic images, not
                augmented, in training mode, detached.
        """
        raise NotImplementedError


def having(rules: Sequence[MatchingRule], hook: str) -> list[MatchingRule]:
    """Return the rules that override a hook, which may be the labels of a ``LabelRule``."""
    return [rule for rule in rules if getattr(type(rule), hook, None) is not getattr(MatchingRule, hook, None)]


def only_one(rules: Sequence[MatchingRule], hook: str) -> MatchingRule | None:
    """Return the rule that overrides an exclusive hook, or None; raises InputError for several."""
    found = having(rules, hook)
    if len(found) > 1:
        names = " and ".join(type(rule).__name__ for rule in found)
        raise InputError(f"rules: {names} each decide {hook}: give one of them")
    return found[0] if found else None
