"""Where files lie that are made once from a data set and read by later runs: decoded images and whitenings."""

from __future__ import annotations

import os
from pathlib import Path

from ftd_lightning.errors import InputError


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return ``cache_dir``, or this library's folder in the user's cache, ``XDG_CACHE_HOME`` or ``~/.cache``.

    Never the folder of the images: other readers of that folder would take a cache for a class.
    """
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ftd_lightning"
    return Path(folder).expanduser()


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse work that takes more memory than the machine has.

    Args:
        needed: bytes.
        what: the work, for the message.
        remedy: a way out, for the message.

    Raises:
        InputError: if it does. Nothing is checked on Windows, which does not report its memory this way.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise InputError(
            f"{what} takes {needed / 2**30:,.0f} GiB of memory, this machine has {memory / 2**30:,.0f}: {remedy}"
        )
