"""Decoding image files, and the cache of decoded images."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import ExifTags, Image, ImageFile
from torch import Tensor
from tqdm.auto import tqdm

from ftd_lightning.data.sources import Parts, Pictures, fingerprints, unit_range
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, write_tensors
from ftd_lightning.files.schema import is_number, refuse
from ftd_lightning.files.transforms import Whitening

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from ftd_lightning.data.sources import Part


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


CHUNK = 1000  # pictures measured at a time: bounds the memory that it takes


def measure(pictures: Tensor) -> dict[str, list[float]]:
    """Measure mean and standard deviation of all pixels, per channel, on the scale [0, 1].

    A channel of one value gets the deviation 1, because images are divided by it.

    Args:
        pictures: (N, C, H, W), uint8 or float32 in [0, 1].

    Returns:
        "mean" and "std", C values each, rounded to 6 digits.

    Example:
        >>> measure(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
        {'mean': [0.5], 'std': [0.5]}
        >>> measure(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
        {'mean': [0.5], 'std': [0.5]}
    """
    mean, variance = _moments_of_bytes(pictures) if pictures.dtype == torch.uint8 else _moments(pictures)
    std = variance.sqrt()
    std[variance < 1e-20] = 1  # rounding leaves a little of the variance of a constant
    return {key: [round(value, 6) for value in found.tolist()] for key, found in (("mean", mean), ("std", std))}


def _moments_of_bytes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    # Counts of the 256 values: exact, whatever the order of the images.
    counts = torch.zeros(pictures.shape[1], 256, dtype=torch.float64)
    for chunk in pictures.split(CHUNK):
        for channel, values in enumerate(chunk.transpose(0, 1)):
            counts[channel] += values.flatten().bincount(minlength=256)
    values, shares = torch.arange(256, dtype=torch.float64) / 255, counts / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1)
    return mean, (shares * (values - mean.unsqueeze(1)).square()).sum(1)


def _moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    count = pictures.numel() // pictures.shape[1]
    mean = (
        sum((chunk.double().sum((0, 2, 3)) for chunk in pictures.split(CHUNK)), torch.zeros(pictures.shape[1])) / count
    )
    squares = ((chunk.double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for chunk in pictures.split(CHUNK))
    return mean, sum(squares, torch.zeros(pictures.shape[1])) / count


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


KIND = "decoded_images"
VERSION = 2  # of how files are decoded; caches of another one are not read


@dataclass(frozen=True)
class DecodedImages:
    """The parts of a data set, decoded. The cache is filled where it is missing, and again where it is damaged.

    Attributes:
        path: of the cache; see :func:`cache_file`.
        train: files and labels of the training part.
        test: those of the test part.
        form: returns ``channels``, ``size`` and perhaps ``deep`` of the pictures, as :func:`fill_cache` takes them, and
            what else to record. It is called before decoding.
        sizes: what must be recorded as a positive integer.
        val: files and labels of the held-out part; None: there is none, a share of the training part is held out.
    """

    path: Path
    train: Part
    test: Part
    form: Callable[[], Mapping[str, Any]]
    sizes: tuple[str, ...] = ("in_channels", "image_size")
    val: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """Files and labels by the name of the part."""
        return _by_name(self.train, self.test, self.val)

    def metadata(self) -> dict[str, Any]:
        """Return what was recorded beside the pictures; it fits their shapes.

        Raises:
            InputError: for an unreadable image, or where the cache cannot be written.
        """
        return self._from_cache(self._checked_metadata)

    def load(self) -> Parts:
        """Map the training and the test part into memory, after a look at every byte of them.

        Raises:
            InputError: as for :meth:`metadata`.
        """
        train, test = self._from_cache(partial(self._checked_parts, ("train", "test")))
        return train, test

    def load_held_out(self) -> Pictures:
        """Map the held-out part into memory, likewise; there has to be one.

        Raises:
            InputError: as for :meth:`metadata`.
        """
        (val,) = self._from_cache(partial(self._checked_parts, ("val",)))
        return val

    def _from_cache(self, read: Callable[[TensorFile], T]) -> T:
        if self.path.is_file():
            try:
                return read(TensorFile(self.path, kind=KIND))
            except InputError as error:
                rank_zero_warn(f"{str(error).removesuffix('; make it again')}; the images are decoded again")
        fill_cache(self.path, self.train, self.test, val=self.val, **self.form())
        return read(TensorFile(self.path, kind=KIND))

    def _checked_metadata(self, file: TensorFile) -> dict[str, Any]:
        metadata = file.metadata
        for key in self.sizes:
            if type(metadata.get(key)) is not int or metadata[key] < 1:
                refuse(self.path, key, f"is {metadata.get(key)!r:.60}")
        channels, size = metadata["in_channels"], metadata["image_size"]
        dtype = "F32" if "maximum" in metadata else "U8"
        for name, part in self.parts.items():
            wanted = dtype, (len(part.files), channels, size, size)
            if file.layout(f"{name}.pictures") != wanted:
                refuse(self.path, f"{name}.pictures", "are not the pictures of these files")
        for key in ("mean", "std"):
            values = metadata.get(key)
            if not isinstance(values, list) or len(values) != channels or not all(is_number(v, 0, 1) for v in values):
                refuse(self.path, key, f"is {values!r:.60}")
        for key in ("fingerprint", *([] if self.val is None else ["held_out"])):
            if not isinstance(metadata.get(key), str):
                refuse(self.path, key, "is missing")
        return metadata

    def _checked_parts(self, names: Sequence[str], file: TensorFile) -> list[Pictures]:
        self._checked_metadata(file)
        found = [Pictures(file[f"{name}.pictures"], file[f"{name}.labels"]) for name in names]
        for name, part in zip(names, found, strict=True):
            if not torch.equal(part.labels, torch.tensor(self.parts[name].labels, dtype=torch.int64)):
                refuse(self.path, f"{name}.labels", "are not the labels of these files")
        return found


def _by_name(train: Part, test: Part, val: Part | None) -> dict[str, Part]:
    return {"train": train, "test": test, **({} if val is None else {"val": val})}


def cache_file(cache_dir: str | Path | None, name: str, size: int | str, base: Path, parts: Mapping[str, Part]) -> Path:
    """Name the cache of decoded files by all that it depends on.

    Args:
        cache_dir: the file lies in its folder ``decoded``; None: the user's cache folder.
        name: of the data set.
        size: of the pictures.
        base: folder of the files.
        parts: the files by part; their paths, labels, lengths and times of change are hashed.

    Raises:
        InputError: for a file that does not exist, such as a dangling link.
    """
    digest = hashlib.blake2b(f"{VERSION}|{base.resolve()}\n".encode(errors="surrogateescape"), digest_size=8)
    for part, (files, labels) in parts.items():
        for file, label in zip(files, labels, strict=True):
            try:
                stat = file.stat()
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror}); replace it or remove it") from error
            line = f"{part}|{label}|{file.relative_to(base).as_posix()}|{stat.st_size}|{stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return cache_folder(cache_dir) / "decoded" / f"{name}_{size}_{digest.hexdigest()}.safetensors"


def fill_cache(
    path: Path,
    train: Part,
    test: Part,
    *,
    channels: int,
    size: int,
    val: Part | None = None,
    deep: bool = False,
    **metadata: Any,
) -> None:
    """Decode all parts and write them to a cache, all at once; an interruption leaves no file.

    Beside the pictures it records their size, what :func:`measure` finds in the training part, :func:`fingerprints` of
    the contents, which copies of the files share, and if ``deep`` the "maximum" that pictures of 16 bits are scaled by.

    Raises:
        InputError: for an unreadable image, for more than memory holds, or where the cache cannot be written.
    """
    named = _by_name(train, test, val)
    values = sum(len(part.files) for part in named.values()) * channels * size**2
    needed = 3 * values * (4 if deep else 1)  # writing makes two copies
    check_memory(needed, f"{path.parent}: decoding to {size} px", "set data.image_size lower")
    parts, maximum = decode(named, channels=channels, size=size, deep=deep)
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part._asdict().items()}
    found = {
        "in_channels": channels,
        "image_size": size,
        **measure(parts["train"].pictures),
        **fingerprints(parts["train"], parts["test"], parts.get("val")),
        **({"maximum": maximum} if deep else {}),
    }
    try:
        write_tensors(path, tensors, kind=KIND, metadata={**found, **metadata})
    except OSError as error:
        raise InputError(
            f"{path}: the decoded images cannot be written there ({error.strerror or error}); set data.cache_dir"
        ) from error


COPIES = 17  # of the matrix, float32, that fitting takes at its peak, as measured


def cached_whitening(pictures: Tensor, name: str, *, eps: float, cache_dir: str | Path | None) -> Whitening:
    """Read the whitening of some pictures from the cache, or fit it and write it there, atomically.

    It is fitted again where the file is damaged, or something else.

    Args:
        pictures: (N, C, H, W), uint8 or float32 in [0, 1].
        name: of the data set, for the file's name, which says all that a whitening depends on.
        eps: added to the eigenvalues.
        cache_dir: the file lies in its folder ``whitening``; None: the user's cache folder.

    Raises:
        InputError: where it would take more memory than the machine has, or cannot be written.
    """
    data = fingerprint(pictures)
    file = f"zca_{name.replace(' ', '-')}_{data}_{eps}_kornia{version('kornia')}.safetensors"
    path = cache_folder(cache_dir) / "whitening" / file
    values = pictures[0].numel()
    if path.is_file():
        try:
            whitening = Whitening.load(path)
            if (whitening.mean.numel(), whitening.eps, whitening.fitted_on) == (values, eps, data):
                return whitening
            reason = f"{path}: is of other pictures"
        except InputError as error:
            reason = str(error).removesuffix("; make it again")
        rank_zero_warn(f"{reason}; the whitening is fitted again")
    what = f"whitening {values:,} values per image, by a matrix of {values:,} x {values:,} ({values**2 * 4:,} bytes),"
    check_memory(COPIES * values**2 * 4, what, "leave out zca, or set data.image_size lower")
    rank_zero_info(f"fitting the whitening, {values} x {values}, on {len(pictures)} images")
    whitening = Whitening.fit(unit_range(pictures), eps=eps, fitted_on=data)
    try:
        whitening.save(path)
    except OSError as error:
        raise InputError(
            f"{path}: the whitening cannot be written there ({error.strerror or error}); set data.cache_dir"
        ) from error
    return whitening
