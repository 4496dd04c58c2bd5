"""Checkpoints that a kill cannot tear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from ftd_lightning.data.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it there.

    Lightning's own goes through the system's temporary folder, which often is another file system: moving a file from
    there copies it, and a kill in the middle leaves a torn ``last.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a local path atomically; remote ones as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path).expanduser()) as part:
            super().save_checkpoint(checkpoint, part, storage_options)
