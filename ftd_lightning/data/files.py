"""Safetensors files that say what they are, written so that a kill leaves the old one or the new one.

One metadata key holds JSON: safetensors keeps several in no fixed order, which would make equal contents unequal files.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import secrets
import sys
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

import ftd_lightning

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

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
