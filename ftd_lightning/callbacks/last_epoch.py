"""When something is due that is done every few epochs of a fit, and at its end too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def is_last_epoch(trainer: Trainer) -> bool:
    """Tell, in ``on_train_epoch_end``, whether the fit ends with this epoch."""
    steps_done = 0 <= trainer.max_steps <= trainer.global_step
    return trainer.should_stop or steps_done or trainer.current_epoch + 1 == trainer.max_epochs


def is_due(trainer: Trainer, every_n_epochs: int | None, *, times: int) -> bool:
    """Tell, in ``on_train_epoch_end``, whether what is done every few epochs is due, the end of the fit aside.

    Args:
        trainer: of the fit.
        every_n_epochs: how often; 0 is never; None: often enough to be done so many times in the whole fit.
        times: that number.
    """
    if every_n_epochs is None:
        per_epoch, epochs = int(trainer.num_training_batches), trainer.max_epochs
        limits = [epochs] if epochs is not None and epochs > 0 else []
        limits += [-(-trainer.max_steps // per_epoch)] if trainer.max_steps > 0 else []
        every_n_epochs = -(-min(limits) // times) if limits else 10
    return every_n_epochs > 0 and (trainer.current_epoch + 1) % every_n_epochs == 0
