"""Checkpoints of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ftd_lightning.core.resume import read_checkpoint
from ftd_lightning.files.safetensors_io import replacing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it; reads no checkpoint that would run code.

    Lightning's own goes through the system's temporary folder, often another file system: moving a file from there
    copies it, and a kill in the middle leaves a torn ``last.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local path atomically; remote ones as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path).expanduser()) as part:
            super().save_checkpoint(checkpoint, part, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, see :func:`read_checkpoint`; ``weights_only=False`` runs the code in it."""
        allowed = True if weights_only is None else weights_only
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, allowed)  # type: ignore[no-any-return]
        return read_checkpoint(path, map_location=map_location, weights_only=allowed)


class FitCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which also saves the step after which SIGTERM or Ctrl-C ends the fit.

    Not on several ranks: those may see the signal at different steps, and a checkpoint takes all of them.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is due, and after the last step of a fit that a signal ends."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_at_signal(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when it is due, and after the last epoch of a fit that a signal ends."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_at_signal(trainer)

    def _save_at_signal(self, trainer: Trainer) -> None:
        if trainer.received_sigterm and trainer.world_size == 1 and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
