"""Decoding image files, and the caches of decoded images and of whitenings."""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from ftd_lightning.data.sources import Pictures, fingerprints, unit_range
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, write_tensors
from ftd_lightning.files.transforms import Whitening
from ftd_lightning.sizes import ImageSize, sides, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from ftd_lightning.data.sources import Parts, Request


T = TypeVar("T")
CHUNK = 1000  # pictures measured at a time: bounds the memory that it takes
MOST_THREADS = 16  # each holds a whole image, of 12 megapixels about 100 MB
REPLACE = "replace them, or leave them out: data.skip_broken (ftd distill: --skip-broken)"


class LabelledFiles(NamedTuple):
    """The files of one part of a data set and their labels, in order."""

    files: list[Path]
    labels: list[int]


def measure(pictures: Tensor) -> dict[str, list[float]]:
    """Measure "mean" and "std" of all pixels, per channel, in [0, 1], to 6 digits; the std of a constant is 1."""
    count, top = pictures.numel() // pictures.shape[1], 255 if pictures.dtype == torch.uint8 else 1

    def average(of: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [of(chunk.double() / top).sum((0, 2, 3)) for chunk in pictures.split(CHUNK)]
        return torch.stack(sums).sum(0) / count

    mean = average(lambda values: values)
    variance = average(lambda values: (values - mean.view(-1, 1, 1)).square())
    std = variance.sqrt()
    std[variance < 1e-20] = 1  # rounding leaves a little of the variance of a constant
    return {key: [round(value, 6) for value in found.tolist()] for key, found in (("mean", mean), ("std", std))}


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


def for_each(files: Sequence[Path], use: Callable[[int, ImageFile.ImageFile], T], title: str) -> list[T | InputError]:
    """Call ``use`` with the number and image of each file, in threads; an unreadable file's result is an InputError."""

    def open_and_use(i: int) -> T | InputError:
        try:
            with Image.open(files[i]) as image:
                return use(i, image)
        except UnidentifiedImageError:
            return InputError(f"{files[i]} (not an image)")
        except Exception as error:  # Pillow raises many kinds
            return InputError(f"{files[i]} ({error})")

    # Not os.cpu_count: that counts CPUs that the process may not run on.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(threads, MOST_THREADS)) as pool:
        results = pool.map(open_and_use, range(len(files)))
        return list(tqdm(results, desc=title, total=len(files), unit="image", leave=False, delay=1))


def unreadable(looks: Sequence[object]) -> str:
    """Count the unreadable files among the results of :func:`for_each`, and name the first three."""
    errors = [str(look) for look in looks if isinstance(look, InputError)]
    more = ", ..." if len(errors) > 3 else ""
    return f"unreadable images, {len(errors):,} of {len(looks):,}: {', '.join(errors[:3])}{more}"


def is_grey(image: Image.Image) -> bool:
    """Tell by its mode whether an image is grey."""
    return image.mode in ("1", "L", "LA", "La") or is_deep(image)


def is_deep(image: Image.Image) -> bool:
    """Tell by its mode whether an image has 16 bits per value."""
    return image.mode.startswith("I;16")


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that its EXIF orientation asks for; None for none, or unreadable EXIF."""
    try:
        # Of the base class: PngImageFile.getexif decodes the whole file, to look for EXIF behind the pixels.
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds for broken EXIF; the image itself may be sound
        return None


def pixels(image: Image.Image, *, channels: int, size: tuple[int, int] | None = None) -> NDArray[Any]:
    """Turn a Pillow image of any mode into (channels, height, width), as a person sees it; ``size`` is (width, height).

    The result is uint16 of 16 bits per value, else uint8; 32 bits, whose range is not known, are a ValueError.
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


def decode(
    parts: Mapping[str, LabelledFiles], *, channels: int, size: ImageSize, deep: bool, skip_broken: bool = False
) -> tuple[Parts, int]:
    """Decode the files of all parts of a data set in parallel; unreadable ones are refused together, or left out.

    Returns:
        By part, pictures (N, channels, H, W) and labels; and the largest value of the images of 16 bits, or 0.
        Pictures are uint8, or if ``deep`` float32 in [0, 1]: 16 bits divided by that largest value, 8 bits by 255.
    """
    files = [file for part in parts.values() for file in part.files]
    height, width = sides(size)
    pictures = torch.empty(len(files), channels, height, width, dtype=torch.float32 if deep else torch.uint8)
    view, peaks = pictures.numpy(), np.zeros(len(files))

    def read(i: int, image: Image.Image) -> None:
        np.copyto(view[i], pixels(image, channels=channels, size=(width, height)), casting="safe")
        peaks[i] = np.asarray(image).max() if is_deep(image) else 0

    looks = for_each(files, read, f"decoding images to {size_text(size)}")
    good = torch.tensor([look is None for look in looks])
    if not good.all():
        if not skip_broken:
            raise InputError(f"{unreadable(looks)}; {REPLACE}")
        rank_zero_info(f"left out {unreadable(looks)}")
        pictures, peaks = pictures[good], peaks[good.numpy()]
    if deep:
        pictures /= torch.from_numpy(np.where(peaks > 0, peaks.max(), 255)).float().view(-1, 1, 1, 1)
    masks = good.split([len(part.files) for part in parts.values()])
    split = pictures.split([int(mask.sum()) for mask in masks])
    labels = [torch.tensor(part.labels)[mask] for part, mask in zip(parts.values(), masks, strict=True)]
    for part, left in zip(parts.values(), labels, strict=True):
        for label in set(part.labels) - set(left.tolist()):
            raise InputError(f"{part.files[part.labels.index(label)].parent}: holds no readable image; add some")
    return dict(zip(parts, map(Pictures, split, labels), strict=True)), int(peaks.max())


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return ``cache_dir``, or this library's folder in the user's cache, ``XDG_CACHE_HOME`` or ``~/.cache``."""
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ftd_lightning"
    return Path(folder).expanduser()


def check_memory(needed: int, work: str, remedy: str) -> None:
    """Refuse work that takes more bytes of memory than the machine has; Windows does not report it this way."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise InputError(
            f"{work} takes {needed / 2**30:,.0f} GiB of memory, this machine has {memory / 2**30:,.0f}: {remedy}"
        )


