"""Tensors from files of other programs, read without running code that such a file may contain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _read_safetensors(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise InputError(f"{path}: holds {len(names)} tensors, a file of one is needed")
            tensor: Tensor = file.get_tensor(names[0])
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from error
    return tensor


def _read_numpy(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several arrays")
        # torch has no arrays of the other byte order.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (ValueError, TypeError, EOFError, OSError, MemoryError) as error:
        raise InputError(f"{path}: not one plain array of numbers that numpy.save wrote") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A foreign file can make torch raise anything. Its advice, to load with code allowed, is left out.
    except Exception as error:
        raise InputError(
            f"{path}: not a plain tensor that torch.save wrote: it is broken or would run code when read, and was not "
            "read; save the tensor alone"
        ) from error


def read_tensor(path: Path) -> Tensor:
    """Read a file of one tensor; no code that it may contain is run.

    Args:
        path: ``.npy``, ``.safetensors``, or anything else for what ``torch.save`` wrote.

    Returns:
        A dense tensor on the CPU, of integers or real numbers.

    Raises:
        InputError: for a file that is missing, broken, pickled code, or anything but one such tensor.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    read = {".npy": _read_numpy, ".safetensors": _read_safetensors}.get(path.suffix.lower(), _read_torch)
    tensor = read(path)
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path}: holds a {type(tensor).__name__}, a file of one tensor is needed")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in (*INTEGERS, *FLOATS):
        raise InputError(f"{path}: holds a {tensor.layout} tensor of {tensor.dtype}, dense numbers are needed")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: holds values that are not finite")
    return tensor.detach().contiguous()
