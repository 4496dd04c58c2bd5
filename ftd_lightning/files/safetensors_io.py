"""Reading and writing files: atomically, with checksums, without pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ftd_lightning
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor


KEY = "ftd_lightning"
FORMAT = 1
UNKNOWN = "0" * 16  # stands in the metadata for its own checksum while that is computed
DTYPES = {  # that are written, as the safetensors format abbreviates them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
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
    """Hash the values, shapes and dtypes of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def _checksum(*parts: bytes | memoryview) -> str:
    """Hash bytes against accidents, such as a flipped bit; 16 hex digits."""
    digest = hashlib.blake2b(digest_size=len(UNKNOWN) // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensor_checksum(tensor: Tensor) -> str:
    return _checksum(f"{DTYPES[tensor.dtype]} {list(tensor.shape)} ".encode(), _bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU; numpy does not know all dtypes of torch."""
    values: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return values


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; on a clean exit that file takes its place, whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, kind: str, metadata: Mapping[str, Any]) -> None:
    """Write tensors, on any device and of any layout, and metadata that JSON holds to one file, atomically."""
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        shared = any(values.data_ptr() == other.data_ptr() for other in written.values())
        written[name] = values.clone() if shared else values  # save_file refuses one tensor of two names
    checksums = {name: _tensor_checksum(tensor) for name, tensor in written.items()}
    header = {**metadata, "kind": kind, "format": FORMAT, "checksums": checksums, "checksum": UNKNOWN}
    header["checksum"] = _checksum(json.dumps(header, sort_keys=True).encode())
    with replacing(path) as part:
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(written, part, metadata={KEY: json.dumps(header, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        part.chmod(mode)  # save_file lets only the owner read it


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as a JSON file."""
    text = json.dumps(without_nan(value), indent=indent, allow_nan=False)
    with replacing(path) as part:
        part.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping; an empty one where the file is missing, damaged, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class TensorFile:
    """An open safetensors file: ``metadata``, and tensors by ``names``; both are checked against its checksums.

    An InputError refuses a file that is missing, damaged, of a newer format or of another ``kind`` than the one given.
    The attribute ``kind`` is the file's own; None for one that another program wrote.
    """

    def __init__(self, path: Path, *, kind: str | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            self._file = safe_open(path, framework="pt")
            self.names = set(self._file.keys())
            text = (self._file.metadata() or {}).get(KEY, "{}")
            header = json.loads(text)
        except (SafetensorError, OSError, RuntimeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: truncated, or not a safetensors file ({error}); make it again") from error
        if not isinstance(header, dict):
            raise InputError(f"{path}: its metadata is not a mapping; make it again")
        self.kind: str | None = header["kind"] if isinstance(header.get("kind"), str) else None
        if kind not in (None, self.kind):
            found = f"a {self.kind.replace('_', ' '):.60}" if self.kind else "a file that another program wrote"
            raise InputError(f"{path}: a {kind.replace('_', ' ')} is needed here, this is {found}")
        recorded = header.get("format", FORMAT)
        if type(recorded) is not int or recorded != FORMAT:
            raise InputError(
                f"{path}: has format {recorded!r:.60}, not {FORMAT}: is damaged, or of a newer ftd_lightning"
            )
        own, self._checksums = header.pop("checksum", None), header.pop("checksums", None)
        if (own, self._checksums) != (None, None):
            content = text.replace(f'"checksum": "{own}"', f'"checksum": "{UNKNOWN}"')
            known = isinstance(self._checksums, dict) and self._checksums.keys() == self.names
            if own != _checksum(content.encode()) or not known:
                raise InputError(f"{path}: is damaged, its metadata has another checksum; make it again")
        self.metadata: dict[str, Any] = header

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def read(self, name: str, *, verify: bool = True) -> Tensor:
        """Map a tensor into memory; to ``verify`` its checksum, all of it is read."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: has no tensor {name!r} ({error}); make it again") from error
        if verify and self._checksums is not None and self._checksums[name] != _tensor_checksum(tensor):
            raise InputError(f"{self.path}: is damaged, {name} has another checksum; make it again")
        return tensor

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the dtype, as safetensors names it, and the shape of a tensor without reading it."""
        if name not in self.names:
            raise InputError(f"{self.path}: has no tensor {name!r}; make it again")
        part = self._file.get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def with_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose names begin with a prefix; the keys lack it."""
        return {name.removeprefix(prefix): self[name] for name in sorted(self.names) if name.startswith(prefix)}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder`` to fill; on a clean exit it becomes ``folder``, otherwise it is removed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile(".")):
        raise InputError(f"{folder}: is there already and not an empty folder, or is the current one; name another")
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
        if error.errno is None or error.filename != str(part):
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # names the folder, not its part
    finally:
        shutil.rmtree(part, ignore_errors=True)
