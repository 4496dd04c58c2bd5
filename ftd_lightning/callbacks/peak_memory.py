"""How much memory a fit takes at its peak, noted beside its logs."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback

from ftd_lightning.data.json_files import read_json, write_json
from ftd_lightning.training.run_folder import run_folder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

FILE = "peak_memory.json"
MIB = 1 << 20


def process_peak() -> float:
    """Give the most memory that this process has held so far, in MiB, shared libraries included.

    Example:
        >>> process_peak() > 10
        True
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    import resource  # what is left of Unix; on Linux it would count the memory of the process that started this one

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (MIB if sys.platform == "darwin" else 1024)


class PeakMemory(Callback):
    """Writes ``peak_memory.json`` beside the logs: {"process": MiB} and on a GPU {"device": MiB of tensors}.

    The first rank's, over all runs of a fit that was resumed.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note it; a kill loses an epoch's at most."""
        if not trainer.is_global_zero:
            return
        file = run_folder(trainer) / FILE
        peaks = {"process": process_peak()}
        if pl_module.device.type == "cuda":
            peaks["device"] = torch.cuda.max_memory_allocated(pl_module.device) / MIB
        before = {key: value for key, value in read_json(file).items() if isinstance(value, (int, float))}
        highest = {key: round(max(value, before.get(key, 0.0)), 1) for key, value in peaks.items()}
        if highest != before:
            write_json(file, highest, indent=None)
