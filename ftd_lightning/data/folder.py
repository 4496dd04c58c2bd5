"""Image folders: one subfolder per class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from ftd_lightning.data.decoding import (
    REPLACE,
    SIDEWAYS,
    DecodedImages,
    LabelledFiles,
    cache_file,
    for_each,
    is_deep,
    is_grey,
    turn_of,
    unreadable,
)
from ftd_lightning.data.sources import ImageDataset, Request, resizing
from ftd_lightning.errors import InputError
from ftd_lightning.sizes import ImageSize, as_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from PIL import ImageFile


@contextmanager
def os_errors_as_input_errors() -> Iterator[None]:
    """Turn an OSError into an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); fix that, or remove it") from error


def refuse_folders(problem: str, folders: Sequence[Path]) -> None:
    """Raise the InputError of a problem that some folders have, naming all of them; nothing for none."""
    if folders:
        raise InputError(f"{', '.join(map(str, folders))}: {problem}")


@cache
def _announce(line: str) -> None:
    rank_zero_info(line)


class ImageTree:
    """The images below a folder, without hidden files and linked folders; ``skipped`` counts other files by ending."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: Counter[str] = Counter()

    def images(self, folder: Path) -> list[Path]:
        """List the images in a folder and the folders below it, sorted."""

        def fail(error: OSError) -> None:
            raise error

        found: list[Path] = []
        for here, folders, files in os.walk(folder, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            self.skipped["linked folder"] += sum(Path(here, name).is_symlink() for name in folders)
            for name in files:
                if has_file_allowed_extension(name, IMG_EXTENSIONS) and not name.startswith("."):
                    found.append(Path(here, name))
                elif not name.startswith("."):
                    self.skipped[Path(name).suffix or "no ending"] += 1
        return sorted(found)

    def part(self, folders: Sequence[Path]) -> LabelledFiles:
        """List the images of classes, each in a folder of its own, in label order."""
        refuse_folders("no such folder; the images of one class belong there", [f for f in folders if not f.is_dir()])
        found = [self.images(folder) for folder in folders]
        empty = [folder for folder, images in zip(folders, found, strict=True) if not images]
        refuse_folders(f"no images ({', '.join(IMG_EXTENSIONS)}); add some, or remove this class everywhere", empty)
        labels = [label for label, images in enumerate(found) for _ in images]
        return LabelledFiles([file for images in found for file in images], labels)

    def log_skipped(self) -> None:
        """Log the number of skipped files; a line that was logged before is not repeated."""
        if counts := ", ".join(f"{count} {ending}" for ending, count in sorted(self.skipped.items()) if count):
            _announce(f"{self.root}: skipped {counts}")


PARTS = ("train", "val", "test")  # folders of parts under root; where there are none, the folders there are classes
LIKE_PARTS = {*PARTS, "training", "valid", "validation", "testing"}  # in any case: other programs' names of parts


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


def _split(part: LabelledFiles, folders: Sequence[Path], fraction: float) -> dict[str, LabelledFiles]:
    """Cut off the test part, the same share of every class, at least one image.

    A hash of each file's name decides which ones, not a seed: no test image of one run may be a training image of
    another.
    """
    parts = {"train": LabelledFiles([], []), "test": LabelledFiles([], [])}
    counts = Counter(part.labels)
    alone = [folder for label, folder in enumerate(folders) if counts[label] < 2]
    refuse_folders("one image; one to train and one to test are needed at least", alone)
    for label, folder in enumerate(folders):
        files = [file for file, of in zip(part.files, part.labels, strict=True) if of == label]
        count = min(max(round(fraction * len(files)), 1), len(files) - 1)
        names = {file: os.fsencode(file.relative_to(folder.parent).as_posix()) for file in files}
        chosen = set(sorted(files, key=lambda file: hashlib.blake2b(names[file]).digest())[:count])
        for file in files:
            to = parts["test" if file in chosen else "train"]
            to.files.append(file)
            to.labels.append(label)
    return parts


@os_errors_as_input_errors()
def find_parts(request: Request) -> tuple[tuple[str, ...], dict[str, LabelledFiles]]:
    """List, unopened, the names of the classes and the parts: "train", "test" and, if all three have folders, "val"."""
    root, tree = request.root, ImageTree(request.root)
    there = [name for name in PARTS if (root / name).is_dir()]
    known = [root / name for name in there]
    beside = [path for path in sorted(root.glob("[!.]*")) if path.is_dir() and not any(map(path.samefile, known))]
    odd = [path for path in beside if path.name.lower() in LIKE_PARTS]
    if there or odd == beside:
        refuse_folders("would not be read as a part; rename it to train, val or test, or move it", odd)
    if not there:
        classes = _class_folders(root)
        parts = _split(tree.part(classes), classes, request.test_fraction)
        tree.log_skipped()
        return tuple(path.name for path in classes), parts
    if len(there) == 1 or "train" not in there:
        missing = "no val/ or test/" if there == ["train"] else "no train/"
        raise InputError(
            f"{root}: holds {' and '.join(f'{name}/' for name in there)} but {missing}; add it, or set data.root to a "
            "folder of classes, of which the share data.test_fraction becomes the test part"
        )
    folders = {name: _class_folders(root / name) for name in there}
    for here, other in permutations(there, 2):
        names = sorted({path.name for path in folders[here]} - {path.name for path in folders[other]})
        refuse_folders(f"no such folder, but there is in {root / here}", [root / other / name for name in names])
    parts = {name: tree.part(classes) for name, classes in folders.items()}
    tree.log_skipped()
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    return tuple(path.name for path in folders["train"]), parts


class _Header(NamedTuple):
    size: tuple[int, int]
    mode: str
    turned: bool
    transparent: bool
    bits: int
    grey: bool


def _read_header(_: int, image: ImageFile.ImageFile) -> _Header:
    turn = turn_of(image)
    raw = str(image.tile[0][3]) if image.tile else ""  # how the file holds its values, such as "RGB;16B"
    mode = f"{image.mode};16" if ";16" in raw and not is_deep(image) else image.mode
    bits = 16 if ";16" in mode else 8
    # Of a TIFF Pillow gives the size after turning.
    size = image.size[::-1] if turn in SIDEWAYS and image.format != "TIFF" else image.size
    return _Header(size, mode, turn is not None, image.has_transparency_data, bits, is_grey(image))


@dataclass(frozen=True)
class Census:
    """Counts over all image files of a folder, by their headers.

    ``sizes`` are (width, height) in pixels, after turning by EXIF orientation; ``modes`` those of Pillow, "RGB;16" and
    the like where 8 of 16 bits are read. ``channels`` is 1 if all training images are grey, else 3; ``size`` is
    that of all training images, or the shorter side of their most common size where they differ.
    """

    files: int
    sizes: Mapping[tuple[int, int], int]
    modes: Mapping[str, int]
    turned: int
    transparent: int
    bits: int
    classes: Mapping[str, int]
    unreadable: int
    channels: int
    size: ImageSize

    @classmethod
    def take(cls, names: Sequence[str], parts: Mapping[str, LabelledFiles]) -> Census:
        """Look at the headers of all files, in parallel; the training part decides channels and size."""
        files = [file for part in parts.values() for file in part.files]
        looks = for_each(files, _read_header, "looking at images")
        headers = [header for header in looks if isinstance(header, _Header)]
        train = [header for header in looks[: len(parts["train"].files)] if isinstance(header, _Header)]
        if not train:
            raise InputError(f"{unreadable(looks)}; {REPLACE}")
        sizes = Counter(header.size for header in train)
        common = min(min(size) for size, count in sizes.items() if count == max(sizes.values()))
        counts = Counter(label for part in parts.values() for label in part.labels)
        return cls(
            files=len(files),
            sizes=Counter(header.size for header in headers),
            modes=Counter(header.mode for header in headers),
            turned=sum(header.turned for header in headers),
            transparent=sum(header.transparent for header in headers),
            bits=max(header.bits for header in headers),
            classes={name: counts[label] for label, name in enumerate(names)},
            unreadable=len(files) - len(headers),
            channels=1 if all(header.grey for header in train) else 3,
            size=common if len(sizes) > 1 else as_size(train[0].size[::-1]),
        )

    def lines(self) -> list[str]:
        """Describe the files in one line, and in a second one how they are changed, if they are."""
        ends = [f"{width} x {height}" for width, height in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        size = " to ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else "unknown size"
        few, many = (pick(self.classes, key=lambda name: self.classes[name]) for pick in (min, max))
        least, most = self.classes[few], self.classes[many]
        each = f"{most} each" if least == most else f"{least} ({few}) to {most} ({many})"
        depth = "" if self.bits <= 8 else f", up to {self.bits} bits per value"
        colour = "in grey" if self.channels == 1 else "in colour"
        first = f"{self.files:,} images of {size} px {colour}{depth}; {len(self.classes)} classes of {each}"
        cut = sum(count for mode, count in self.modes.items() if mode.endswith(";16") and mode != "I;16")
        changes = {
            "turned upright by EXIF orientation": self.turned,
            "transparent, composited on white": self.transparent,
            "read with 8 of their 16 bits": cut,
            "unreadable": self.unreadable,
        }
        second = [f"{count:,} {'is' if count == 1 else 'are'} {change}" for change, count in changes.items() if count]
        return [first, "; ".join(second)] if second else [first]


def _form(names: Sequence[str], parts: Mapping[str, LabelledFiles], request: Request) -> dict[str, Any]:
    census = Census.take(names, parts)
    size = request.image_size or census.size
    if change := resizing(census.sizes, size):
        rank_zero_info(change)
    deep = any(mode.startswith("I;16") for mode in census.modes)
    shape = {"channels": census.channels, "size": size, "deep": deep, "native_size": census.size}
    return {**shape, "skip_broken": request.skip_broken}


def find_folder(request: Request) -> ImageDataset:
    """Describe images in folders of classes under root, in one of three layouts.

    - ``train/<class>/``, ``val/<class>/`` and ``test/<class>/``: the images of ``val/`` are the held-out part.
    - ``train/<class>/`` and one of the others, which is the test part: a share of the training images is held out.
    - ``<class>/``: the share ``test_fraction`` of every class becomes the test part, decided by the names of the files.

    :class:`Census` says which channels and size there are by default. Mean and std are measured on the training images.
    Images of 16 bits per value are divided by their largest value, the "maximum" of fingerprints.
    """
    names, parts = find_parts(request)
    with os_errors_as_input_errors():
        path = cache_file(request, "folder", request.image_size, request.root, parts)
    decoded = DecodedImages(path, parts, partial(_form, names, parts, request))
    metadata = decoded.metadata()
    # Only where it was used, so that whoever reads a description can ask for the same images.
    split = {} if (request.root / "train").is_dir() else {"test_fraction": request.test_fraction}
    # As of images that are given as objects: which share was asked for says nothing then.
    given = {"val_fraction": None} if "val" in parts else {}
    recorded = ("fingerprint", "held_out", "maximum", "in_channels", "image_size")
    contents = {"class_names": list(names), **{key: metadata[key] for key in recorded if key in metadata}}
    return ImageDataset(
        class_names=names,
        in_channels=metadata["in_channels"],
        image_size=as_size(metadata["image_size"]),
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        load=decoded.load,
        native_size=as_size(metadata["native_size"]),
        contents=partial(dict, {**contents, **split, **given}),
    )
