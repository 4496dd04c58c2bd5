"""Optimizer steps that are not finite, undone where the tensors lie: the host never waits to learn of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

MAX_SKIPPED = 10


class FiniteSteps:
    """Skips steps: parameters and momentum stay as they were, bit for bit, where loss or gradient is not finite.

    A skip is known on the device alone, so it is a choice between two tensors, not a branch of the program.

    Attributes:
        skipped: number of skipped steps, an int64 scalar on the device.
        in_a_row: number of them since the last good one, likewise.
        finite: whether the present step is good, a bool scalar on the device.
    """

    def __init__(self) -> None:
        self.skipped, self.in_a_row = torch.tensor(0), torch.tensor(0)
        self.finite = torch.tensor(True)
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(
        self, optimizer: Optimizer, values: Sequence[Tensor], *, reduce: Callable[[Tensor], Tensor] = lambda flag: flag
    ) -> None:
        """Judge a step, and remember what it is going to change.

        Args:
            optimizer: about to step.
            values: scalars that all have to be finite: the loss, norms of the gradients.
            reduce: the minimum over all ranks: they skip together, or their weights would drift apart.
        """
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        self.finite = reduce(finite.float()) > 0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._before = [(p, p.detach().clone()) for p in parameters]
        for state in optimizer.state.values():
            self._before += [(v, v.clone()) for v in state.values() if isinstance(v, torch.Tensor)]

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        """Undo the step where it was not good, and count."""
        for tensor, before in self._before:
            tensor.copy_(torch.where(self.finite, tensor, before))
        known = {id(tensor) for tensor, _ in self._before}
        for state in optimizer.state.values():
            # Momentum that this step made: as if there had been none yet.
            for value in state.values():
                if isinstance(value, torch.Tensor) and id(value) not in known:
                    value.copy_(torch.where(self.finite, value, torch.zeros_like(value)))
        self._before = []
        skip = (~self.finite).long()
        self.skipped = self.skipped.to(skip.device) + skip
        self.in_a_row = (self.in_a_row.to(skip.device) + 1) * skip

    def state(self) -> tuple[int, int]:
        """Return both counts, for a checkpoint."""
        return int(self.skipped), int(self.in_a_row)

    def load(self, state: tuple[int, int]) -> None:
        """Take them up again."""
        self.skipped, self.in_a_row = (torch.tensor(value) for value in state)
