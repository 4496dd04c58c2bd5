"""What distillations through an unrolled student share: the student, a learned step size, compiled inner steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftd_lightning.core.module import MATCHING, steps_left
from ftd_lightning.modules.distillation import Distillation

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from ftd_lightning.functional.compiling import Compile


# Far below any step size that trains a network, far above float32's smallest number.
SMALLEST_STEP_SIZE = 1e-8


class StudentDistillation(Distillation):
    """The base of methods that differentiate a student's training on the set.

    Its subclasses' hyper-parameters include ``syn_steps``, ``syn_batch``, ``compile`` and ``iterations_per_epoch``;
    they call :meth:`make_student` when they build, and :meth:`choose_inner_compile` when a fit starts.

    The step size is kept positive by projection: after an update it is raised to 1e-8 where it fell below. It stays a
    plain parameter, so a paper's learning rate for it means what it means there; a log or softplus parametrisation
    would rescale it.
    """

    step_size: nn.Parameter

    def make_student(self) -> None:
        """Build a network of the architecture, whose own weights are not used."""
        # In a list: no submodule, so neither in checkpoints nor among DDP's parameters.
        self._student = [self.fresh.architecture().requires_grad_(False).train()]

    @property
    def student(self) -> nn.Module:
        """The student, in training mode."""
        return self._student[0]

    def on_fit_start(self) -> None:
        """Move the student to the device."""
        super().on_fit_start()
        self.student.to(self.device, self.images.dtype)

    def choose_inner_compile(self, students: int) -> Compile:
        """Decide on compiling inner steps by the iterations that the trainer's limits allow.

        Args:
            students: per iteration on this rank.
        """
        hparams, done = self.hparams, (self._first_step, self._first_epoch)
        steps = steps_left(self.trainer, *done, steps_per_epoch=hparams["iterations_per_epoch"])
        batch = min(hparams["syn_batch"] or len(self.images), len(self.images))
        # A gradient costs as much as three forward passes, its adjoint three times that: four passes of training.
        passes = 4 * batch * hparams["syn_steps"] * students * steps
        values = batch * self.images[0].numel()
        return self.choose_compile(hparams["compile"], MATCHING, steps=steps, images=passes, batch_values=values)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, then project the step size to be positive."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.step_size.clamp_(min=SMALLEST_STEP_SIZE)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step size, the mean of several."""
        self.log("matching/step_size", self.step_size.detach().mean(), prog_bar=True, batch_size=1)
        super().on_train_batch_end(outputs, batch, batch_idx)
