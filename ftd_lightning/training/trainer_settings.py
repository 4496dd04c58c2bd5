"""Trainer settings that would change what is computed, refused before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from ftd_lightning.functional.augment import Augmentation

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def refuse_callbacks(trainer: Trainer, *, several: bool) -> None:
    """Refuse callbacks that treat the teachers of a fit, trained one after the other, as one network.

    Args:
        trainer: of the fit.
        several: whether a process trains several teachers.

    Raises:
        InputError: for an EarlyStopping on a metric of single teachers, or a StochasticWeightAveraging.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError("StochasticWeightAveraging would average weights of different teachers: leave it out")
        if several and isinstance(callback, EarlyStopping) and callback.monitor.startswith("teacher/"):
            raise InputError(
                f"EarlyStopping compares {callback.monitor} of a teacher with the best of earlier teachers, and ends "
                "the whole fit: leave it out, or fit one teacher"
            )


def deciding_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a trainer that change a fit's numbers; a resumed fit has those of its checkpoint."""
    return {"precision": trainer.precision, "gradient_clip_val": trainer.gradient_clip_val}


def refuse_settings(trainer: Trainer, augment: Augmentation) -> None:
    """Refuse settings under which a fit would not compute what it says.

    Half-precision weights lose what the methods compare, differences of close weight vectors; float16 autocast scales
    the loss, which the passes inside a step do not know of.

    Args:
        trainer: of the fit.
        augment: of the fit's images.

    Raises:
        InputError: naming the setting and what to use instead.
    """
    if trainer.precision not in PRECISIONS:
        raise InputError(f"trainer.precision={trainer.precision} is not supported: use {' or '.join(PRECISIONS)}")
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            "trainer.accumulate_grad_batches must be 1: every batch is one update; TrajectoryMatching averages several "
            "segments per update with model.segments_per_step"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InputError("trainer.overfit_batches is not supported: use trainer.limit_train_batches")
    if torch.are_deterministic_algorithms_enabled() and not augment.deterministic_on(trainer.strategy.root_device):
        raise InputError(
            "trainer.deterministic: scale and rotate have no deterministic gradient on a GPU: leave them out "
            "of augment, or set trainer.deterministic to false"
        )
