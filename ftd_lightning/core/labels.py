"""Labels of a synthetic set other than its classes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.data.coresets import estimate_running_statistics, logits_of
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.inner_step import student_logits
from ftd_lightning.functional.unroll import load_flat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ftd_lightning.files.trajectory_store import TrajectoryStore
    from ftd_lightning.rules.base import LabelRule


class RecordedTeachers:
    """The teachers of a store after their last recorded epoch, in evaluation mode; see ``rules.Teachers``.

    Args:
        store: the teachers.
        network: of their architecture; its weights are overwritten.
        real: training images (M, C, H, W) for the running statistics of BatchNorm layers, which trajectories lack.
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
            load_flat(self._network, self._store.weights(teacher).to(device))
            if batch_norms(self._network):  # else all of the training images would go to the device for nothing
                estimate_running_statistics(self._network, self._real.to(device))
            self._loaded = teacher
        return logits_of(self._network, images)

    def answers(self, images: Tensor) -> Iterator[Tensor]:
        """Classify images with every teacher in turn; (N, K) each."""
        return (self.logits(teacher, images) for teacher in range(len(self)))


class SetLabels(nn.Module):
    """Labels of a synthetic set, (N, K), that are learned, or given and not learned.

    The ``values`` are the initial ones where they are learned: a parameter then, else a buffer. ``options`` are of the
    optimizer's parameter group, ``metadata`` the set's entries about its labels.
    """

    values: nn.Parameter | Tensor

    def __init__(
        self, values: Tensor, *, learned: bool, options: Mapping[str, float], metadata: dict[str, Any]
    ) -> None:
        super().__init__()
        self.metadata, self._options, self.are_learned = metadata, dict(options), learned
        if learned:
            self.values = nn.Parameter(values.detach().clone(), requires_grad=options.get("lr", 1.0) > 0)
        else:
            self.register_buffer("values", values)

    def learned(self) -> dict[str, Tensor]:
        """Return the learned parameter as "labels"; empty where none is learned."""
        return {"labels": self.values} if self.are_learned else {}

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer; empty where nothing is learned."""
        return [{"params": [self.values], **self._options}] if self.are_learned else []

    def of_set(self) -> Tensor | None:
        """Return the labels of the set, (N, K); None where they are its classes."""
        return self.values

    def end_step(self, applied: Tensor) -> None:
        """Follow an optimizer step, which was made if ``applied``, a bool scalar."""


class StudentLabels(SetLabels):
    """Labels of a student's images, made by a rule of learned logits, or by teachers.

    The ``values``, (N, K), are learned logits, or initial labels that a teacher's replace after the first step.
    """

    def __init__(self, rule: LabelRule, values: Tensor, *, learned: bool) -> None:
        super().__init__(values, learned=learned, options=rule.optimizer_options(), metadata={"labels_made": rule.made})
        self._rule = rule
        self._latest: Tensor | None = None

    def of_set(self) -> Tensor:
        """Return the labels of the set, (N, K)."""
        return self.learned_labels() if self.are_learned else self.values

    def learned_labels(self) -> Tensor:
        """Return learned labels, (N, K), differentiable in the logits."""
        return self._rule.labels(self.values, self._no_answers)

    def of_segment(self, student: nn.Module, target: Tensor, images: Tensor) -> Tensor:
        """Return the labels of detached images (N, C, H, W) in a segment with a target theta*_{t+m}, (P,): (N, K)."""
        answers = torch.no_grad()(partial(student_logits, student, target, images))
        labels = self._rule.labels(self.values if self.are_learned else None, answers)
        if self._latest is None:  # the set takes those of an iteration's first segment
            self._latest = labels.detach()
        return labels

    @torch.no_grad()
    def end_step(self, applied: Tensor) -> None:
        """Store the teacher's labels of this iteration, if its step was made."""
        if not self.are_learned and self._latest is not None:
            self.values.copy_(torch.where(applied, self._latest, self.values))
        self._latest = None

    def _no_answers(self) -> Tensor:
        raise RuntimeError(f"{type(self._rule).__name__}: labels that are learned may not depend on teachers")
