"""Where files lie that are made once from a data set and read by later runs: decoded images and whitenings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info


def user_cache() -> Path:
    """Return this library's folder in the user's cache, by ``XDG_CACHE_HOME`` or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftd_lightning"


def is_writable(folder: Path) -> bool:
    """Tell whether files can be made in a folder, or the folder itself where it does not exist."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@cache
def _announce(folder: Path, reason: str) -> None:
    rank_zero_info(f"caches of images go to {folder}, because {reason}; set data.cache_dir for another folder")


@dataclass(frozen=True)
class CacheFolder:
    """The folder of the caches of a data set.

    Attributes:
        root: folder of the data set's files, which takes the caches by default; None for data that is not in files.
        cache_dir: takes them instead, where given.
        makes_root: whether a root that does not exist is going to be made, because something is downloaded there.
    """

    root: Path | None
    cache_dir: Path | None = None
    makes_root: bool = True

    def file(self, folder: str, name: str) -> Path:
        """Return the path of a cache, which may not exist yet.

        Without ``cache_dir`` it lies under root; where root cannot be written to and does not contain it, in the user's
        cache folder, which is logged once.
        """
        if self.cache_dir is not None:
            return self.cache_dir / folder / name
        if self.root is not None:
            path = self.root / folder / name
            if path.is_file():
                return path
            if is_writable(self.root) and (self.makes_root or self.root.is_dir()):
                return path
        reason = "the images are not in files" if self.root is None else f"{self.root} cannot be written to"
        if self.root is not None and not self.root.exists():
            reason = f"there is no folder {self.root}"
        _announce(user_cache(), reason)
        return user_cache() / folder / name
