"""The unrolled student that trajectory matching and bilevel distillation differentiate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftd_lightning.functional.matching import chunked_permutations

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftd_lightning.functional.compiling import Compile


class InnerLoop:
    """A student's training on the synthetic set: its network, its mini-batches, and whether its steps are compiled.

    Not a submodule: the student's weights are neither in checkpoints nor among DDP's parameters.

    Args:
        network: of the student's architecture; its own weights are not used.
        steps: inner steps.
        batch_size: synthetic images per step; None takes all of them.
        compile: see ``functional.compiling``.
    """

    def __init__(self, network: nn.Module, steps: int, batch_size: int | None, compile: Compile) -> None:  # noqa: A002
        self.network = network.requires_grad_(False).train()
        self.steps, self.batch_size = steps, batch_size
        self.compile: Compile = compile

    def batches(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Draw the mini-batches of all steps: one index tensor into ``count`` images for each."""
        return chunked_permutations(count, self.steps, generator, batch_size=self.batch_size)
