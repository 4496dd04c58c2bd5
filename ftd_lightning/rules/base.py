"""Matching rules: the places of trajectory matching where ideas of the field plug in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import Tensor


class Teachers(Protocol):
    """Trained teachers, as rules ask them about images."""

    def __len__(self) -> int:
        """Return their number."""

    def logits(self, teacher: int, images: Tensor) -> Tensor:
        """Classify images (N, C, H, W), not augmented, with a teacher's last weights; (N, K) on the images' device."""


class MatchingRule:
    """An idea of the field, written as what it changes in trajectory matching.

    Subclasses are frozen dataclasses that override the hooks they need; the hooks here change nothing. All are pure
    functions of their arguments. ``TrajectoryMatching`` takes a list of rules, as a trainer takes callbacks, and
    applies them in their order: each one's ``begin`` receives where the rules before it let the student start,
    parameters count that all rules keep, a step is made that all accept, and weights are multiplied. Of the hooks that
    decide alone (``distance``, ``start_epochs``, ``initial_images``; the labels of a ``LabelRule``), each may be that
    of one rule. ``trajectory_matching_loss`` uses ``begin``, ``compared``, ``keep`` and ``distance``.

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

    def distance(self, student: Tensor, target: Tensor) -> Tensor | None:
        """Return how far the student is from the target after an inner step, a scalar; None to choose no step.

        Where a rule measures it, the student is unrolled only up to the step of the smallest distance, the later one of
        equal steps.

        Args:
            student: theta_i, (P,), detached.
            target: theta*_{t+m}, (P,).
        """
        return None

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

    def start_epochs(self, iteration: int, max_start_epoch: int) -> range | None:
        """Return the epochs that segments of an iteration may start at, each as likely; None for all.

        Args:
            iteration: from 0; the answer depends on nothing else, so that a resumed run is the same.
            max_start_epoch: all of them are below it.
        """
        return None

    def initial_images(self, candidates: Sequence[Tensor], ipc: int, teachers: Teachers) -> list[Tensor] | None:
        """Choose the real images to start from; None to take the first ones.

        Args:
            candidates: of each class all real images (M, C, H, W), in random order.
            ipc: how many of each class are needed.
            teachers: may be asked about images.

        Returns:
            Of each class (ipc,) indices into its candidates.
        """
        return None

    def accepts(self, loss: Tensor) -> Tensor | None:
        """Say whether the optimizer may step, a bool scalar on the device; None for yes.

        Args:
            loss: of the iteration, averaged over all of its segments on all ranks; a scalar.
        """
        return None

    def weights(self, images: Tensor, iteration: int) -> Tensor | None:
        """Return factors of the images' gradient, of a shape that broadcasts to (N, C, H, W); None for 1.

        Args:
            images: the synthetic images, (N, C, H, W), detached.
            iteration: from 0.
        """
        return None


class LabelRule(MatchingRule):
    """Where the labels of the synthetic images come from, if they are not the images' classes.

    Attributes:
        made: what a set records of its labels: "learned" or "teacher".
    """

    made: ClassVar[str] = ""

    def initial_logits(
        self, classes: Tensor, num_classes: int, answers: Callable[[], Iterable[Tensor]]
    ) -> Tensor | None:
        """Return the logits to start from, (N, K), where labels are learned; None where they are not.

        Args:
            classes: of the initial images, (N,) int64.
            num_classes: K.
            answers: returns the logits (N, K) that each of the teachers gives the initial images.
        """
        return None

    def optimizer_options(self) -> dict[str, float]:
        """Return the options of the parameter group that learned logits are in: "lr", "momentum"."""
        return {}

    def labels(self, logits: Tensor | None, answers: Callable[[], Tensor]) -> Tensor:
        """Return the labels of an iteration: probabilities (N, K), differentiable in learned logits.

        Args:
            logits: what is learned, (N, K); None where nothing is.
            answers: returns the logits (N, K) of the present synthetic images by the target's weights theta*_{t+m},
                detached, in training mode, not augmented. Where logits are learned, labels depend on these alone: a set
                is written without answers.
        """
        raise NotImplementedError


def having(rules: Sequence[MatchingRule], hook: str) -> list[MatchingRule]:
    """Return the rules that override a hook.

    Example:
        >>> having([MatchingRule()], "keep")
        []
    """
    return [rule for rule in rules if getattr(type(rule), hook) is not getattr(MatchingRule, hook)]


def only_one(rules: Sequence[MatchingRule], hook: str) -> MatchingRule | None:
    """Return the rule that overrides a hook which decides alone; None where there is none.

    Raises:
        InputError: for several.
    """
    return _single(having(rules, hook), hook)


def label_rule(rules: Sequence[MatchingRule]) -> LabelRule | None:
    """Return the rule that labels; None where labels are the images' classes.

    Raises:
        InputError: for several.
    """
    found = [rule for rule in rules if isinstance(rule, LabelRule)]
    _single(found, "labels")
    return found[0] if found else None


def check_together(rules: Sequence[MatchingRule]) -> None:
    """Refuse rules that decide the same thing.

    Raises:
        InputError: naming them.
    """
    for hook in ("distance", "start_epochs", "initial_images"):
        only_one(rules, hook)
    label_rule(rules)


def _single(rules: Sequence[MatchingRule], hook: str) -> MatchingRule | None:
    if len(rules) > 1:
        names = " and ".join(type(rule).__name__ for rule in rules)
        raise InputError(f"rules: {names} each decide {hook}: give one of them")
    return rules[0] if rules else None
