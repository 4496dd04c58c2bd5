"""Seeds derived from what the randomness is for, so that a resumed run draws what an uninterrupted one draws."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def derive_seed(*keys: int | str) -> int:
    """Hash a sequence of keys to a seed; the same keys give the same seed on every machine and in every version.

    Args:
        keys: what the randomness is for, e.g. ``(seed, "dsa", iteration, rank)``.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> derive_seed(0, "teacher", 1) == derive_seed(0, "teacher", 1)
        True
        >>> derive_seed(0, "teacher", 1) == derive_seed(0, "teacher", 2)
        False
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*keys: int | str) -> torch.Generator:
    """Build a CPU generator seeded by :func:`derive_seed`.

    Convention: always on the CPU, so that choosing an augmentation needs no device synchronisation and a GPU run draws
    the same augmentations as a CPU run.

    Example:
        >>> bool(torch.rand(3, generator=make_generator(0)).equal(torch.rand(3, generator=make_generator(0))))
        True
    """
    return torch.Generator().manual_seed(derive_seed(*keys))


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator inside a ``with`` block and restore its state afterwards.

    Meant for code that draws from the global generator and takes no other, such as the initialisation of a network.

    Example:
        >>> with seeded(0, "net"):
        ...     a = torch.nn.Linear(2, 2).weight
        >>> with seeded(0, "net"):
        ...     b = torch.nn.Linear(2, 2).weight
        >>> bool(a.equal(b))
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*keys))
        yield
