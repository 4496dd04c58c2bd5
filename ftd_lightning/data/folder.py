"""Image folders: one subfolder per class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from ftd_lightning.data.decoding import (
    SIDEWAYS,
    DecodedImages,
    cache_file,
    in_parallel,
    is_deep,
    is_grey,
    opened,
    turn_of,
)
from ftd_lightning.data.sources import Census, ImageDataset, Part, Request
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from PIL import ImageFile
    from torch import Tensor


SHOWN_ENDINGS = 5
OTHER = "other file"


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


PARTS = ("train", "val", "test")  # folders of parts under root; where there are none, the folders there are classes


def _class_folders(folder: Path) -> list[Path]:
    """The folders of classes, sorted, without hidden ones."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; put the images of each class into a folder of its own there")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise InputError(
            f"{folder}: {len(classes)} folders of classes here, at least 2 are needed; put images into "
            "train/<class>/ and test/<class>/ (and val/<class>/, to hold them out), or into <class>/, under data.root"
        )
    return classes


def _split(part: Part, folders: Sequence[Path], fraction: float) -> tuple[Part, Part]:
    """Cut off the test part, the same share of every class, at least one image.

    A hash of each file's name decides which ones, not a seed: the test images of one run must not be among the training
    images of another. A new image moves at most one other of its class into the test part or out of it.
    """
    train, test = Part([], []), Part([], [])
    for label, folder in enumerate(folders):
        files = [file for file, of in zip(part.files, part.labels, strict=True) if of == label]
        if len(files) < 2:
            raise InputError(f"{folder}: holds one image, one to train and one to test are needed at least")
        count = min(max(round(fraction * len(files)), 1), len(files) - 1)
        chosen = set(sorted(files, key=partial(_drawn, folder.parent))[:count])
        for file in files:
            to = test if file in chosen else train
            to.files.append(file)
            to.labels.append(label)
    return train, test


def _drawn(root: Path, file: Path) -> bytes:
    return hashlib.blake2b(os.fsencode(file.relative_to(root).as_posix())).digest()


def _parts(root: Path, fraction: float) -> tuple[tuple[str, ...], dict[str, Part]]:
    """The names of the classes, and the parts: "train", "test" and, if all three have folders, "val"."""
    tree = ImageTree(root)
    there = [name for name in PARTS if (root / name).is_dir()]
    if not there:
        classes = _class_folders(root)
        train, test = _split(tree.part(classes), classes, fraction)
        tree.tell_what_is_skipped()
        return tuple(path.name for path in classes), {"train": train, "test": test}
    if len(there) == 1 or "train" not in there:
        missing = "no val/ or test/" if there == ["train"] else "no train/"
        raise InputError(
            f"{root}: holds {' and '.join(f'{name}/' for name in there)} but {missing}; add it, or set data.root to a "
            "folder of classes, of which the share data.test_fraction becomes the test part"
        )
    folders = {name: _class_folders(root / name) for name in there}
    for here, other in permutations(there, 2):
        names = {path.name for path in folders[other]}
        for path in folders[here]:
            if path.name not in names:
                raise InputError(f"{root / other / path.name}: no such folder, but there is {path}")
    parts = {name: tree.part(classes) for name, classes in folders.items()}
    tree.tell_what_is_skipped()
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    return tuple(path.name for path in folders["train"]), parts


class _Header(NamedTuple):
    """The fields of an image file's header that a :class:`Census` counts."""

    size: tuple[int, int]
    mode: str
    turned: bool
    transparent: bool
    bits: int
    grey: bool


def _read_header(image: ImageFile.ImageFile) -> _Header:
    """Look at an image that is open but not decoded."""
    turn = turn_of(image)
    raw = str(image.tile[0][3]) if image.tile else ""  # how the file holds its values, such as "RGB;16B"
    mode = f"{image.mode};16" if ";16" in raw and not is_deep(image) else image.mode
    bits = 16 if ";16" in mode else 8
    # Of a TIFF Pillow gives the size after turning.
    size = image.size[::-1] if turn in SIDEWAYS and image.format != "TIFF" else image.size
    return _Header(size, mode, turn is not None, image.has_transparency_data, bits, is_grey(image))


