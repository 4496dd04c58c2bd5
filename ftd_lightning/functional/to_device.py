"""Copies from the host that it does not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor, and cast it; from the host to a GPU by way of pinned memory, while the host goes on.

    Args:
        tensor: of any shape and dtype, on any device.
        device: where it shall be.
        dtype: None keeps the tensor's.

    Returns:
        The tensor itself where nothing changes.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=True)


def network_to_device(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network in place as :func:`to_device` moves a tensor, and cast its floating-point tensors; returns it."""

    def moved(tensor: Tensor) -> Tensor:
        return to_device(tensor, device, dtype if tensor.is_floating_point() else None)

    return network._apply(moved)  # as Module.to does, which copies from memory that is not pinned
