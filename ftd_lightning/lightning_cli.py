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


def _with_default(configured: Any, kind: type, default: Any) -> list[Any]:
    """Add a default to a trainer's callbacks or plugins, unless one of its kind is configured."""
    parts = list(configured) if isinstance(configured, (list, tuple)) else [] if configured is None else [configured]
    return parts if any(isinstance(part, kind) for part in parts) else [*parts, default]


def with_bases(arguments: Sequence[str]) -> list[str]:
    """Put the configs that a config builds on before it: those it names under ``base``, relative to itself.

    ``--config F`` (or ``-c F``) becomes ``--config BASE --config <F without base>``, which LightningCLI merges like any
    two configs.

    Args:
        arguments: of a command.

    Raises:
        InputError: for a base that does not exist, or configs that build on each other.

    Example:
        >>> with_bases(["fit", "--trainer.max_steps", "3"])
        ['fit', '--trainer.max_steps', '3']
    """
    expanded: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if argument.startswith("-c") and len(option) > 2:  # -cF
            option, equals, value = "-c", "=", argument[2:]
        if option not in ("-c", "--config"):
            expanded.append(argument)
            continue
        config = value if equals else next(remaining, None)
        if config is None:
            expanded.append(argument)
            continue
        for part in _with_base(config):
            expanded += ["--config", part]
    return expanded


def _with_base(config: str, built_on: tuple[Path, ...] = ()) -> list[str]:
    """Split a config into those it builds on and its own content; one without a base stays as it is."""
    file = Path(config)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return [config]  # YAML instead of a file, or a file whose fault the parser reports
    if not isinstance(content, dict) or "base" not in content:
        return [config]
    base = file.parent / str(content.pop("base"))
    if not base.is_file():
        raise InputError(f"{file}: builds on {base}, which is not there")
    chain = (*built_on, file.resolve())
    if base.resolve() in chain:
        raise InputError(f"{file}: builds on {base}, which builds on it in turn")
    return [*_with_base(str(base), chain), yaml.safe_dump(content, sort_keys=False)]


class FTDCLI(LightningCLI):
    """LightningCLI with this library's defaults; everything else is as in Lightning's documentation."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add a progress bar over the whole fit and atomic checkpoints, unless the config has its own."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("enable_progress_bar") is not False:
            kwargs["callbacks"] = _with_default(config.get("callbacks"), ProgressBar, FitProgress())
        kwargs["plugins"] = _with_default(config.get("plugins"), CheckpointIO, AtomicCheckpointIO())
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Allow TF32 on a GPU: the published numbers were made with it, and it is several times as fast."""
        torch.set_float32_matmul_precision("high")

    def after_fit(self) -> None:
        """Test the networks that an evaluation trained."""
        if isinstance(self.model, SyntheticEvaluation):
            self.trainer.test(self.model, datamodule=self.datamodule)


def run(args: ArgsType = None) -> FTDCLI:
    """Run one of LightningCLI's verbs and return the CLI object, with its trainer, model and datamodule.

    Args:
        args: what follows ``ftd``; None takes it from the process.

    Raises:
        InputError: for a mistake that the user can mend.
        DivergenceError: if a run diverged.
    """
    # Lightning 2.6 under torch 2.13 and newer; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # Lightning warns when it is given arguments, which is how bases are merged.
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
