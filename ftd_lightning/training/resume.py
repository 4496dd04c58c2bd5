"""Checkpoints: how they are read, and how a fit resumes from them exactly, wherever within an epoch they were saved.

Lightning 2.6 resumes exactly from a checkpoint that lies well inside an epoch. At an epoch's end it trains a batch
twice, skips the end's hooks, or forgets the metrics of the validation; what stops a fit within an epoch (``max_steps``,
``max_time``) ends that epoch for good. :func:`mend_progress` rewrites the loops' counters in the checkpoint so that the
resumed fit does what the uninterrupted one would have done. It is called by every module of this library as it loads a
checkpoint, so a plain Trainer resumes exactly as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.models.registry import recorded_network

Counts = dict[str, Any]
# Types of the entries that Lightning writes; "state_dict" and the version are in every checkpoint.
KINDS: dict[str, type] = {
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
}


def read_checkpoint(source: str | Path | IO[bytes], **options: Any) -> dict[str, Any]:
    """Read a checkpoint of Lightning.

    Args:
        source: a local file, by its path or open.
        options: for ``torch.load``; without ``weights_only=False`` no code in the file is run.

    Raises:
        InputError: for a file that is missing, broken or something else.
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
    for key, kind in KINDS.items():
        if not isinstance(value := content.get(key, kind()), kind):
            found, wanted = type(value).__name__, kind.__name__
            raise InputError(f"{source}: is a broken checkpoint: {key} is a {found}, not a {wanted}")
    return content


def refuse_own_network(source: str | Path | IO[bytes]) -> None:
    """Refuse a checkpoint whose hyper-parameters name a network that is not of this library.

    Args:
        source: as for :func:`read_checkpoint`; an open file is read again afterwards.

    Raises:
        InputError: for another file too.
    """
    local = isinstance(source, (str, Path))
    hparams = read_checkpoint(source, mmap=local).get("hyper_parameters", {})
    if hparams.get("network") is not None:
        recorded_network({"name": hparams["network"], "options": {}}, source, "pass network=")
    if not isinstance(source, (str, Path)):
        source.seek(0)


def mend_progress(checkpoint: dict[str, Any]) -> None:
    """Rewrite the progress of a fit in a checkpoint, in place.

    Four moments at which checkpoints are saved:

    - inside an epoch, after a batch: left as it is;
    - after the last batch of an epoch, before or after its validation: the batch counts as done, the validation is run
      (again), because its metrics are not part of a checkpoint, and the hooks at the epoch's end follow;
    - in ``on_train_epoch_end`` after all batches: the epoch counts as done;
    - in ``on_train_epoch_end`` of an epoch that was cut short, or after it: the epoch is still in progress.

    Args:
        checkpoint: as Lightning loads it; one without loops (weights only) is left as it is.
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


def _each(progress: Counts, change: Any) -> None:
    for counts in (progress["total"], progress["current"]):
        change(counts)


def _restart(validation: Counts, *, started: int) -> None:
    for counts in (validation["total"], validation["current"]):
        counts.update(dict.fromkeys(counts, 0))
        counts.update(ready=started, started=started)
    validation["is_last_batch"] = False
