"""A GPU that is not there: the "meta" device under a mode that sees every operation.

CPU tensors stay real; a tensor on the stand-in has a shape and no values, so backward and double backward run and the
sizes of papers cost no arithmetic. What the mode notes are the mistakes that only a GPU punishes, and counts.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
READS = {"_local_scalar_dense", "item", "equal", "nonzero", "_unique2", "unique_dim", "is_nonzero"}
MIXED = {"index", "index_put_", "_index_put_impl_", "copy_", "_to_copy"}  # take host indices or copy between devices


@dataclass
class Seen:
    """What was noted, each entry as "operation at file:line"."""

    reads: list[str] = field(default_factory=list)
    copies_out: list[str] = field(default_factory=list)
    blocking: list[str] = field(default_factory=list)  # copies from pageable memory that the host waits for
    mismatches: list[str] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)

    @property
    def launched(self) -> int:
        return sum(self.launches.values())


def _where(name: str) -> str:
    """The innermost line of this library, or of the test."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "ftd_lightning" in path.parts and path.name != Path(__file__).name:
            return f"{name} at {path.name}:{frame.lineno}"
    return f"{name} outside of the library"


def _is_view(func) -> bool:
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


class StandIn(TorchDispatchMode):
    """Notes what happens to tensors on the stand-in; ``seen`` may be replaced to look at a part of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # there operations like "to" come before they are taken apart
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = self._dispatch(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self._account(tensor.untyped_storage())
        return result

    def _account(self, storage: torch.UntypedStorage) -> None:
        """Count the bytes of a storage from here on until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size

    def _dispatch(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if t.device == META]
        here = [t for t in tensors if t.device != META]
        if name == "_to_copy" and tensors:
            return self._to_copy(func, tensors[0], args, kwargs)
        if not there:
            return func(*args, **kwargs)
        if name in READS:
            self.seen.reads.append(_where(name))
            return self._read(name, there[0])
        if name == "copy_":
            target, source = args[0], args[1]
            if target.device != META:
                self.seen.copies_out.append(_where(name))
                return func(target, self._values(source))
            if source.device != META:
                if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                    self.seen.blocking.append(_where(name))
                return target
        elif name not in MIXED and any(t.dim() > 0 for t in here):
            self.seen.mismatches.append(_where(name))
        if not _is_view(func):
            self.seen.launches[name] += 1
        if name.startswith("_fused_"):  # an optimizer's step, in place, for which "meta" has no shapes to work out
            return None
        if name == "index" and here:  # host indices would be copied; shapes are all that is needed
            args = (args[0], [None if i is None else i.to(META) for i in args[1]])
        elif name in ("index_put_", "_index_put_impl_") and here:
            return args[0]
        return func(*args, **kwargs)

    @staticmethod
    def _values(source: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values for what a GPU would have computed: random, or a recorder would see epochs without any progress."""
        dtype = dtype or source.dtype
        if dtype.is_floating_point:
            return torch.rand(source.shape, dtype=torch.float32).to(dtype)
        return torch.zeros(source.shape, dtype=dtype)

    def _read(self, name: str, tensor: torch.Tensor):
        if name == "nonzero":
            return torch.zeros(0, max(tensor.dim(), 1), dtype=torch.long, device=META)
        if name == "_unique2":
            return tuple(torch.zeros(0, dtype=torch.long, device=META) for _ in range(3))
        if name == "equal":
            return False
        return False if tensor.dtype == torch.bool else 0.0 if tensor.dtype.is_floating_point else 0

    def _to_copy(self, func, source, args, kwargs):
        device = kwargs.get("device")
        target = source.device if device is None else torch.device(device)
        if source.device == META and target != META:
            self.seen.copies_out.append(_where("_to_copy"))
            return self._values(source, kwargs.get("dtype"))
        if source.device != META and target == META:
            if not kwargs.get("non_blocking"):
                self.seen.blocking.append(_where("_to_copy"))
        elif source.device == META:
            self.seen.launches["_to_copy"] += 1
        return func(*args, **kwargs)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Do nothing: the CPU's own refuses another device."""


class StepsSeen(Callback):
    """Keeps what was seen within each training step: from the batch's start to the end of its other callbacks."""

    def __init__(self, mode: StandIn) -> None:
        self.mode, self.steps = mode, []
        self._outside = mode.seen

    def on_train_batch_start(self, *_) -> None:
        self._outside, self.mode.seen = self.mode.seen, Seen()

    def on_train_batch_end(self, *_) -> None:
        self.steps.append(self.mode.seen)
        self.mode.seen = self._outside


@contextlib.contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """Give the mode, with what is missing for "meta" patched."""
    real = torch.autocast

    def autocast(device_type: str, *args, **kwargs):
        return contextlib.nullcontext() if device_type == "meta" else real(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast)
    # A fused optimizer refuses devices that it does not know; torch.optim hides the module where it does.
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        home = sys.modules[optimizer.__module__]
        monkeypatch.setattr(home, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    with StandIn() as mode:
        yield mode


def stand_in_trainer(
    folder: Path, mode: StandIn, *callbacks: Callback, two_ranks: bool = False, **options
) -> tuple[Trainer, StepsSeen]:
    """A trainer whose device is the stand-in, and what its steps did there; of two processes within `collectives`."""
    steps = StepsSeen(mode)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_epochs": -1, "num_sanity_val_steps": 0, "default_root_dir": str(folder), **quiet, **options}
    strategy = (_TwoRanks if two_ranks else SingleDeviceStrategy)(device=META, accelerator=_Accelerator())
    return Trainer(strategy=strategy, callbacks=[*callbacks, steps], **settings), steps


class _TwoRanks(SingleDeviceStrategy):
    """One of two processes, whose collectives are those of :func:`collectives`."""

    world_size = 2

    def reduce(self, tensor, *args, **kwargs):
        if isinstance(tensor, torch.Tensor):
            torch.distributed.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def collectives(monkeypatch: pytest.MonkeyPatch):
    """Give a list of (name, device) of every tensor that goes through a collective; the other process agrees."""
    seen: list[tuple[str, torch.device]] = []

    def takes_tensor(name: str):
        def collective(*args, **kwargs):
            seen.extend((name, t.device) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))

        return collective

    def all_gather_object(values, value, group=None):
        values[:] = [value] * len(values)

    distributed = torch.distributed
    for name in ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(distributed, name, takes_tensor(name))
    monkeypatch.setattr(distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda values, *args, **kwargs: None)
    monkeypatch.setattr(distributed, "barrier", lambda *args, **kwargs: None)
    group = SimpleNamespace(monitored_barrier=lambda *args, **kwargs: None)  # Lightning's, of the host
    monkeypatch.setattr(distributed, "new_group", lambda *args, **kwargs: group)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda *args: None)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: _TwoRanks.world_size)
    monkeypatch.setattr(distributed, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(_AcceleratorConnector, "is_distributed", True)
    monkeypatch.setattr(distributed, "get_rank", lambda group=None: 0)
    yield seen
