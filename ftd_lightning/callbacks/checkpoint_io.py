"""Checkpoints that a kill cannot tear, and that a fit goes on from where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from ftd_lightning.data.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it there.

    Lightning's own goes through the system's temporary folder, which often is another file system: moving a file from
    there copies it, and a kill in the middle leaves a torn ``last.ckpt``.

    On the way in it mends what Lightning 2.6 makes of a checkpoint that was saved at the end of a training epoch
    without validation: resumed from that, a fit trains one batch more in the old epoch and ends it a second time.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local path atomically; remote ones as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as part:
            super().save_checkpoint(checkpoint, part, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as Lightning does, and mend."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        if "loops" in checkpoint:
            end_the_epoch_once(checkpoint["loops"]["fit_loop"])
        return checkpoint


def end_the_epoch_once(fit_loop: dict[str, Any]) -> None:
    """Turn the state of a fit at the end of an epoch into that after the epoch's end, in place.

    Args:
        fit_loop: a checkpoint's ``loops.fit_loop``. Left as it is unless it was saved in ``on_train_epoch_end``, and no
            validation ran.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    now = epochs["current"]
    at_its_end = now["ready"] == now["started"] == now["processed"] == now["completed"] + 1
    validated = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]["ready"] > 0
    if not at_its_end or validated or not batches["is_last_batch"]:
        return
    for count in (epochs["total"], epochs["current"]):
        count["completed"] = count["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
