"""Reading the files that :mod:`ftd_lightning.data.files` writes: what they are, and whether they are whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ftd_lightning.data.files import DTYPES, FORMAT, KEY, UNKNOWN, checksum, tensor_checksum
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

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
