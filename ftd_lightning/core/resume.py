"""Resuming a fit: loop counters, and the settings that must not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule

from ftd_lightning.contracts import LearnsSet
from ftd_lightning.core.arguments import plain_settings
from ftd_lightning.errors import InputError
from ftd_lightning.files.trajectory_store import differences
from ftd_lightning.models.registry import recorded_network

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Mapping

    from lightning.pytorch import Trainer
Counts = dict[str, Any]


def read_checkpoint(source: str | Path | IO[bytes], **options: Any) -> dict[str, Any]:
    """Read a checkpoint of Lightning from a local file, by its path or open; other files raise InputError.

    The options are those of ``torch.load``; without ``weights_only=False`` no code in the file is run.
    """
    if isinstance(source, (str, Path)):
        source = Path(source).expanduser()
        if not source.is_file():
            raise InputError(f"{source}: no such checkpoint")
    try:
        content = torch.load(source, **{"map_location": "cpu", "weights_only": True, **options})
    except Exception as error:  # a foreign file can make torch raise anything
        raise InputError(
            f"{source}: cannot be read as a checkpoint: it is broken, something else, or would run code when read"
        ) from error
    if not isinstance(content, dict) or not {"pytorch-lightning_version", "state_dict"} <= content.keys():
        raise InputError(f"{source}: is not a checkpoint of Lightning")
    return content


def refuse_own_network(source: str | Path | IO[bytes], given: Container[str]) -> None:
    """Refuse a checkpoint that names a network that is not of this library, unless that argument is ``given``."""
    hparams = read_checkpoint(source, mmap=isinstance(source, (str, Path))).get("hyper_parameters", {})
    if "network" not in given and hparams.get("network") is not None:
        recorded_network({"name": hparams["network"], "options": {}}, source, "pass network=")
    if "network_options" not in given and "backbone" in (hparams.get("network_options") or ()):  # it may be imported
        raise InputError(f"{source}: its network_options name a backbone: pass network_options=")
    if not isinstance(source, (str, Path)):
        source.seek(0)  # it is read again


def fix_loop_progress(checkpoint: dict[str, Any]) -> None:
    """Rewrite the progress of a fit in a checkpoint, in place, so that the fit resumes exactly.

    A checkpoint is saved at one of four moments:

    - inside an epoch, after a batch: nothing changes;
    - after the last batch of an epoch, before or after its validation: the batch counts as done, the validation runs
      (again), because its metrics are not part of a checkpoint, and the hooks at the epoch's end follow;
    - in ``on_train_epoch_end`` after all batches: the epoch counts as done;
    - in ``on_train_epoch_end`` of an epoch that was cut short, or after it: the epoch is still in progress.

    Args:
        checkpoint: as Lightning 2.6 loads it; one without loops (weights only) stays as it is.
    """
    fit_loop = checkpoint.get("loops", {}).get("fit_loop")
    if fit_loop is None:
        return
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    now = epochs["total"]
    if now["ready"] != now["started"]:
        return
    in_end_hook = now["processed"] == now["started"]
    if not batches["is_last_batch"]:
        if in_end_hook and batches["current"]["ready"] > 0:
            _each(epochs, lambda counts: counts.update(processed=now["ready"] - 1, completed=now["ready"] - 1))
            _restart(validation, started=0)
    elif now["completed"] == now["started"]:
        return
    elif in_end_hook:
        _each(epochs, lambda counts: counts.update(completed=counts["processed"]))
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    else:
        _each(batches, lambda counts: counts.update(completed=counts["processed"]))
        # One batch begun and none done: Lightning then runs the validation from its beginning.
        _restart(validation, started=1)
        for state in fit_loop["state_dict"].get("combined_loader", []):
            state["epoch_ended"] = True


def _each(progress: Counts, change: Callable[[Counts], None]) -> None:
    for counts in (progress["total"], progress["current"]):
        change(counts)


def _restart(validation: Counts, *, started: int) -> None:
    for counts in (validation["total"], validation["current"]):
        counts.update(dict.fromkeys(counts, 0))
        counts.update(ready=started, started=started)
    validation["is_last_batch"] = False


# Settings of a module that decide no result. Its settings leave out a FlatTeacher's number of teachers and the place of
# a trajectory store.
HARMLESS = ("compile", "iterations_per_epoch")
LIMITS = ("rounds",)  # a resumed fit may go further
CONTENTS = ("dataset", "transform", "shape", "class_names")  # of the images: these are compared
# Settings of a DistillationDataModule about the place of its images.
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
    """Refuse values that differ from a checkpoint's, compared as JSON gives them back; keys of one side only pass."""
    before, now = as_json(before), as_json(now)
    shared = [key for key in now if key in before and key not in free]
    found = [change for key in shared for change in _changes(f"{prefix}{key}", before[key], now[key])]
    if found:
        raise InputError(f"{'; '.join(found)}; give its values, or begin anew")


def refuse_other_data(
    before: Mapping[str, Any], now: Mapping[str, Any], options: Mapping[str, Any], trainer: Trainer
) -> None:
    """Refuse to resume with other images, or with another set instead of them; see :func:`refuse_changes`.

    ``before`` holds "data" and "set" of the checkpoint, ``options`` its hyper-parameters of the datamodule.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(datamodule, LightningDataModule):
        # A distillation draws its own batches.
        free = (*PLACES, "batch_size") if isinstance(trainer.lightning_module, LearnsSet) else PLACES
        refuse_changes(plain_settings(options), plain_settings(datamodule.hparams), free=free, prefix="data.")
    images = [{key: (state["data"] or {}).get(key) for key in CONTENTS} for state in (before, now)]
    refuse_changes(*({key: state[key] for key in differences(*images)} for state in images), prefix="data.")
    refuse_changes({"synthetic": before["set"]}, {"synthetic": now["set"]}, prefix="data.")
