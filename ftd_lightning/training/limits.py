"""How far a trainer's limits let a fit go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def allowed_epochs(trainer: Trainer, *, first_epoch: int, first_step: int, otherwise: int) -> int:
    """Count the epochs that a fit may take, at least 1.

    Convention: ``max_epochs`` decides, else ``max_steps``; beside it, ``max_steps`` merely interrupts the fit.

    Args:
        trainer: of the fit, its loaders set up.
        first_epoch: the trainer's epoch when the fit began.
        first_step: its step then.
        otherwise: for a trainer without either limit.
    """
    epochs = otherwise
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs = trainer.max_epochs - first_epoch
    elif trainer.max_steps >= 0:
        epochs = math.ceil((trainer.max_steps - first_step) / trainer.num_training_batches)
    return max(1, epochs)


def steps_left(trainer: Trainer, first_step: int, first_epoch: int, *, steps_per_epoch: int) -> float:
    """Return how many optimizer steps a trainer's limits leave to a fit that starts there; NaN where none ends it."""
    if trainer.max_steps >= 0:
        return trainer.max_steps - first_step
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        return (trainer.max_epochs - first_epoch) * steps_per_epoch
    return float("nan")
