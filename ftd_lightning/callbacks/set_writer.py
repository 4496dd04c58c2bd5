"""Writes the synthetic set of a distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from ftd_lightning.data.files import run_folder
from ftd_lightning.errors import InputError
from ftd_lightning.training.distillation import Distillation

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SyntheticSetWriter(Callback):
    """Writes the set after every epoch, at the end, and when the run is interrupted or fails.

    A set with values that are not finite is never written, so what lies on disk is always the last good one.

    Args:
        path: the file; None is ``set.safetensors`` beside the logs.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that makes no set."""
        if not isinstance(pl_module, Distillation):
            raise InputError(f"SyntheticSetWriter writes what a distillation makes, not {type(pl_module).__name__}")

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(module, Distillation):
            module.synthetic_set().save(self.path or run_folder(trainer) / "set.safetensors")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the present set."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final set."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is before the run ends; nothing where it failed before training began."""
        if trainer.global_step > 0:
            try:
                self._write(trainer, pl_module)
            except InputError as error:  # values that are not finite: the run's own error is the one to tell
                rank_zero_warn(str(error))
