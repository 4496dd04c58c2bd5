"""Skip bad optimizer steps on the device, without synchronising."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftd_lightning.errors import DivergenceError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

MAX_SKIPPED = 10
MAX_GATED = 100


class StepGuard:
    """Skips steps: parameters and momentum stay as they were, bit for bit.

    A step is skipped where loss or gradient is not finite, and gated where it is finite but not accepted. Either is
    known on the device alone. The fused optimizers of torch read ``found_inf`` there, so nothing is copied or undone.

    Attributes:
        skipped: number of steps that were not finite; like all counts, an int64 scalar on the device.
        in_a_row: skipped steps since the last finite one.
        gated: number of finite steps that were not accepted.
        gated_in_a_row: gated steps since the last other one.
        still_in_a_row: steps with a gradient of zero since the last other one; not in checkpoints.
        gates: whether rules decide on steps.
        applied: whether the present step is made, a bool scalar on the device.
    """

    def __init__(self) -> None:
        self.skipped, self.in_a_row, self.gated, self.gated_in_a_row = (torch.tensor(0) for _ in range(4))
        self.applied = self._finite = torch.tensor(True)
        self._still, self.still_in_a_row = torch.tensor(False), torch.tensor(0)
        self.gates = False

    @torch.no_grad()
    def before(
        self,
        optimizer: Optimizer,
        values: Sequence[Tensor],
        *,
        accepted: Tensor | None = None,
        still: Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda flag: flag,
    ) -> None:
        """Judge a step that the optimizer is about to make, and tell it.

        Args:
            optimizer: steps next, by its fused form: SGD, Adam, AdamW or Adagrad of torch.
            values: scalars that all have to be finite: the loss, norms of the gradients.
            accepted: a bool scalar, the same on all ranks; None accepts.
            still: a bool scalar: whether the gradient is exactly zero; None: it is not.
            reduce: the minimum over all ranks: they skip together, or their weights would drift apart.
        """
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        self._finite = reduce(finite.float()) > 0
        self._still = torch.zeros_like(finite) if still is None else still
        self.gates = accepted is not None
        self.applied = self._finite if accepted is None else self._finite & accepted
        for group in optimizer.param_groups:
            if "fused" not in group:
                raise InputError(
                    f"{type(optimizer).__name__} cannot skip a step on the device: use SGD, Adam, AdamW or Adagrad of "
                    "torch.optim"
                )
            group["fused"] = True  # checkpoints of 0.4 say otherwise
            for parameter in group["params"] if group.get("momentum") else ():
                state = optimizer.state[parameter]
                # A momentum that is created in a skipped step would hold whatever was in its memory.
                if parameter.grad is not None and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
        optimizer.found_inf = (~self.applied).float()  # type: ignore[attr-defined]

    @torch.no_grad()
    def after(self) -> None:
        """Count the step."""
        skip, gate = (~self._finite).long(), (self._finite & ~self.applied).long()
        self.skipped = self.skipped + skip
        self.in_a_row = (self.in_a_row + 1) * skip
        self.gated = self.gated + gate
        self.gated_in_a_row = (self.gated_in_a_row + 1) * gate
        self.still_in_a_row = (self.still_in_a_row + 1) * self._still

    def check(self, iteration: int) -> None:
        """Stop a run that only diverges, or whose gradient is zero, after an iteration; waits for the device."""
        if int(self.still_in_a_row) >= MAX_SKIPPED:
            raise InputError(
                f"the images' gradient was exactly zero {int(self.still_in_a_row)} iterations in a row, the last one "
                f"{iteration}: the network lets no gradient through; remove no_grad, detach and frozen layers from it"
            )
        if int(self.in_a_row) >= MAX_SKIPPED:
            raise DivergenceError(
                f"loss or gradient not finite {int(self.in_a_row)} iterations in a row, the last one {iteration}; the "
                "images on disk are those before; lower the learning rates"
            )
        if int(self.gated_in_a_row) >= MAX_GATED:
            raise DivergenceError(
                f"the loss was above a rule's threshold {int(self.gated_in_a_row)} iterations in a row, the last one "
                f"{iteration}: nothing is learned; raise the threshold or match shorter segments"
            )

    def state(self) -> tuple[int, ...]:
        """Return the counts, for a checkpoint."""
        return int(self.skipped), int(self.in_a_row), int(self.gated), int(self.gated_in_a_row)

    def load(self, state: Sequence[int]) -> None:
        """Restore the counts of a checkpoint."""
        self.skipped, self.in_a_row, self.gated, self.gated_in_a_row = (torch.tensor(count) for count in state)
