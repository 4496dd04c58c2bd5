"""Comparison of a resumed fit with its checkpoint: settings and images have to be the same, except those listed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from ftd_lightning.contracts import BringsBatches
from ftd_lightning.data.teacher_metadata import differences
from ftd_lightning.errors import InputError
from ftd_lightning.training.plain_arguments import plain_settings

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from lightning.pytorch import Trainer

# Settings of a module that decide no result. Of a trainer, only precision and gradient_clip_val are compared. A
# FlatTeacher's number of teachers and the place of a trajectory store are not compared: its settings leave them out.
HARMLESS = ("compile", "iterations_per_epoch")
LIMITS = ("rounds",)  # how far a fit goes: it may go further
CONTENTS = ("dataset", "transform", "shape", "class_names")  # of the images, which are compared
# Settings of a DistillationDataModule that say where its images lie.
PLACES = ("root", "cache_dir", "download", "on_device", "num_workers", "trajectories", "synthetic")


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value, default=str))


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        for key in now:
            yield from _changes(f"{name}.{key}", before[key], now[key])
    else:
        yield f"{name}={now!r:.100}, but the checkpoint was made with {before!r:.100}"


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: Container[str] = (), prefix: str = ""
) -> None:
    """Refuse values that differ from those of a checkpoint.

    Values are compared as JSON gives them back. A key that only one side has is another version's.

    Args:
        before: values of the fit that made the checkpoint.
        now: values of the fit that resumes from it.
        free: keys that may change.
        prefix: of the keys in the message.

    Raises:
        InputError: naming each such key, with both values.

    Example:
        >>> refuse_changes({"lr": 30.0, "betas": (0, 1)}, {"lr": 3.0, "betas": [0, 1]})
        Traceback (most recent call last):
        ftd_lightning.errors.InputError: lr=3.0, but the checkpoint was made with 30.0; give its values, or begin anew
    """
    before, now = as_json(before), as_json(now)
    shared = [key for key in now if key in before and key not in free]
    found = [change for key in shared for change in _changes(f"{prefix}{key}", before[key], now[key])]
    if found:
        raise InputError(f"{'; '.join(found)}; give its values, or begin anew")


def refuse_other_data(
    before: Mapping[str, Any], now: Mapping[str, Any], options: Mapping[str, Any], trainer: Trainer
) -> None:
    """Refuse to resume with other images, or with another set in their place.

    Args:
        before: "data" and "set" as the checkpoint holds them.
        now: the same of the fit that resumes.
        options: the checkpoint's hyper-parameters of the datamodule.
        trainer: of the fit that resumes.

    Raises:
        InputError: as for :func:`refuse_changes`.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(datamodule, LightningDataModule):
        # A distillation draws its own batches.
        free = (*PLACES, "batch_size") if isinstance(trainer.lightning_module, BringsBatches) else PLACES
        refuse_changes(plain_settings(options), plain_settings(datamodule.hparams), free=free, prefix="data.")
    images = [{key: (state["data"] or {}).get(key) for key in CONTENTS} for state in (before, now)]
    refuse_changes(*({key: state[key] for key in differences(*images)} for state in images), prefix="data.")
    if "set" in before:  # version 0.2 did not record it
        refuse_changes({"synthetic": before["set"]}, {"synthetic": now["set"]}, prefix="data.")
