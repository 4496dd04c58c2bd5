"""Small fits on the embedded digits, for tests of modules and callbacks; and files spoilt on purpose."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ftd_lightning import DistillationDataModule, FlatTeacher, TrajectoryMatching, cli
from ftd_lightning.callbacks import TrajectoryRecorder
from ftd_lightning.files.safetensors_io import KEY

SMALL = {"width": 4, "depth": 1}


class Losses(Callback):
    """Keeps the loss and the images of every iteration."""

    def __init__(self) -> None:
        self.losses, self.images = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.images.append(pl_module.images.detach().clone())


def make_trainer(folder: Path, **options) -> Trainer:
    """A silent CPU trainer that leaves nothing outside ``folder``."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    return Trainer(**{**defaults, **options})


def small_data(**options) -> DistillationDataModule:
    """A tenth of the digits."""
    return DistillationDataModule(**{"max_per_class": 14, "batch_size": 32, **options})


def small_teacher(**options) -> FlatTeacher:
    """Two teachers of a tiny network."""
    defaults = {"network_options": SMALL, "teachers": 2, "epochs": 4, "lr": 0.1, "rho": 0.0, "augment": ""}
    return FlatTeacher(**{**defaults, **options})


def record(folder: Path, *, data=None, **options) -> Path:
    """Train teachers and give the folder of their store."""
    trainer = make_trainer(folder, callbacks=[TrajectoryRecorder(str(folder / "trajectories"))], limit_val_batches=0)
    trainer.fit(small_teacher(**options), datamodule=data or small_data())
    return folder / "trajectories"


def small_matching(trajectories: Path, **options) -> TrajectoryMatching:
    """A distillation of a few inner steps."""
    defaults = {
        "trajectories": str(trajectories),
        "syn_steps": 3,
        "expert_epochs": 1,
        "max_start_epoch": 3,
        "lr_images": 10.0,
        "lr_step_size": 1e-3,
        "step_size_init": 0.1,
        "augment": "",
        "iterations_per_epoch": 5,
    }
    return TrajectoryMatching(**{**defaults, **options})


def distil(folder: Path, trajectories: Path, *, steps: int = 5, callbacks=(), data=None, trainer=None, **options):
    """Run a distillation and give the module."""
    module = small_matching(trajectories, **options)
    settings = {"max_steps": steps, "callbacks": list(callbacks), **(trainer or {})}
    make_trainer(folder, **settings).fit(module, datamodule=data or small_data())
    return module


def rewrite(path: Path, target: Path, change) -> None:
    """Write a changed copy of a set or teacher without checksums, as another program would.

    ``change(tensors, metadata)`` changes both in place; it may return other metadata, or the text to write as such.
    """
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[KEY])
    metadata = {key: value for key, value in metadata.items() if key not in ("checksum", "checksums")}
    tensors = load_file(path)
    metadata = change(tensors, metadata) or metadata
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata={KEY: text})


def refusal(capsys, *arguments: object) -> str:
    """Run an ``ftd`` command that has to end with exit code 1 and one line of error; give the line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, arguments)])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("ftd: error: "))
    assert stop.value.code == 1
    return line
