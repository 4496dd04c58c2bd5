"""Image files, decoded in parallel.

Convention: pictures are uint8 (C, H, W), pixels as stored: an EXIF orientation is not applied, as torchvision's
ImageFolder does not; the first one of an animation or a file of several pages. Resizing is bilinear with antialiasing
and squashes the aspect ratio.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ftd_lightning.data.images import Pictures
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from ftd_lightning.data.image_tree import Part

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


def opened(path: Path, use: Callable[[Image.Image], T]) -> T:
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
