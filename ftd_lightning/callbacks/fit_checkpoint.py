"""A checkpoint when a signal ends a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


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
