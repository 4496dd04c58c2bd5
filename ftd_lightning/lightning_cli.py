"""LightningCLI over the modules of this library and its one DataModule: ``ftd fit|validate|test|predict``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.plugins import CheckpointIO

import ftd_lightning
import ftd_lightning.data
import ftd_lightning.modules
from ftd_lightning.callbacks import AtomicCheckpointIO, FitProgress
from ftd_lightning.errors import InputError
from ftd_lightning.modules import SyntheticEvaluation

if TYPE_CHECKING:
    from collections.abc import Sequence


def _with_default(given: Any, kind: type, default: Any) -> list[Any]:
    """Add a default to a list of trainer parts, unless one of its kind is there."""
    parts = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return parts if any(isinstance(part, kind) for part in parts) else [*parts, default]


def with_bases(words: Sequence[str]) -> list[str]:
    """Put before every config the ones that it builds on: those it names under ``base``, relative to itself.

    ``--config F`` becomes ``--config BASE --config <F without base>``, which LightningCLI composes as any two.

    Args:
        words: of a command.

    Raises:
        InputError: for a base that is not there.

    Example:
        >>> with_bases(["fit", "--trainer.max_steps", "3"])
        ['fit', '--trainer.max_steps', '3']
    """
    expanded: list[str] = []
    for word in words:
        file = Path(word.removeprefix("--config="))
        is_config = word.startswith("--config=") or expanded[-1:] == ["--config"]
        content = yaml.safe_load(file.read_text()) if is_config and file.is_file() else None
        if not isinstance(content, dict) or "base" not in content:
            expanded.append(word)
            continue
        if expanded[-1:] == ["--config"]:
            expanded.pop()
        base = file.parent / str(content.pop("base"))
        if not base.is_file():
            raise InputError(f"{file}: builds on {base}, which is not there")
        expanded += [*with_bases(["--config", str(base)]), "--config", yaml.safe_dump(content, sort_keys=False)]
    return expanded


class FTDCLI(LightningCLI):
    """LightningCLI with this library's defaults; everything else is as Lightning's own documentation says."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the trainer one bar for the whole fit and checkpoints that a kill cannot tear, unless it has its own."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("enable_progress_bar") is not False:
            kwargs["callbacks"] = _with_default(config.get("callbacks"), ProgressBar, FitProgress())
        kwargs["plugins"] = _with_default(config.get("plugins"), CheckpointIO, AtomicCheckpointIO())
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Allow TF32 where there is a GPU: what the published numbers were made with, and several times as fast."""
        torch.set_float32_matmul_precision("high")

    def after_fit(self) -> None:
        """Measure what an evaluation trained."""
        if isinstance(self.model, SyntheticEvaluation):
            self.trainer.test(self.model, datamodule=self.datamodule)


def run(args: ArgsType = None) -> FTDCLI:
    """Run a command and give what it made.

    Args:
        args: the words after ``ftd``; None takes those of the process.

    Raises:
        InputError: for what the user can put right.
        DivergenceError: for a run that went astray.
    """
    # Lightning 2.6 under torch 2.13 and newer; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # That of giving it words, which is how bases come in.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    if args is None or isinstance(args, list):
        args = with_bases(sys.argv[1:] if args is None else args)
    return FTDCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "ftd", "version": ftd_lightning.__version__},
        save_config_kwargs={"overwrite": True},
        args=args,
    )
