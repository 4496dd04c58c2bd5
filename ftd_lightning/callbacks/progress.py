"""One progress bar for the whole fit, with the time left."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from ftd_lightning.core.module import BaseModule, run_folder
from ftd_lightning.files.safetensors_io import read_json, write_json

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FitProgress(ProgressBar):
    """Counts the batches of the whole fit, where Lightning's bars restart with every epoch.

    Args:
        refresh_seconds: how often metrics are written into the bar.
    """

    def __init__(self, refresh_seconds: float = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        """Draw nothing, e.g. on other ranks than the first."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where a resumed run left it."""
        planned = pl_module.planned_epochs() if isinstance(pl_module, BaseModule) else None
        epochs = [limit for limit in (planned, trainer.max_epochs) if limit is not None and limit >= 0]
        limits = [limit * trainer.num_training_batches for limit in epochs]
        limits += [trainer.max_steps] if trainer.max_steps >= 0 else []
        total = min(limits, default=math.inf)
        self._bar = tqdm(
            total=None if total == math.inf else int(total),
            initial=trainer.fit_loop.epoch_loop.total_batch_idx + 1,
            desc=type(pl_module).__name__,
            disable=not self._enabled,
            mininterval=self.refresh_seconds,
            dynamic_ncols=True,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by one; refresh the text only when the bar is drawn, because metrics cost a wait for the device."""
        if self._bar is not None and self._bar.update():
            if isinstance(pl_module, BaseModule):
                self._bar.set_description_str(pl_module.progress_label(), refresh=False)
            metrics = self.get_metrics(trainer, pl_module)
            metrics.pop("v_num", None)
            self._bar.set_postfix(metrics, refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that an error begins a new line."""
        self.on_train_end(trainer, pl_module)


FILE = "peak_memory.json"


class PeakMemory(Callback):
    """Writes the first rank's memory to ``peak_memory.json``: {"process": MiB} and on a GPU {"device": MiB of tensors}.

    The file lies beside the logs and holds the highest values of all runs of a resumed fit. Shared libraries count. It
    has no "process" where the system does not tell (on Linux it does).
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the file."""
        if not trainer.is_global_zero:
            return
        file, peaks = run_folder(trainer) / FILE, {}
        with suppress(OSError, StopIteration, ValueError):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            peaks["process"] = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
        if pl_module.device.type == "cuda":
            peaks["device"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
        before = read_json(file)
        highest = {key: round(max(value, before.get(key, 0.0)), 1) for key, value in peaks.items()}
        if highest != before:
            write_json(file, highest, indent=None)
