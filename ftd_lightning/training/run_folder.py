"""The folder that the files of a fit go to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a fit's files: beside its logs, or the trainer's default where it keeps none.

    Loggers without a log folder of their own (Wandb) get ``save_dir/name/version``, where Lightning puts their
    checkpoints too, so that two runs never share a folder.

    Convention: not ``trainer.log_dir``, which is a broadcast: called by the first rank alone, it waits for the others
    for ever.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return Path(trainer.default_root_dir)  # "~" is expanded
    if isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return Path(logger.log_dir).expanduser()
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir).expanduser() / str(logger.name) / version
