"""Checkpoints that a kill cannot tear, and that run no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from ftd_lightning.data.files import replacing
from ftd_lightning.errors import InputError
from ftd_lightning.training.resume import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and renames it there; reads no checkpoint that would run code.

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

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, however the fit came by its path; ``weights_only=False`` runs the code in it.

        Raises:
            InputError: for a local file that is missing, broken or something else, and a place that needs a package.
        """
        allowed = True if weights_only is None else weights_only
        if "://" in str(path):
            try:
                loaded: dict[str, Any] = super().load_checkpoint(path, map_location, allowed)
            except ImportError as error:  # of the package for such places
                raise InputError(f"{path}: {error}") from error
            return loaded
        return read_checkpoint(path, map_location=map_location, weights_only=allowed)
