"""One pass of a teacher over a batch: loss, logits and gradients, eagerly or by one compiled function."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ftd_lightning.functional.compiling import Compile, compiled, compiles, seconds_compiling
from ftd_lightning.optim import frozen_running_statistics
from ftd_lightning.training.compile_choice import CompileNotice
from ftd_lightning.training.side_by_side import loss_and_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class TeacherPass:
    """Computes a network's loss and logits, and puts gradients in place.

    Compiled, forward and backward pass are one function of the weights. A batch of another size than the full one, the
    last of an epoch, would be compiled for itself, and is passed eagerly. The first compiled pass says how long
    compilation took.

    Args:
        network: on its device, in training mode.
        compile: True, False, "auto" (on a GPU only) or "cuda_graphs".
        device: of the network.
        full_batch: images of a full batch; None takes the first batch as full.
    """

    def __init__(
        self,
        network: nn.Module,
        compile: Compile,  # noqa: A002
        device: torch.device,
        full_batch: int | None = None,
    ) -> None:
        self.network = network
        self.full_batch = full_batch
        self._compiles = compiles(compile, device)
        self._run = compiled(loss_and_gradients, compile=compile, device=device)
        self._notice = CompileNotice("the teacher's pass")

    @property
    def compile_seconds(self) -> float:
        """Seconds that compilation took so far."""
        return seconds_compiling(self._run)

    def __call__(
        self, images: Tensor, labels: Tensor, *, perturbed: bool, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Pass a batch, and set the gradients of all weights.

        Args:
            images: (N, C, H, W).
            labels: (N,) or (N, K).
            perturbed: at the worst point of GSAM's ball, whose running statistics belong to no network.
            backward: runs the backward pass of a loss, eagerly.

        Returns:
            The loss, a scalar, and the logits (N, K), both detached.
        """
        if self.full_batch is None:
            self.full_batch = len(labels)
        if not self._compiles or len(labels) != self.full_batch:
            with frozen_running_statistics(self.network) if perturbed else nullcontext():
                logits = self.network(images)
                loss = cross_entropy(logits, labels)
            backward(loss)
            return loss.detach(), logits.detach()
        weights = [p for p in self.network.parameters() if p.requires_grad]
        with torch.no_grad():
            loss, logits, *results = self._run(self.network, images, labels, *weights)
            self._notice(self.compile_seconds)
            for weight, gradient in zip(weights, results, strict=False):
                weight.grad = gradient
            if not perturbed:
                for buffer, value in zip(self.network.buffers(), results[len(weights) :], strict=True):
                    buffer.copy_(value)
        return loss, logits
