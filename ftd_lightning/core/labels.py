"""Labels of the images in an unrolled student."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ftd_lightning.data.coresets import estimate_running_statistics, logits_of
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.inner_step import student_logits
from ftd_lightning.functional.unroll import load_flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ftd_lightning.files.trajectory_store import TrajectoryStore
    from ftd_lightning.rules.base import LabelRule


class StoreTeachers:
    """The teachers of a store after their last recorded epoch, in evaluation mode; see ``functional.Teachers``.

    Args:
        store: the teachers.
        network: of their architecture; its weights are overwritten.
        real: training images (M, C, H, W), of which the running statistics of BatchNorm layers are taken: trajectories
            hold none.
    """

    def __init__(self, store: TrajectoryStore, network: nn.Module, real: Tensor) -> None:
        self._store, self._network, self._real = store, network.eval(), real
        self._loaded: int | None = None

    def __len__(self) -> int:
        return len(self._store)

    @torch.no_grad()
    def logits(self, teacher: int, images: Tensor) -> Tensor:
        """Classify images (N, C, H, W) with a teacher; (N, K), on the images' device."""
        device = next(self._network.parameters()).device
        if teacher != self._loaded:
            load_flat(self._network, self._store.trained(teacher).to(device))
            if batch_norms(self._network):  # else all of the training images would go to the device for nothing
                estimate_running_statistics(self._network, self._real.to(device))
            self._loaded = teacher
        return logits_of(self._network, images)

    def answers(self, images: Tensor) -> Iterator[Tensor]:
        """Classify images with every teacher in turn; (N, K) each."""
        return (self.logits(teacher, images) for teacher in range(len(self)))


class InnerLabels(nn.Module):
    """Labels as a rule makes them: learned ones are a parameter, those that teachers give a buffer.

    Args:
        rule: makes them.
        logits: what is learned, at the start, (N, K); None where nothing is.
        given: what the set holds until teachers have said something, (N, K); None where labels are learned.

    Attributes:
        logits: (N, K) parameter, or None.
        given: (N, K) buffer, or None.
    """

    logits: nn.Parameter | None
    given: Tensor | None

    def __init__(self, rule: LabelRule, logits: Tensor | None, given: Tensor | None) -> None:
        super().__init__()
        self._rule = rule
        self.logits = None if logits is None else nn.Parameter(logits.detach().clone())
        self.register_buffer("given", given)
        self._latest: Tensor | None = None

    @classmethod
    def start(
        cls, rule: LabelRule, classes: Tensor, num_classes: int, answers: Callable[[], Iterable[Tensor]]
    ) -> InnerLabels:
        """Ask a rule where to start; see ``LabelRule.initial_logits`` for the arguments."""
        logits = rule.initial_logits(classes, num_classes, answers)
        return cls(rule, logits, one_hot(classes, num_classes).float() if logits is None else None)

    @classmethod
    def empty(cls, rule: LabelRule, shapes: Mapping[str, torch.Size], prefix: str) -> InnerLabels:
        """Make room for the labels of a checkpoint with such tensors."""
        sizes = [shapes.get(f"{prefix}{name}") for name in ("logits", "given")]
        logits, given = (None if size is None else torch.zeros(size) for size in sizes)
        return cls(rule, logits, given)

    @property
    def made(self) -> str:
        """How they are made, as a set records it."""
        return self._rule.made

    def learned_labels(self) -> Tensor:
        """Return what is learned as labels, (N, K), differentiable in the logits."""
        return self._rule.labels(self.logits, self._no_answers)

    def group(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter group of what is learned, in a list; nothing where nothing is."""
        return [] if self.logits is None else [{"params": [self.logits], **self._rule.optimizer_options()}]

    def learned(self) -> dict[str, Tensor]:
        """Return what is learned, by name."""
        return {} if self.logits is None else {"labels": self.logits}

    def of_segment(self, student: nn.Module, target: Tensor, images: Tensor) -> Tensor:
        """Return the labels of a segment's student, (N, K).

        Args:
            student: the network, in training mode.
            target: theta*_{t+m}, (P,).
            images: the synthetic images, (N, C, H, W), detached.
        """
        answers = torch.no_grad()(partial(student_logits, student, target, images))
        labels = self._rule.labels(self.logits, answers)
        if self._latest is None:  # the set takes those of an iteration's first segment
            self._latest = labels.detach()
        return labels

    @torch.no_grad()
    def keep(self, applied: Tensor) -> None:
        """Keep what the teacher said in this iteration, if its step was made."""
        if self.given is not None and self._latest is not None:
            self.given.copy_(torch.where(applied, self._latest, self.given))
        self._latest = None

    def of_set(self) -> Tensor:
        """Return the labels of the set, (N, K)."""
        if self.given is not None:
            return self.given
        return self.learned_labels()

    def _no_answers(self) -> Tensor:
        raise RuntimeError(f"{type(self._rule).__name__}: labels that are learned may not depend on teachers")
