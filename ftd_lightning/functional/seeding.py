"""Random numbers by purpose, and copies to a device that do not wait."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


def derive_seed(*keys: int | str) -> int:
    """Hash a sequence of keys to a seed; the same keys give the same seed on every machine and in every version.

    Args:
        keys: purpose of the random numbers, e.g. ``(seed, "dsa", iteration, rank)``.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*keys: int | str) -> torch.Generator:
    """Build a CPU generator seeded by :func:`derive_seed`: its draws are the same for all devices, without waiting."""
    return torch.Generator().manual_seed(derive_seed(*keys))


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator inside a ``with`` block, for code that takes none, and restore its state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*keys))
        yield


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor to a device, and cast it to ``dtype``, without waiting; to a GPU through pinned memory."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=True)


def network_to_device(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network in place and cast its floating-point tensors, through pinned memory; return it."""
    if device.type == "cuda":
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.pin_memory()
    return network.to(device, dtype, non_blocking=True)
