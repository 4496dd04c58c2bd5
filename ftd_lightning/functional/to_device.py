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
    """Move a network in place, its floating-point tensors cast, by way of pinned memory; returns it."""
    if device.type == "cuda":
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.pin_memory()
    return network.to(device, dtype, non_blocking=True)
