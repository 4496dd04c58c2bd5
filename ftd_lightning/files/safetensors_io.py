"""Reading and writing files: atomically, with checksums, without pickle."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

import ftd_lightning
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor


KEY = "ftd_lightning"
FORMAT = 1
UNKNOWN = "0" * 16  # stands for a checksum until the values have been written
# As the safetensors format abbreviates them, in the order in which its own writer sorts tensors: wide ones first.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def versions() -> dict[str, str]:
    """Name what the last bits of a result depend on: versions, and the precision of float32 matrix products."""
    return {
        "ftd_lightning": ftd_lightning.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def fingerprint(*tensors: Tensor) -> str:
    """Hash the values, shapes and dtypes of tensors.

    Example:
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(3))
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def checksum(values: bytes) -> str:
    """Hash bytes against accidents, such as a flipped bit; 16 hex digits."""
    return hashlib.blake2b(values, digest_size=len(UNKNOWN) // 2).hexdigest()


def tensor_checksum(tensor: Tensor) -> str:
    """Hash a tensor with its dtype and shape, as :func:`checksum` does bytes."""
    digest = hashlib.blake2b(f"{DTYPES[tensor.dtype]} {list(tensor.shape)} ".encode(), digest_size=len(UNKNOWN) // 2)
    digest.update(raw(tensor.contiguous()))
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, not copied; numpy does not know all dtypes of torch."""
    values: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return values


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; on a clean exit it goes to disk and takes the place of ``path``.

    Every writer gets a name of its own, so concurrent writers of one file do not disturb each other: the last one to
    finish wins, and readers see a whole file at any time. What writers of this machine left behind when they were
    killed is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file is to be written here", str(path))
    prefix = f".{path.name}.{_machine()}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*.part"):
        writer = left.name.removeprefix(prefix).partition("-")[0]
        if writer.isdecimal() and not _is_running(int(writer)):
            left.unlink(missing_ok=True)
    part = path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # names the file, not its part
    finally:
        part.unlink(missing_ok=True)


def _machine() -> str:
    """Name the machine, and the container where process numbers are the container's own, in 8 hex digits."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return hashlib.blake2b(f"{platform.node()} {processes}".encode(), digest_size=4).hexdigest()


def _is_running(process: int) -> bool:
    if sys.platform == "win32":  # os.kill ends the process there, whatever the signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, kind: str, metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata to one file, atomically.

    Args:
        path: the file; its folder is made.
        tensors: on any device, of any layout in memory.
        kind: what the file is, e.g. "synthetic_set".
        metadata: anything that JSON holds.
    """
    ranks = list(DTYPES)
    names = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    layout = [(name, tensors[name].dtype, tensors[name].shape) for name in names]
    write_in_turn(path, layout, (tensors[name] for name in names), kind=kind, metadata=metadata)


def write_in_turn(
    path: Path,
    layout: Sequence[tuple[str, torch.dtype, torch.Size]],
    tensors: Iterable[Tensor],
    *,
    kind: str,
    metadata: Mapping[str, Any],
) -> None:
    """Write tensors to one file, atomically, one after the other: none is kept in memory.

    safetensors' own writer needs them all at once, and makes a file of its own beside the target, which a kill leaves
    behind and only its owner may read. The format: the header's length as 8 bytes, the header as JSON, the values.

    Args:
        path: the file; its folder is made.
        layout: name, dtype and shape of each tensor, wide dtypes first, so that all are aligned.
        tensors: as many, in that order; an error while one is made leaves the old file as it was.
        kind: what the file is, e.g. "synthetic_set".
        metadata: anything that JSON holds.

    Raises:
        ValueError: if a tensor does not have the dtype or shape that was announced.
    """
    checksums = dict.fromkeys((name for name, *_ in layout), UNKNOWN)
    recorded = {**metadata, "kind": kind, "format": FORMAT}
    with replacing(path) as part, part.open("wb") as file:
        file.write(_header(layout, recorded, checksums))
        remaining = iter(tensors)
        for name, dtype, shape in layout:
            tensor = next(remaining).detach().cpu().contiguous()
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {dtype} {tuple(shape)}"
                )
            checksums[name] = tensor_checksum(tensor)
            file.write(raw(tensor))
            del tensor  # before the next one is read
        file.seek(0)
        file.write(_header(layout, recorded, checksums))  # as long as before


def _header(
    layout: Sequence[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, Any], checksums: Mapping[str, str]
) -> bytes:
    """Format what comes before the values: the header's length as 8 bytes, and the header as JSON."""
    content = {**metadata, "checksums": checksums, "checksum": UNKNOWN}
    described = json.dumps(content, sort_keys=True)
    described = json.dumps({**content, "checksum": checksum(described.encode())}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {KEY: described}}
    end = 0
    for name, dtype, shape in layout:
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None.

    Example:
        >>> without_nan({"a": [1.0, float("nan")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as a JSON file."""
    text = json.dumps(without_nan(value), indent=indent, allow_nan=False)
    with replacing(path) as part:
        part.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping that this library keeps for its next run.

    Returns:
        The mapping; an empty one where the file is missing, damaged, or holds something else, so it is made again.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _open(path: Path) -> Any:
    """Open a safetensors file of which header and values belong together.

    safetensors opens the path once for each, and a writer may replace the file in between.
    """
    while True:
        before = _version(path)
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, RuntimeError):
            if _version(path) == before:
                raise
        else:
            if _version(path) == before:
                return file


def file_kind(path: Path) -> str | None:
    """Read what a safetensors file says it is; None for one that another program wrote.

    Raises:
        InputError: for a file that is truncated or not in this format.
    """
    try:
        header = json.loads((_open(path).metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, OSError, RuntimeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: truncated, or not a safetensors file ({reason})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: its metadata is no mapping; make it again")
    kind = header.get("kind")
    return kind if isinstance(kind, str) else None


class TensorFile:
    """An open safetensors file of this library: its metadata, and tensors read one by one.

    Metadata and every tensor are checked against the checksums in the file; files of version 0.1 have none.

    Args:
        path: the file.
        kind: what the file must be, e.g. "synthetic_set".

    Raises:
        InputError: for a file that is missing, truncated, damaged, of a newer format, or not of this library and kind.
    """

    def __init__(self, path: Path, *, kind: str) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            self._file = _open(path)
            text = (self._file.metadata() or {}).get(KEY, "{}")
            header = json.loads(text)
        except (SafetensorError, OSError, RuntimeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: truncated, or not a safetensors file ({reason}); make it again") from error
        if not isinstance(header, dict):
            raise InputError(f"{path}: its metadata is no mapping; make it again")
        self._check(header, text, kind)
        self._checksums = header.pop("checksums", None)
        header.pop("checksum", None)
        self.metadata: dict[str, Any] = header

    def _check(self, header: dict[str, Any], text: str, kind: str) -> None:
        found = header.get("kind")
        if found != kind:
            other = (
                f"a {found.replace('_', ' '):.60}" if isinstance(found, str) else "a file that another program wrote"
            )
            raise InputError(f"{self.path}: a {kind.replace('_', ' ')} is needed here, this is {other}")
        recorded = header.get("format", FORMAT)
        if type(recorded) is not int or recorded < 1:
            raise InputError(f"{self.path}: format is {recorded!r:.60}, which no version of ftd_lightning writes")
        if recorded > FORMAT:
            raise InputError(
                f"{self.path}: has format {recorded!r:.60}, written by a newer version of ftd_lightning; upgrade to "
                "read it"
            )
        if "checksum" in header or "checksums" in header:
            own = header.get("checksum")
            content = text.replace(f'"checksum": "{own}"', f'"checksum": "{UNKNOWN}"')
            checksums = header.get("checksums")
            if own != checksum(content.encode()) or not isinstance(checksums, dict) or self.names != checksums.keys():
                raise InputError(f"{self.path}: is damaged, its metadata has another checksum; make it again")

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: has no tensor {name!r} ({reason}); make it again") from error
        if self._checksums is not None and self._checksums[name] != tensor_checksum(tensor):
            raise InputError(f"{self.path}: is damaged, {name} has another checksum; make it again")
        return tensor

    def layout(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Return dtype and shape of a tensor without reading it; None for a dtype that this library never writes.

        Raises:
            InputError: where there is no such tensor.
        """
        if name not in self.names:
            raise InputError(f"{self.path}: has no tensor {name!r}; make it again")
        part = self._file.get_slice(name)
        return TORCH_DTYPES.get(part.get_dtype()), tuple(part.get_shape())

    def numel(self, name: str) -> int:
        """Count the values of a tensor without reading it."""
        return int(torch.Size(self.layout(name)[1]).numel())

    def with_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose names begin with a prefix; the keys lack it."""
        return {name.removeprefix(prefix): self[name] for name in sorted(self.names) if name.startswith(prefix)}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder`` to fill; on a clean exit it becomes ``folder``, otherwise it is removed.

    Raises:
        InputError: if ``folder`` exists and is not an empty folder.
    """
    folder = Path(os.path.realpath(folder))  # resolve() raises for a loop of links
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder.name}: is there already and not an empty folder; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        part.mkdir()
        yield part
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        if error.errno is None or not str(error.filename).startswith(str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # names the folder, not its part
    finally:
        shutil.rmtree(part, ignore_errors=True)
