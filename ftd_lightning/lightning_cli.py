"""LightningCLI over the modules of this library and its one DataModule: ``ftd fit|validate|test|predict``."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO

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
from ftd_lightning.files.trajectory_store import summary as store_summary
from ftd_lightning.modules import FlatTeacher, SyntheticEvaluation
from ftd_lightning.shipped_configs import find_config, run_folder_of, shipped_names, with_config_files, with_home

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _with_defaults(configured: Any, defaults: Mapping[type, Any]) -> list[Any]:
    """Add to a trainer's callbacks or plugins the default of each kind of which none is configured."""
    parts = list(configured) if isinstance(configured, (list, tuple)) else [] if configured is None else [configured]
    missing = [part for kind, part in defaults.items() if not any(isinstance(own, kind) for own in parts)]
    return [*parts, *missing]


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with errors in one line."""


class Quiet(logging.Filter):
    """Drops Lightning's advertisements, and its notes that nothing is wrong."""

    dropped = ("\N{ELECTRIC LIGHT BULB} Tip:", "TPU available: False", "`Trainer.fit` stopped:")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return not record.getMessage().startswith(self.dropped)


class RepeatedFit(Callback):
    """Ends a fit that was finished in the same folder, of the same settings and inputs, before it begins.

    ``done.json`` beside the logs records the fit that was finished last.

    Args:
        settings: of the fit, all that are given.
        outputs: returns the files that the fit writes; one that is gone is made again.
    """

    def __init__(self, settings: str, outputs: Callable[[], list[Path]]) -> None:
        self.settings, self.outputs, self.done = settings, outputs, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the record; a fit that begins deletes it."""
        self.file = run_folder(trainer) / "done.json"
        inputs = json.dumps(pl_module.inputs() if isinstance(pl_module, BaseModule) else None, sort_keys=True)
        text = f"{self.settings} {inputs} {ftd_lightning.__version__}"
        self.fit = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        found = {} if trainer.fast_dev_run else read_json(self.file)  # type: ignore[attr-defined]
        there = found.get("fit") == self.fit and all(Path(file).exists() for file in found["outputs"])
        self.done = trainer.strategy.broadcast(there)
        if self.done:
            trainer.should_stop = True
        elif trainer.is_global_zero:
            self.file.unlink(missing_ok=True)

    def record(self) -> None:
        """Record that the fit is finished."""
        write_json(self.file, {"fit": self.fit, "outputs": [str(file) for file in self.outputs()]})


class FTDCLI(LightningCLI):
    """LightningCLI with this library's defaults; everything else is as in Lightning's documentation."""

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
        if self.subcommand == "fit" and isinstance(self.model, BaseModule):
            given = self.config["fit"].as_dict()
            settings = {key: given[key] for key in ("seed_everything", "model", "data", "trainer")}
            self.repeated = RepeatedFit(json.dumps(settings, default=str, sort_keys=True), self.outputs)
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

    def outputs(self) -> list[Path]:
        """Return the files that a fit of a module of this library writes: teachers, a set or a result."""
        trainer: Any = self.trainer
        if isinstance(self.model, FlatTeacher):
            store = next(callback.path for callback in trainer.callbacks if isinstance(callback, TrajectoryRecorder))
            return sorted(store.glob("teacher_*.safetensors"))
        if isinstance(self.model, LearnsSet):
            writers = (callback for callback in trainer.callbacks if isinstance(callback, SyntheticSetWriter))
            return [next(writers).file(trainer)]
        return [run_folder(trainer) / "evaluation.json"]

    def after_fit(self) -> None:
        """Test the networks that an evaluation trained; tell a finished fit's outcome, and the next command."""
        trainer: Any = self.trainer
        if not isinstance(self.model, BaseModule) or trainer.fast_dev_run:
            return
        if isinstance(self.model, SyntheticEvaluation) and not self.repeated.done:
            trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.after_test()
        if not trainer.is_global_zero or not (files := self.outputs()):
            return
        if not self.repeated.done:
            self.repeated.record()
        if isinstance(self.model, FlatTeacher):
            made, text = files[0].parent, store_summary(files[0].parent)
            follows = f"ftd fit --config {self._next('distill')} --model.trajectories {made}"
        elif isinstance(self.model, LearnsSet):
            made, text = files[0], set_summary(files[0])
            follows = f"ftd fit --config {self._next('evaluate')} --data.synthetic {made}"
        else:
            made, text = files[0], result_summary(read_json(files[0]))
            synthetic = str(self.datamodule.hparams.get("synthetic"))
            follows = f"ftd export {synthetic} FOLDER" if Path(synthetic).is_file() else ""
        if self.repeated.done:
            print(f"done already: {made}: {text}")
        if follows:
            print(f"next: {follows}")

    def _next(self, phase: str) -> str:
        """Name the shipped config of the next phase: with these teachers where one has them, or else of this folder."""
        logger = run_folder(self.trainer)
        names = [name for name in shipped_names() if name.startswith(f"{logger.parent.name}/{phase}")]
        named = [name for name in names if f"/{logger.name}/" in find_config(name).read_text(encoding="utf-8")]
        kind = "_".join([phase, *logger.name.split("_")[1:2]])
        return min(named or names or ["CONFIG"], key=lambda name: (kind not in name, name))

    def after_test(self) -> None:
        """Report networks of an evaluation that diverged or learned nothing; raise DivergenceError if all did."""
        if isinstance(self.model, SyntheticEvaluation):
            total, failed = self.model.hparams["networks"], self.model.results.get("failed", {})
            if len(failed) == total:
                raise DivergenceError(summary(failed, total))
            if failed and self.trainer.is_global_zero:
                print(f"ftd: warning: {summary(failed, total)}", file=sys.stderr)

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
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(Quiet())
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
