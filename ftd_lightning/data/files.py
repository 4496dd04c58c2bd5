"""Safetensors files that say what they are, written so that a kill leaves the old one or the new one.

One metadata key holds JSON: safetensors keeps several in no fixed order, which would make equal contents unequal files.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import ftd_lightning
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

KEY = "ftd_lightning"


def run_folder(trainer: Any) -> Path:
    """Name the folder where a fit's files go: beside its logs, or the trainer's default where it keeps none.

    The trainer's own ``log_dir`` is a broadcast: asked for by the first rank alone, it waits for the others for ever.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    return Path(folder or trainer.default_root_dir)


def versions() -> dict[str, str]:
    """Name the versions that a result depends on."""
    return {
        "ftd_lightning": ftd_lightning.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }


def fingerprint(*tensors: Tensor) -> str:
    """Hash the values of tensors, shapes and types included.

    Example:
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(3))
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; on a clean exit it goes to disk and takes the place of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, kind: str, metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata to one file, atomically.

    Args:
        path: the file; its folder is made.
        tensors: copied to the CPU and made contiguous.
        kind: what the file is, e.g. "synthetic_set".
        metadata: anything that JSON holds.
    """
    # Copies: the format refuses two names for one memory. The bytes are written here, for safetensors' own writer makes
    # a file of its own beside the target, which a kill leaves behind, and which only its owner may read.
    layout = torch.contiguous_format
    ready = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in tensors.items()}
    header = json.dumps({**metadata, "kind": kind, "format": 1}, sort_keys=True)
    with replacing(path) as part:
        part.write_bytes(save(ready, metadata={KEY: header}))


class TensorFile:
    """An open safetensors file of this library: its metadata, and tensors read one by one.

    Args:
        path: the file.
        kind: what it has to be.

    Raises:
        InputError: for a file that is missing, truncated, or not of this library and kind.
    """

    def __init__(self, path: Path, *, kind: str) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            self._file = safe_open(path, framework="pt")
            header = json.loads((self._file.metadata() or {}).get(KEY, "{}"))
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: truncated, or not a safetensors file ({error}); make it again") from error
        if header.get("kind") != kind:
            found = header.get("kind", "a file that another program wrote")
            raise InputError(f"{path}: a {kind.replace('_', ' ')} is needed here, this is {found.replace('_', ' ')}")
        self.metadata: dict[str, Any] = header

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.path}: has no tensor {name!r} ({error}); make it again") from error
        return tensor

    def numel(self, name: str) -> int:
        """Number of values of a tensor, without reading it."""
        if name not in self.names:
            raise InputError(f"{self.path}: has no tensor {name!r}; make it again")
        return int(torch.Size(self._file.get_slice(name).get_shape()).numel())
