"""Image files decoded once, in parallel, into a cache that later runs map into memory.

Convention: pictures are uint8 (C, H, W), pixels as stored: an EXIF orientation is not applied, as torchvision's
ImageFolder does not. Resizing is bilinear with antialiasing and squashes the aspect ratio.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from ftd_lightning.data.files import fingerprint, write_tensors
from ftd_lightning.data.images import Parts, Pictures
from ftd_lightning.data.pixel_statistics import measure
from ftd_lightning.data.tensor_file import TensorFile
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from ftd_lightning.data.cache_folder import CacheFolder

KIND = "decoded_images"
BLOCK = 32  # images a thread takes at a time

T = TypeVar("T")


class Part(NamedTuple):
    """The files of one part of a data set and their labels, in order."""

    files: list[Path]
    labels: list[int]


def _ignore(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def image_files(folder: Path) -> list[Path]:
    """List the images in a folder and the folders below it, sorted; hidden ones and other files are left out."""
    found = []
    for where, folders, names in os.walk(folder, onerror=_ignore, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."))
        found += [Path(where) / name for name in images]
    return sorted(found)


def class_files(folders: Sequence[Path]) -> Part:
    """List the images of classes, a folder each, in label order.

    Raises:
        InputError: for a class that is missing or has no images.
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; the images of one class belong there")
        images = image_files(folder)
        if not images:
            raise InputError(f"{folder}: holds no images ({', '.join(IMG_EXTENSIONS)}); add some, or remove the folder")
        files += images
        labels += [label] * len(images)
    return Part(files, labels)


def in_parallel(work: Callable[[int], T], count: int, what: str) -> list[T]:
    """Call ``work(0) .. work(count - 1)`` in threads and show a bar; Pillow decodes and resizes outside Python's lock.

    What fails first, in order, is raised, and what has not begun is dropped.

    Example:
        >>> in_parallel(lambda i: i * i, 4, "squares")
        [0, 1, 4, 9]
    """

    def block(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + BLOCK, count))]

    # Not os.cpu_count: that counts CPUs that the process may not run on.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # The bar comes after a second: what is done by then needs none.
    with ThreadPoolExecutor(threads) as pool, tqdm(total=count, desc=what, unit="image", leave=False, delay=1) as bar:
        jobs = [pool.submit(block, start) for start in range(0, count, BLOCK)]
        try:
            for job in jobs:
                bar.update(len(job.result()))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return list(chain.from_iterable(job.result() for job in jobs))


def opened(path: Path, use: Callable[[Image.Image], T]) -> T:
    """Apply a function to an open image file.

    Raises:
        InputError: whatever a broken file makes Pillow raise.
    """
    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable image ({reason}); replace it or remove it") from error


def is_grey(image: Image.Image) -> bool:
    """Tell by its mode whether an image is grey."""
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")


def pixels(image: Image.Image, *, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Turn a Pillow image of any mode into (channels, height, width) uint8.

    Args:
        image: of 1, 8 or 16 bits per value.
        channels: 3 for RGB, 1 for grey; images of the other kind are converted.
        size: width and height to resize to; None leaves them.

    Raises:
        ValueError: for 32 bits per value, whose range is not known.
    """
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of unknown range: convert it to 8 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way to RGB on which Pillow does not warn
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    array: NDArray[np.uint8] = np.array(image).reshape(image.height, image.width, channels)
    return array.transpose(2, 0, 1)


def read_picture(path: Path, *, channels: int, size: int) -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey; images of the other kind are converted.
        size: height and width.

    Returns:
        (channels, size, size) uint8.

    Raises:
        InputError: for a file that is not a readable image.
    """
    return opened(path, partial(pixels, channels=channels, size=(size, size)))


def decode(part: Part, *, channels: int, size: int, what: str) -> Pictures:
    """Decode the files of a part in parallel.

    Returns:
        Pictures (N, channels, size, size) uint8 and labels.

    Raises:
        InputError: naming the first file that is not a readable image.
    """
    pictures = torch.empty(len(part.files), channels, size, size, dtype=torch.uint8)
    view = pictures.numpy()

    def read(i: int) -> None:
        view[i] = read_picture(part.files[i], channels=channels, size=size)

    in_parallel(read, len(part.files), what)
    return Pictures(pictures, torch.tensor(part.labels, dtype=torch.int64))


def cache_file(cache: CacheFolder, name: str, size: int | str, base: Path, parts: Mapping[str, Part]) -> Path:
    """Name the cache of decoded files by all that it depends on.

    Args:
        cache: the file lies in its folder ``cache``.
        name: of the data set.
        size: of the pictures.
        base: names of files are taken relative to it, so that a tree that is moved keeps its cache.
        parts: the files by part; their names, labels, lengths and times of change are hashed.

    Raises:
        InputError: for a file that does not exist, such as a dangling link.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part, (files, labels) in parts.items():
        for file, label in zip(files, labels, strict=True):
            try:
                stat = file.stat()
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror}); replace it or remove it") from error
            line = f"{part}|{label}|{file.relative_to(base).as_posix()}|{stat.st_size}|{stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return cache.file("cache", f"{name}_{size}_{digest.hexdigest()}.safetensors")


def fill_cache(path: Path, train: Part, test: Part, *, channels: int, size: int, **metadata: Any) -> None:
    """Decode both parts and write them to a cache, all at once; an interruption leaves no file.

    Beside the pictures it records their size, what :func:`measure` finds in the training part, and a fingerprint of the
    pictures and labels, which copies of the files share.

    Raises:
        InputError: for an unreadable image, for more than memory holds, or where the cache cannot be written.
    """
    needed = 3 * (len(train.files) + len(test.files)) * channels * size**2  # writing makes two copies
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise InputError(
            f"{path.parent}: decoding to {size} px takes {needed / 2**30:.0f} GiB of memory, "
            f"this machine has {memory / 2**30:.0f}; set data.image_size lower"
        )
    parts = {
        name: decode(part, channels=channels, size=size, what=f"decoding {name} images to {size} px")
        for name, part in (("train", train), ("test", test))
    }
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part._asdict().items()}
    found = {
        "in_channels": channels,
        "image_size": size,
        **measure(parts["train"].pictures),
        "fingerprint": fingerprint(*tensors.values()),
    }
    try:
        write_tensors(path, tensors, kind=KIND, metadata={**found, **metadata})
    except OSError as error:
        raise InputError(
            f"{path}: the decoded images cannot be written there ({error.strerror or error}); set data.cache_dir"
        ) from error


def read_cache(path: Path) -> Parts:
    """Map a cache into memory: training part and test part.

    Raises:
        InputError: for a file that is missing, broken, or something else.
    """
    file = TensorFile(path, kind=KIND)
    train, test = (Pictures(file[f"{part}.pictures"], file[f"{part}.labels"]) for part in ("train", "test"))
    return train, test


def cache_metadata(path: Path) -> dict[str, Any]:
    """Read what was written beside the pictures of a cache.

    Raises:
        InputError: as for :func:`read_cache`.
    """
    return TensorFile(path, kind=KIND).metadata
