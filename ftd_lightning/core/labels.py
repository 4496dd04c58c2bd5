"""Labels of a synthetic set other than its classes: those of an unrolled student, and targets of ridge regression."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ftd_lightning.data.coresets import estimate_running_statistics, logits_of
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.inner_step import student_logits
from ftd_lightning.functional.kernels import centred_targets
from ftd_lightning.functional.unroll import load_flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ftd_lightning.files.trajectory_store import TrajectoryStore
    from ftd_lightning.rules.base import LabelRule


class RecordedTeachers:
    """The teachers of a store after their last recorded epoch, in evaluation mode; see ``rules.Teachers``.

    Args:
        store: the teachers.
        network: of their architecture; its weights are overwritten.
        real: training images (M, C, H, W), from which the running statistics of BatchNorm layers are estimated:
            trajectories hold none.
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


class SetLabels(nn.Module):
    """Labels of a synthetic set that are learned, or that teachers give."""

    def of_set(self) -> Tensor | None:
        """Return the labels of the set, (N, K); None where they are its classes."""
        raise NotImplementedError

    def learned(self) -> dict[str, Tensor]:
        """Return the learned parameter as "labels"; empty where none is learned."""
        return {}

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer; empty where nothing is learned."""
        return []

    def metadata(self) -> dict[str, Any]:
        """Return what a set records of its labels."""
        return {}

    def end_step(self, applied: Tensor) -> None:
        """Follow an optimizer step.

        Args:
            applied: whether the step was made, a bool scalar.
        """


class StudentLabels(SetLabels):
    """Labels of a student's images, made by a rule: learned ones are a parameter, those of teachers a buffer.

    Args:
        rule: makes them.
        logits: initial learned logits, (N, K); None where nothing is learned.
        given: initial labels of the set, (N, K), replaced by a teacher's after the first step; None where labels are
            learned.

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
    ) -> StudentLabels:
        """Ask a rule where to start; see ``LabelRule.initial_logits`` for the arguments."""
        logits = rule.initial_logits(classes, num_classes, answers)
        return cls(rule, logits, one_hot(classes, num_classes).float() if logits is None else None)

    @classmethod
    def empty(cls, rule: LabelRule, shapes: Mapping[str, torch.Size], prefix: str) -> StudentLabels:
        """Make room for the labels of a checkpoint with such tensors."""
        sizes = [shapes.get(f"{prefix}{name}") for name in ("logits", "given")]
        logits, given = (None if size is None else torch.zeros(size) for size in sizes)
        return cls(rule, logits, given)

    def of_set(self) -> Tensor:
        """Return the labels of the set, (N, K)."""
        return self.learned_labels() if self.given is None else self.given

    def learned_labels(self) -> Tensor:
        """Return learned labels, (N, K), differentiable in the logits."""
        return self._rule.labels(self.logits, self._no_answers)

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

    def learned(self) -> dict[str, Tensor]:
        """Return the logits as "labels", where they are learned."""
        return {} if self.logits is None else {"labels": self.logits}

    def groups(self) -> list[dict[str, Any]]:
        """Return the logits' parameter group with the rule's options."""
        return [] if self.logits is None else [{"params": [self.logits], **self._rule.optimizer_options()}]

    def metadata(self) -> dict[str, Any]:
        """Return how the labels are made."""
        return {"labels_made": self._rule.made}

    @torch.no_grad()
    def end_step(self, applied: Tensor) -> None:
        """Store the teacher's labels of this iteration, if its step was made."""
        if self.given is not None and self._latest is not None:
            self.given.copy_(torch.where(applied, self._latest, self.given))
        self._latest = None

    def _no_answers(self) -> Tensor:
        raise RuntimeError(f"{type(self._rule).__name__}: labels that are learned may not depend on teachers")


class RidgeTargets(SetLabels):
    """Targets (N, K) that ridge regression is fitted to: learned ones are a parameter, centred one-hot ones a buffer.

    Args:
        classes: of the images, (N,) int64.
        num_classes: K.
        scale: factor of the centred one-hot vectors.
        learned: whether they are learned.
        lr: learning rate of learned targets.

    Attributes:
        values: (N, K).
        scale: the argument.
    """

    values: nn.Parameter | Tensor

    def __init__(self, classes: Tensor, num_classes: int, *, scale: float, learned: bool, lr: float) -> None:
        super().__init__()
        self.scale, self._num_classes, self._learned, self._lr = scale, num_classes, learned, lr
        start = self.of_classes(classes)
        if learned:
            self.values = nn.Parameter(start, requires_grad=lr > 0)
        else:
            self.register_buffer("values", start)

    def of_classes(self, classes: Tensor) -> Tensor:
        """Return the targets of real images, (M, K) for classes (M,)."""
        return centred_targets(classes, self._num_classes, scale=self.scale)

    def of_set(self) -> Tensor | None:
        """Return learned targets, (N, K)."""
        return self.values if self._learned else None

    def learned(self) -> dict[str, Tensor]:
        """Return the targets as "labels", where they are learned."""
        return {"labels": self.values} if self._learned else {}

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter group of learned targets."""
        return [{"params": [self.values], "lr": self._lr}] if self._learned else []

    def metadata(self) -> dict[str, Any]:
        """Return the scale, and that labels are learned targets."""
        kind = {"label_kind": "target", "labels_made": "learned"} if self._learned else {}
        return {"target_scale": self.scale, **kind}