def cached(
    path: Path, read: Callable[[Path], T], make: Callable[[], None], again: str, setting: str = "data.cache_dir"
) -> T:
    """Read a cache, which is made where it is missing, and again where it is damaged; ``setting`` moves it."""
    if path.is_file():
        try:
            return read(path)
        except InputError as error:
            rank_zero_warn(f"{str(error).removesuffix('; make it again')}; {again}")
    try:
        make()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); set {setting}") from error
    return read(path)


KIND = "decoded_images"
VERSION = 2  # of how files are decoded; caches of another one are not read


@dataclass(frozen=True)
class DecodedImages:
    """The parts of a data set, decoded once and cached.

    Attributes:
        path: of the cache; see :func:`cache_file`.
        parts: files and labels by part.
        form: returns arguments of :func:`decode` by their names, and values to record.
    """

    path: Path
    parts: Mapping[str, LabelledFiles]
    form: Callable[[], Mapping[str, Any]]

    def metadata(self) -> dict[str, Any]:
        """Return the values that were recorded beside the pictures; see :meth:`fill`."""
        return self._read(lambda file: file.metadata)

    def contents(self) -> dict[str, Any]:
        """Return the fingerprint of the pictures; see ``ImageDataset``."""
        return {"fingerprint": self.metadata()["fingerprint"]}

    def load(self) -> Parts:
        """Map all parts into memory, after a look at every byte of them."""
        return self._read(
            lambda file: {name: Pictures(file[f"{name}.pictures"], file[f"{name}.labels"]) for name in self.parts}
        )

    def _read(self, read: Callable[[TensorFile], T]) -> T:
        again = "the images are decoded again"
        return cached(self.path, lambda path: read(TensorFile(path, kind=KIND)), self.fill, again)

    def fill(self) -> None:
        """Decode all parts and write the cache at once, with sizes, mean, std, fingerprints and values of ``form``."""
        metadata = {"deep": False, "skip_broken": False, **self.form()}
        shape: dict[str, Any] = {key: metadata.pop(key) for key in ("channels", "size", "deep", "skip_broken")}
        channels, size = shape["channels"], shape["size"]
        values = sum(len(part.files) for part in self.parts.values()) * channels * math.prod(sides(size))
        work = f"{self.path.parent}: decoding to {size_text(size)}"
        check_memory(2 * values * (4 if shape["deep"] else 1), work, "set data.image_size lower")
        parts, maximum = decode(self.parts, **shape)
        tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part._asdict().items()}
        metadata |= {"in_channels": channels, "image_size": size, **measure(parts["train"].pictures)}
        metadata |= {**fingerprints(parts), **({"maximum": maximum} if shape["deep"] else {})}
        write_tensors(self.path, tensors, kind=KIND, metadata=metadata)


def cache_file(
    request: Request, name: str, size: ImageSize | None, base: Path, parts: Mapping[str, LabelledFiles]
) -> Path:
    """Name the cache of decoded files by all that it depends on: their paths, labels, lengths and times of change."""
    head = f"{VERSION}{'|skip_broken' * request.skip_broken}|{base.resolve()}\n"
    digest = hashlib.blake2b(head.encode(errors="surrogateescape"), digest_size=8)
    for part, (files, labels) in parts.items():
        for file, label in zip(files, labels, strict=True):
            stat = file.stat()
            line = f"{part}|{label}|{file.relative_to(base).as_posix()}|{stat.st_size}|{stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    shape = "own" if size is None else "x".join(map(str, [size] if isinstance(size, int) else size))
    return cache_folder(request.cache_dir) / "decoded" / f"{name}_{shape}_{digest.hexdigest()}.safetensors"


COPIES = 17  # of the matrix, float32, that fitting takes at its peak, as measured


def cached_whitening(
    pictures: Callable[[], Tensor], identity: Mapping[str, Any], *, eps: float, cache_dir: str | Path | None
) -> Whitening:
    """Read the whitening of some pictures from the cache, or fit it and write it there.

    ``pictures`` is called where there is no cache, and returns uint8 or float32 in [0, 1]. ``identity`` tells them from
    all others.
    """
    known = json.dumps([identity, eps, version("kornia")], sort_keys=True)
    name = f"{identity['name'].replace(' ', '-')}_{hashlib.blake2b(known.encode(), digest_size=8).hexdigest()}"
    path = cache_folder(cache_dir) / "whitening" / f"zca_{name}.safetensors"

    def fit() -> None:
        given = pictures()
        values = given[0].numel()
        work = (
            f"whitening {values:,} values per image, by a matrix of {values:,} x {values:,} ({values**2 * 4:,} bytes),"
        )
        check_memory(COPIES * values**2 * 4, work, "leave out zca, or set data.image_size lower")
        rank_zero_info(f"fitting the whitening, {values} x {values}, on {len(given)} images")
        Whitening.fit(unit_range(given), eps=eps, fitted_on=fingerprint(given)).save(path)

    return cached(path, Whitening.load, fit, "the whitening is fitted again")
