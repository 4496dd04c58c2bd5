"""LightningCLI over the modules of this library and its one DataModule: ``ftd fit|validate|test|predict``."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning_utilities.core import rank_zero as rank_zero_module

import ftd_lightning
import ftd_lightning.data
import ftd_lightning.modules
from ftd_lightning.callbacks import (
    AtomicCheckpointIO,
    EvaluateSynthetic,
    FitProgress,
    HyperparameterReport,
    SyntheticSetWriter,
    TensorBoardPictures,
    TrajectoryRecorder,
)
from ftd_lightning.callbacks.checkpoint_io import FitCheckpoint
from ftd_lightning.callbacks.set_writer import summary as set_summary
from ftd_lightning.command_line import OneLineErrors
from ftd_lightning.contracts import LearnsSet, data_source
from ftd_lightning.core.module import BaseModule, run_folder
from ftd_lightning.core.results import result_summary, summary
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.files.safetensors_io import read_json, replacing, write_json
from ftd_lightning.files.synthetic_set import SyntheticSet
from ftd_lightning.files.trajectory_store import summary as store_summary
from ftd_lightning.modules import FlatTeacher, SyntheticEvaluation
from ftd_lightning.shipped_configs import (
    find_config,
    read_config,
    run_folder_of,
    shipped_names,
    with_config_files,
    with_home,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _with_defaults(configured: Any, defaults: Mapping[type, Any]) -> list[Any]:
    """Add to a trainer's callbacks or plugins the default of each kind of which none is configured."""
    parts = list(configured) if isinstance(configured, (list, tuple)) else [] if configured is None else [configured]
    missing = [part for kind, part in defaults.items() if not any(isinstance(own, kind) for own in parts)]
    return [*parts, *missing]


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with errors in one line."""


class RepeatedFit(Callback):
    """Ends a fit before it begins where ``done.json`` beside the logs says that it was finished.

    Its settings, its inputs and the summary of its outcome are those of the record.
    """

    def __init__(self, settings: dict[str, Any], outcome: Callable[[], tuple[str, str]]) -> None:
        self.settings, self.outcome, self.done = settings, outcome, False

    def on_fit_start(self, trainer: Trainer, pl_module: BaseModule) -> None:  # type: ignore[override]
        """Compare with the record; a fit that begins deletes it."""
        self.file, inputs = run_folder(trainer) / "done.json", [ftd_lightning.__version__, pl_module.inputs()]
        text = json.dumps([self.settings, *inputs], default=str, sort_keys=True)
        self.fit, same = hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), False
        with suppress(InputError, KeyError):  # there is no outcome
            same = read_json(self.file) == {"fit": self.fit, "outcome": self.outcome()[0]}
        self.done = trainer.should_stop = trainer.strategy.broadcast(same)
        if not self.done and trainer.is_global_zero:
            self.file.unlink(missing_ok=True)

    def tell(self) -> None:
        """Say the next command, and of a repeated fit its outcome; record one that is finished."""
        outcome, follows = self.outcome()
        write_json(self.file, {"fit": self.fit, "outcome": outcome})
        print(f"done already: {outcome}\n" * self.done + f"next: {follows}")


class FTDCLI(LightningCLI):
    """LightningCLI with this library's defaults; everything else is as in Lightning's documentation."""

    repeated: RepeatedFit | None = None

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Expand "~" in paths; read checkpoints without running code in them."""
        super().parse_arguments(parser, args)
        self.config = with_home(self.config)
        config = self.config.get(self.config.get("subcommand") or "") or {}
        if config.get("weights_only") is None:  # Lightning's default would run code of a remote checkpoint
            config["weights_only"] = True
        path = str(config.get("ckpt_path") or "last")
        if path in ("best", "hpc") or path.startswith("registry"):
            raise InputError(f"ckpt_path {path}: name the file, or last")
        if path != "last" and "://" not in path and not Path(path).is_file():
            raise InputError(f"{path}: no such checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it: Lightning would import the class paths that a file names."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add recording callbacks and atomic checkpoints, unless the config has its own."""
        if self.subcommand not in (None, "fit"):
            self.save_config_callback = None  # config.yaml beside the logs belongs to the fit
        config = self._get(self.config_init, "trainer", default={})
        kwargs["callbacks"] = _with_defaults(config.get("callbacks"), self._recording(config))
        if self.subcommand == "fit" and isinstance(self.model, BaseModule) and not config.get("fast_dev_run"):
            given = self.config["fit"].as_dict()
            settings = {key: given[key] for key in ("seed_everything", "model", "data", "trainer")}
            self.repeated = RepeatedFit(settings, self.outcome)
            kwargs["callbacks"].insert(0, self.repeated)
        kwargs["plugins"] = _with_defaults(config.get("plugins"), {CheckpointIO: AtomicCheckpointIO()})
        if config.get("benchmark") is None and not config.get("deterministic"):
            kwargs["benchmark"] = True  # cuDNN's default for a convolution's double backward pass takes twice as long
        return super().instantiate_trainer(**kwargs)

    def _recording(self, trainer: Mapping[str, Any]) -> dict[type, Callback]:
        """Return the callbacks that record a fit of this library's modules, by kind; they do not change its results."""
        model, callbacks = self.model, dict[type, Callback]()
        if trainer.get("enable_progress_bar") is not False:
            callbacks[ProgressBar] = FitProgress()
        if not isinstance(model, BaseModule):
            return callbacks
        callbacks[HyperparameterReport] = HyperparameterReport()
        if isinstance(model, LearnsSet):
            callbacks[TensorBoardPictures] = TensorBoardPictures()
            if data_source(self.datamodule) is not None:
                callbacks[EvaluateSynthetic] = EvaluateSynthetic()
        if trainer.get("enable_checkpointing") is not False:
            often = 1
            if isinstance(model, SyntheticEvaluation):  # its epochs may be a step or two
                epochs = trainer.get("max_epochs") or 0
                often = max(epochs // 10, 1) if epochs > 0 else 100
            # The validation of a teacher belongs to its epoch; the others are measured when they are due.
            after_validation = isinstance(model, FlatTeacher)
            callbacks[ModelCheckpoint] = FitCheckpoint(
                save_last=True,
                save_top_k=1,
                every_n_epochs=often,
                save_on_train_epoch_end=None if after_validation else True,
            )
        return callbacks

    def before_fit(self) -> None:
        """Allow TF32 on a GPU."""
        torch.set_float32_matmul_precision("high")  # the published numbers were made with it; several times as fast

    def outcome(self) -> tuple[str, str]:
        """Return where the result of a fit is and how good it is, and the next command."""
        trainer: Any = self.trainer
        if isinstance(self.model, FlatTeacher):
            made = next(callback.path for callback in trainer.callbacks if isinstance(callback, TrajectoryRecorder))
            config = self._next("distill")
            kind = str(read_config(find_config(config))["model"]["class_path"]) if config != "CONFIG" else ""
            option = "network" if kind.endswith("BackboneDistillation") else "trajectories"
            follows = f"ftd fit --config {config} --model.{option} {quote(str(made))}"
            return f"{made}: {store_summary(made)}", follows
        if isinstance(self.model, LearnsSet):
            writers = (callback for callback in trainer.callbacks if isinstance(callback, SyntheticSetWriter))
            made = next(writers).file(trainer)
            follows = f"ftd fit --config {self._next('evaluate')} --data.synthetic {quote(str(made))}"
            return f"{made}: {set_summary(SyntheticSet.read_metadata(made))}", follows
        made, synthetic = run_folder(trainer) / "evaluation.json", self.datamodule.hparams.get("synthetic")
        is_set = synthetic is not None and Path(synthetic).is_file()
        follows = f"ftd export {quote(synthetic)} FOLDER" if is_set else f"ftd compare --config {self._next('compare')}"
        return f"{made}: {result_summary(read_json(made))}", follows

    def _next(self, phase: str) -> str:
        """Name the shipped config of the next phase: of this run, or else of its folder."""
        run = run_folder(self.trainer)
        names = [name for name in shipped_names() if name.startswith(f"{run.parent.name}/{phase}")]
        fitting = [name for name in names if f"/{run.name}/" in find_config(name).read_text(encoding="utf-8")]
        wanted = "_".join([phase, *run.name.split("_")[1:2]])
        return min(fitting or names or ["CONFIG"], key=lambda name: (wanted not in name, name))

    def after_fit(self) -> None:
        """Test the networks that an evaluation trained; tell the outcome and the next command."""
        if isinstance(self.model, SyntheticEvaluation) and not (self.repeated and self.repeated.done):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.after_test()
        if self.repeated and self.trainer.is_global_zero:
            with suppress(InputError, KeyError):  # a fit that ended early has no outcome
                self.repeated.tell()

    def after_test(self) -> None:
        """Report networks of an evaluation that diverged or learned nothing; raise DivergenceError if all did."""
        if isinstance(self.model, SyntheticEvaluation):
            total, failed = self.model.hparams["networks"], self.model.results.get("failed", {})
            if len(failed) == total:
                raise DivergenceError(summary(failed, total))

    def after_predict(self) -> None:
        """Write the logits (N, K) of a module of this library as ``predictions.npy`` beside the logs."""
        if isinstance(self.model, BaseModule) and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            file = run_folder(self.trainer) / "predictions.npy"
            with replacing(file) as part, part.open("wb") as out:
                np.save(out, torch.cat(self.trainer.predict_loop.predictions).float().numpy())
            print(f"ftd: wrote {file}")


def run(args: list[str] | None = None, *, start: bool = True) -> FTDCLI:
    """Run one of LightningCLI's verbs and return the CLI object, with its trainer, model and datamodule.

    ``args`` are those after ``ftd``, by default of the process; if not to ``start``, they have no verb, and nothing is
    run.
    """
    # Lightning 2.6 under torch 2.13 and newer; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # Lightning warns when it is given arguments, in which names of configs have become files.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*(smaller than the logging interval|exists and is not empty)")
    notes = ("\N{ELECTRIC LIGHT BULB} Tip:", "TPU available: False", "`Trainer.fit` stopped:")
    rank_zero_module.log.addFilter(lambda record: not record.getMessage().startswith(notes))
    defaults: dict[str, Any] = {"num_sanity_val_steps": 0, "log_every_n_steps": 10, "enable_model_summary": False}
    args, config = with_config_files(sys.argv[1:] if args is None else args)
    if config is not None:
        folder, name = run_folder_of(config)
        board = {"save_dir": str(folder), "name": name, "version": "", "default_hp_metric": False}
        defaults["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": board}
    return FTDCLI(
        LightningModule,
        LightningDataModule,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "ftd", "version": ftd_lightning.__version__},
        save_config_kwargs={"overwrite": True},
        trainer_defaults=defaults,
        args=args,
        run=start,
    )
