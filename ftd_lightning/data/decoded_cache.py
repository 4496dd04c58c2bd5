"""Image files decoded once, into a cache that later runs map into memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn

from ftd_lightning.data.cache_folder import cache_folder, check_memory
from ftd_lightning.data.decoding import decode
from ftd_lightning.data.files import write_tensors
from ftd_lightning.data.images import Parts, Pictures, fingerprints
from ftd_lightning.data.pixel_statistics import measure
from ftd_lightning.data.schema import is_number, refuse
from ftd_lightning.data.tensor_file import TensorFile
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ftd_lightning.data.image_tree import Part

KIND = "decoded_images"
VERSION = 2  # of how files are decoded; caches of another one are not read

T = TypeVar("T")


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
        dtype = torch.float32 if "maximum" in metadata else torch.uint8
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
