"""Image files, decoded in parallel.

Convention: pictures are (C, H, W) as a person sees them: turned by their EXIF orientation, which torchvision's
ImageFolder does not do, and transparency on white; the first one of an animation or a file of several pages. Resizing
is bilinear with antialiasing and squashes the aspect ratio.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from tqdm.auto import tqdm

from ftd_lightning.data.images import Pictures
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ftd_lightning.data.image_tree import Part

TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])  # width becomes height
BLOCK = 32  # images a thread takes at a time

T = TypeVar("T")


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


def opened(path: Path, use: Callable[[ImageFile.ImageFile], T]) -> T:
    """Apply a function to an open image file.

    Raises:
        InputError: whatever a broken file makes Pillow raise.
    """
    try:
        with Image.open(path) as image:
            return use(image)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); change its permissions, or remove it") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable image ({reason}); replace it or remove it") from error


def is_grey(image: Image.Image) -> bool:
    """Tell by its mode whether an image is grey."""
    return image.mode in ("1", "L", "LA", "La") or is_deep(image)


def is_deep(image: Image.Image) -> bool:
    """Tell by its mode whether an image has 16 bits per value."""
    return image.mode.startswith("I;16")


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image upright by its EXIF orientation; None for an upright one, or unreadable EXIF."""
    try:
        # Of the base class: PngImageFile.getexif decodes the whole file, to look for EXIF behind the pixels.
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds for broken EXIF; the image itself may be sound
        return None


def pixels(image: Image.Image, *, channels: int, size: tuple[int, int] | None = None) -> NDArray[Any]:
    """Turn a Pillow image of any mode into (channels, height, width), as a person sees it.

    Args:
        image: of 1, 8 or 16 bits per value.
        channels: 3 for RGB, 1 for grey; images of the other kind are converted.
        size: width and height to resize to; None leaves them.

    Returns:
        uint8; of an image of 16 bits uint16, the values as they are stored.

    Raises:
        ValueError: for 32 bits per value, whose range is not known.
    """
    image.load()
    if (turn := turn_of(image)) is not None:  # Pillow's exif_transpose fails where it cannot write the other tags again
        image = image.transpose(turn)
    if is_deep(image):
        if size is not None and image.size != size:
            image = Image.fromarray(np.asarray(image).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        values = np.rint(np.asarray(image)).astype(np.uint16)
        return np.broadcast_to(values, (channels, *values.shape))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of unknown range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    array: NDArray[np.uint8] = np.array(image).reshape(image.height, image.width, channels)
    return array.transpose(2, 0, 1)


def read_picture(path: Path, *, channels: int, size: int) -> tuple[NDArray[Any], int]:
    """Decode an image.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey; images of the other kind are converted.
        size: height and width.

    Returns:
        (channels, size, size) as from :func:`pixels`; and of an image of 16 bits its largest value, else 0.

    Raises:
        InputError: for a file that is not a readable image.
    """

    def use(image: Image.Image) -> tuple[NDArray[Any], int]:
        found = pixels(image, channels=channels, size=(size, size))
        return found, int(np.asarray(image).max()) if is_deep(image) else 0

    return opened(path, use)


def decode(parts: Mapping[str, Part], *, channels: int, size: int, deep: bool) -> tuple[dict[str, Pictures], int]:
    """Decode the files of all parts of a data set in parallel.

    Args:
        parts: files and labels by the name of the part.
        channels: 3 for RGB, 1 for grey; images of the other kind are converted.
        size: height and width.
        deep: whether there are images of 16 bits per value.

    Returns:
        By part, pictures (N, channels, size, size) and labels; and the largest value of the images of 16 bits, or 0.
        Pictures are uint8, or if ``deep`` float32 in [0, 1]: 16 bits divided by that largest value, 8 bits by 255.

    Raises:
        InputError: for files that are not readable images, naming the first and counting the others.
    """
    files = [file for part in parts.values() for file in part.files]
    pictures = torch.empty(len(files), channels, size, size, dtype=torch.float32 if deep else torch.uint8)
    view, peaks, unreadable = pictures.numpy(), np.zeros(len(files)), {}

    def read(i: int) -> None:
        try:
            values, peaks[i] = read_picture(files[i], channels=channels, size=size)
        except InputError as error:
            unreadable[i] = error
        else:
            np.copyto(view[i], values, casting="safe")

    in_parallel(read, len(files), f"decoding images to {size} px")
    if unreadable:
        others = f"; {len(unreadable) - 1:,} more files are unreadable" if len(unreadable) > 1 else ""
        raise InputError(f"{unreadable[min(unreadable)]}{others}")
    if deep:
        pictures /= torch.from_numpy(np.where(peaks > 0, peaks.max(), 255)).float().view(-1, 1, 1, 1)
    counts = [len(part.files) for part in parts.values()]
    found = {
        name: Pictures(some, torch.tensor(part.labels, dtype=torch.int64))
        for (name, part), some in zip(parts.items(), pictures.split(counts), strict=True)
    }
    return found, int(peaks.max())
