"""The mini-batches of the inner loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def chunked_permutations(
    num_images: int, num_steps: int, generator: torch.Generator, *, batch_size: int | None = None
) -> list[Tensor]:
    """Draw the mini-batches of the inner steps: a random permutation split into chunks, drawn anew when used up.

    Args:
        num_images: N, size of the synthetic set.
        num_steps: n, number of inner steps.
        generator: decides the permutations; a CPU generator.
        batch_size: images per step; None or >= N means all of them at every step. The last chunk of a permutation is
            smaller where N is not a multiple of it.

    Returns:
        n int64 index tensors.

    Raises:
        ValueError: for a batch size below 1.

    Example:
        >>> [len(b) for b in chunked_permutations(5, 4, torch.Generator(), batch_size=2)]
        [2, 2, 1, 2]
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if batch_size is None or batch_size >= num_images:
        return [torch.arange(num_images)] * num_steps

    def chunks() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(num_images, generator=generator).split(batch_size)

    return [chunk for _, chunk in zip(range(num_steps), chunks(), strict=False)]
