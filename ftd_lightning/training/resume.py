"""Checkpoints that a fit resumes from exactly, wherever within an epoch they were saved.

Lightning 2.6 resumes exactly from a checkpoint that lies well inside an epoch. At an epoch's end it trains a batch
twice, skips the end's hooks, or forgets the metrics of the validation; what stops a fit within an epoch (``max_steps``,
``max_time``) ends that epoch for good. :func:`mend_progress` rewrites the loops' counters in the checkpoint so that the
resumed fit does what the uninterrupted one would have done. It is called by every module of this library as it loads a
checkpoint, so a plain Trainer resumes exactly as well.
"""

from __future__ import annotations

from typing import Any

Counts = dict[str, Any]


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
