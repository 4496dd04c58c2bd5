"""Trees of image folders: which files are images, what is skipped, and where links may lead."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHOWN_ENDINGS = 5
OTHER = "other file"


class Part(NamedTuple):
    """The files of one part of a data set and their labels, in order."""

    files: list[Path]
    labels: list[int]


@contextmanager
def told_what_is_unreadable() -> Iterator[None]:
    """Turn what the operating system refuses to read into an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); mend that, or remove it") from error


@cache
def _announce(line: str) -> None:
    rank_zero_info(line)


def _refuse(link: Path, problem: str) -> NoReturn:
    raise InputError(f"{link}: a link that leads {problem}; put the files themselves there, or remove the link")


class ImageTree:
    """The images below one folder, where every folder is read once.

    Links are followed within the tree. A link out of it, up in it, or to a folder that is read anyway is refused: it
    would add images under labels that are not theirs, or test images to the training part. ``root`` itself may be one.

    Args:
        root: no link leads out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = Path(os.path.realpath(root))
        self._read: dict[Path, Path] = {}  # folders, without links: the paths by which they were reached
        self._skipped: dict[str, str] = {}  # paths: what they are, in words

    def images(self, folder: Path) -> list[Path]:
        """List the images in a folder and the folders below it, sorted.

        Raises:
            InputError: for a link that leads elsewhere, or what cannot be read, naming the path.
        """
        found: list[Path] = []
        remaining = [folder]
        with told_what_is_unreadable():
            while remaining:
                here = remaining.pop()
                self._enter(here)
                with os.scandir(here) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        kind = _skipped_as(entry)
                        if kind:
                            self._skipped[entry.path] = kind
                        elif entry.is_dir():
                            remaining.append(here / entry.name)
                        else:
                            if entry.is_symlink():
                                self._inside(here / entry.name)
                            found.append(here / entry.name)
        return sorted(found)

    def part(self, folders: Sequence[Path]) -> Part:
        """List the images of classes, each in a folder of its own, in label order.

        Raises:
            InputError: for a class that is missing or has no images, or as for :meth:`images`.
        """
        files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder; the images of one class belong there")
            images = self.images(folder)
            if not images:
                endings = ", ".join(IMG_EXTENSIONS)
                raise InputError(f"{folder}: holds no images ({endings}); add some, or remove the folder")
            files += images
            labels += [label] * len(images)
        return Part(files, labels)

    def tell_what_is_skipped(self) -> None:
        """Log what was skipped, counted by kind; a line that was logged before is not repeated."""
        counts = Counter(self._skipped.values())
        if counts:
            endings = sorted({Path(path).suffix or "none" for path, kind in self._skipped.items() if kind == OTHER})
            more = [*endings[:SHOWN_ENDINGS], "..."] if len(endings) > SHOWN_ENDINGS else endings
            kinds = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(counts.items())]
            told = f" (endings: {', '.join(more)})" if more else ""
            _announce(f"{self.root}: skipped {', '.join(kinds)}{told}")

    def _enter(self, folder: Path) -> None:
        """Refuse a folder reached by a link which leads out of the tree, up in it, or to what is read anyway."""
        real = self._inside(folder)
        if folder.is_symlink() and Path(os.path.realpath(folder.parent)).is_relative_to(real):
            _refuse(folder, f"up to {real}, which contains it")
        before = self._read.setdefault(real, folder)
        if before != folder:
            link, other = (folder, before) if self._is_linked(folder) else (before, folder)
            _refuse(self._link(link), f"to images that are also read from {other}")

    def _inside(self, path: Path) -> Path:
        """Return where a path leads, without links; refuse what is outside."""
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self._real):
            _refuse(self._link(path), f"out of {self.root}, to {real}")
        return real

    def _is_linked(self, path: Path) -> bool:
        return self._link(path).is_symlink()

    def _link(self, path: Path) -> Path:
        """Find the link by which a path leads elsewhere: the first one on the way from the root."""
        between = [place for place in (path, *path.parents) if place.is_relative_to(self.root) and place != self.root]
        return next((place for place in reversed(between) if place.is_symlink()), path)


def _skipped_as(entry: os.DirEntry[str]) -> str | None:
    """Say as what an entry of a folder is skipped; None for images and folders."""
    is_folder = entry.is_dir()
    if entry.name.startswith("."):
        return "hidden folder" if is_folder else "hidden file"
    if is_folder:
        return None
    if entry.name.lower().endswith(".gif"):
        return "GIF"
    # Opening a pipe would wait for ever; a link that leads nowhere is kept, to be refused.
    is_special = not entry.is_file() and Path(entry.path).exists()
    return OTHER if is_special or not entry.name.lower().endswith(IMG_EXTENSIONS) else None