def _census(names: Sequence[str], parts: Mapping[str, Part]) -> Census:
    """Look at the headers of all files, in parallel; the training part decides channels and size."""
    files = [file for part in parts.values() for file in part.files]

    def look(i: int) -> _Header | InputError:
        try:
            return opened(files[i], _read_header)
        except InputError as error:
            return error

    looks = in_parallel(look, len(files), "looking at images")
    headers = [header for header in looks if isinstance(header, _Header)]
    train = [header for header in looks[: len(parts["train"].files)] if isinstance(header, _Header)]
    if not train:
        raise next(error for error in looks if isinstance(error, InputError))
    sizes = Counter(header.size for header in train)
    counts = Counter(label for part in parts.values() for label in part.labels)
    most = max(sizes.values())
    return Census(
        files=len(files),
        sizes=Counter(header.size for header in headers),
        modes=Counter(header.mode for header in headers),
        turned=sum(header.turned for header in headers),
        transparent=sum(header.transparent for header in headers),
        bits=max(header.bits for header in headers),
        classes={name: counts[label] for label, name in enumerate(names)},
        unreadable=len(files) - len(headers),
        channels=1 if all(header.grey for header in train) else 3,
        size=min(min(size) for size, count in sizes.items() if count == most),
    )


def take_folder_census(request: Request) -> Census:
    """Look at the headers of all images of a folder; see :func:`find_folder`."""
    return _census(*_names_and_parts(request))


def folder_labels(request: Request) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """List the images of a folder without opening them: the names of its classes, and the labels of each part."""
    names, parts = _names_and_parts(request)
    return names, {name: torch.tensor(part.labels) for name, part in parts.items()}


def _names_and_parts(request: Request) -> tuple[tuple[str, ...], dict[str, Part]]:
    with told_what_is_unreadable():
        return _parts(request.root, request.test_fraction)


def _form(names: Sequence[str], parts: Mapping[str, Part], image_size: int | None) -> dict[str, Any]:
    census = _census(names, parts)
    size = image_size or census.size
    if told := census.resizing(size):
        rank_zero_info(told)
    form = {"channels": census.channels, "size": size, "deep": any(mode.startswith("I;16") for mode in census.modes)}
    return {**form, "native_size": census.size, "census": census.as_json()}


def find_folder(request: Request) -> ImageDataset:
    """Describe images in folders of classes under root, in one of three layouts.

    - ``train/<class>/``, ``val/<class>/`` and ``test/<class>/``: the images of ``val/`` are the held-out part.
    - ``train/<class>/`` and one of the others, which is the test part: a share of the training images is held out.
    - ``<class>/``: the share ``test_fraction`` of every class becomes the test part, decided by the names of the files;
      a share of the others is held out.

    All parts have the same classes: the folders in alphabetical order, with any folders below. There is one channel if
    all training images are grey, else three; the size is the most common one of the training images (of its sides the
    shorter) if none is asked for; mean and std are those of all pixels of the training images. Images of 16 bits per
    value are divided by their largest value, the "maximum" of descriptions. Descriptions contain all of this, a
    fingerprint of the decoded images, and another of the held-out images of ``val/``. GIFs, hidden files and files that
    are not images are skipped and counted.

    Raises:
        InputError: for another layout, a class that a part lacks or has no images of, an unreadable image, or a link
            that leads elsewhere (see :class:`~ftd_lightning.data.folder.ImageTree`), naming the folder or file.
    """
    root = request.root
    names, parts = _names_and_parts(request)
    path = cache_file(request.cache_dir, "folder", request.image_size or "native", root, parts)
    form, sizes = partial(_form, names, parts, request.image_size), ("in_channels", "image_size", "native_size")
    decoded = DecodedImages(path, parts["train"], parts["test"], form, sizes, parts.get("val"))
    metadata = decoded.metadata()
    # Told only where it was used, so that whoever reads a description can ask for the same images.
    split = {} if (root / "train").is_dir() else {"test_fraction": request.test_fraction}
    shape = {key: metadata[key] for key in ("in_channels", "image_size")}
    # As of images that are given as objects: which share was asked for says nothing then.
    given = {"val_fraction": None, "held_out": metadata["held_out"]} if "val" in parts else {}
    deep = {"maximum": metadata["maximum"]} if "maximum" in metadata else {}
    contents = {"class_names": list(names), "fingerprint": metadata["fingerprint"], **shape, **split, **given, **deep}
    return ImageDataset(
        class_names=names,
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        load=decoded.load,
        native_size=metadata["native_size"],
        identify=partial(dict, contents),
        held_out=decoded.load_held_out if "val" in parts else None,
        census=Census.from_json(metadata["census"]),
        **shape,
    )
