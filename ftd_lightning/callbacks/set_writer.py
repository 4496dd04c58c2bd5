"""Writes the synthetic set of a distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.evaluation import is_due
from ftd_lightning.contracts import LearnsSet, TrainingSet
from ftd_lightning.core.module import run_folder
from ftd_lightning.core.resume import HARMLESS, as_json
from ftd_lightning.errors import InputError
from ftd_lightning.files.schema import per_cent
from ftd_lightning.files.synthetic_set import SyntheticSet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import LightningModule, Trainer

FREE = (*HARMLESS, "measure_every")  # settings that change no set


def _identity(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata and settings that differ between sets of different runs."""
    settings = {key: value for key, value in metadata.get("settings", {}).items() if key not in FREE}
    keys = ("method", "dataset", "network", "backbone")
    return {**settings, **{key: metadata[key] for key in keys if key in metadata}}


def summary(metadata: Mapping[str, Any]) -> str:
    """Sum up a distilled set in words: its iterations, the last loss and, where it was measured, its accuracy."""
    loss = [f"loss {metadata['loss']:.4g}"] if "loss" in metadata else []
    scores = metadata.get("scores", {})
    measured = [name for name in scores if "held-out" in name] or list(scores)
    each = [f"{per_cent(scores[name])} % ({name})" for name in measured]
    return ", ".join([f"the set after {metadata['iterations']} iterations", *loss, *each])


class SyntheticSetWriter(Callback):
    """Writes the set every few epochs, at the end, and when the run is interrupted or fails.

    A set with values that are not finite is never written, so the last good one stays on disk. Modules that learn no
    set are left alone. Only the first process writes.

    Args:
        path: the file; None is ``set.safetensors`` beside the logs.
        every_n_epochs: how often, in Lightning epochs of ``iterations_per_epoch``; 0: not before the end.

    Raises:
        InputError: when the fit starts, if the file contains a set of other settings.
    """

    def __init__(self, path: str | None = None, every_n_epochs: int = 1) -> None:
        check_bounds(SyntheticSetWriter, locals())
        self.every_n_epochs = every_n_epochs
        self.path = None if path is None else Path(path).expanduser()
        self._training = False
        self.written: TrainingSet | None = None

    def file(self, trainer: Trainer) -> Path:
        """Return the set's file."""
        return self.path or run_folder(trainer) / "set.safetensors"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to overwrite the set of a run with other settings."""
        if not isinstance(pl_module, LearnsSet) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # On every rank, so that none waits for one that refuses; under the first rank's name for it.
        file = Path(trainer.strategy.broadcast(str(self.file(trainer))))
        if not file.exists() or trainer.ckpt_path:  # a resumed fit may have been given more to do
            return
        there = _identity(SyntheticSet.read_metadata(file))
        planned = _identity(as_json(pl_module.synthetic_set().metadata))  # as the file holds it: lists for tuples
        different = [key for key in planned if key in there and there[key] != planned[key]]
        if different:
            raise InputError(
                f"{file}: holds a set made with another {', '.join(different)}; name another folder, or delete this set"
            )

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(module, LearnsSet) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            synthetic = module.synthetic_set()
            synthetic.save(self.file(trainer))
            self.written = synthetic

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget earlier fits of the trainer."""
        self._training, self.written = False, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that there is a set to write when the run fails."""
        self._training = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the current set where it is due."""
        if is_due(trainer, self.every_n_epochs, times=1):
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final set, and say so."""
        self._write(trainer, pl_module)
        if self.written is not None:
            rank_zero_info(f"wrote {self.file(trainer)}: {summary(self.written.metadata)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last good set before the run ends; nothing where it failed before training began."""
        if self._training and trainer.global_step > 0:
            try:
                self._write(trainer, pl_module)
            except InputError as error:  # values that are not finite; the run's own error is the one to tell
                rank_zero_warn(str(error))
