"""When a fit ends: what is done every few epochs is done at the end too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def is_last_epoch(trainer: Trainer) -> bool:
    """Tell, in ``on_train_epoch_end``, whether the fit ends with this epoch."""
    steps_done = 0 <= trainer.max_steps <= trainer.global_step
    return trainer.should_stop or steps_done or trainer.current_epoch + 1 == trainer.max_epochs
