"""LightningCLI over the modules of this library and its one DataModule: ``ftd fit|validate|test|predict``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO

import ftd_lightning
import ftd_lightning.data
import ftd_lightning.modules
from ftd_lightning.callbacks import AtomicCheckpointIO, FitProgress
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.modules import SyntheticEvaluation
from ftd_lightning.training.learning_check import summary

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
        if not file.is_file():
            return [config]  # YAML instead of a file, or a name that the parser reports
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return [config]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        json.dumps(content, default=str)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it contains itself" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"{file}: is no plain YAML: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: is no config: settings are a mapping, e.g. model: ...")
    if "base" not in content:
        return [config]
    base = file.parent / str(content.pop("base"))
    try:
        there = base.is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        there = False
    if not there:
        raise InputError(f"{file}: builds on {base}, which is not there")
    chain = (*built_on, file.resolve())
    if base.resolve() in chain:
        raise InputError(f"{file}: builds on {base}, which builds on it in turn")
    return [*_with_base(str(base), chain), yaml.safe_dump(content, sort_keys=False)]


def check_checkpoint(path: str, model: str | None = None) -> None:
    """Refuse a file that is no checkpoint of Lightning, before anything is read from it or begun.

    Args:
        path: what follows ``--ckpt_path``; Lightning's own words, such as "last", and remote paths are left to it.
        model: class path of the module that it is for; Lightning would take the checkpoint's without a word.

    Raises:
        InputError: for a file that is missing, broken, or something else. No code in it is run.
    """
    if path.startswith(("http://", "https://")):
        raise InputError(f"{path}: download the checkpoint first: read from there, it could run code")
    if path in ("last", "hpc") or "://" in path or path.startswith("registry"):
        return
    if path == "best":
        raise InputError("ckpt_path best: nothing has been measured yet when a command starts; name the file, or last")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        complete = isinstance(content, dict) and {"pytorch-lightning_version", "state_dict"} <= content.keys()
    except Exception as error:  # a foreign file can make torch raise anything
        raise InputError(
            f"{path}: no checkpoint that can be read: it is broken, something else, or would run code when read"
        ) from error
    if not complete:
        raise InputError(f"{path}: is not a checkpoint of Lightning")
    recorded = str(content.get("hyper_parameters", {}).get("_class_path", model))
    if model is not None and recorded.rpartition(".")[2] != model.rpartition(".")[2]:
        raise InputError(f"{path}: is a checkpoint of {recorded}, the model here is {model}")


class FTDCLI(LightningCLI):
    """LightningCLI with this library's defaults; everything else is as in Lightning's documentation."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Check what Lightning would fail on with a traceback."""
        super().parse_arguments(parser, args)
        config = self.config.get(self.config.get("subcommand") or "") or self.config
        seed = config.get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything={seed} must be from 0 to {2**32 - 1}")
        if config.get("ckpt_path"):
            model = config.get("model")
            check_checkpoint(str(config["ckpt_path"]), model.get("class_path") if model else None)

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
            self._judge(self.model)

    def after_test(self) -> None:
        """Say which of the networks of an evaluation are not to be trusted."""
        if isinstance(self.model, SyntheticEvaluation):
            self._judge(self.model)

    def _judge(self, module: SyntheticEvaluation) -> None:
        total = module.hparams["networks"]
        failed = module.results.get("failed", {})
        if len(failed) == total:
            raise DivergenceError(summary(failed, total))
        if failed and self.trainer.is_global_zero:
            print(f"ftd: warning: {summary(failed, total)}", file=sys.stderr)


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
