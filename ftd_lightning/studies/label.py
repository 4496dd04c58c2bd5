"""``ftd label``: random real images with the labels of a teacher, after the epoch that held-out images choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.command_line import parse_command
from ftd_lightning.core.evaluation import (
    DEFAULT_LR,
    EvaluationProtocol,
    accuracies,
    mean_and_std,
    train_fresh_networks,
)
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.core.networks import student_networks
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.coresets import candidate_epochs, teacher_labels
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore
from ftd_lightning.files.safetensors_io import versions
from ftd_lightning.files.schema import per_cent
from ftd_lightning.files.trajectory_store import check_compatible
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.lightning_cli import run
from ftd_lightning.models import NETWORKS
from ftd_lightning.modules import SyntheticEvaluation

if TYPE_CHECKING:
    from torch import Tensor


def label_random_images(
    module: SyntheticEvaluation,
    data: DistillationDataModule,
    *,
    networks: int = 2,
    epochs: int = 1000,
    device: torch.device | None = None,
    progress: bool = False,
) -> SyntheticSet:
    """Label random real images by a teacher, after the one of at most eight epochs whose labels train best.

    Fresh networks are trained on the images with the labels of each epoch, as the evaluation trains its own, and
    measured on held-out images. Initial weights, batches and augmentation are the same for every epoch. Of equally good
    epochs the first is taken.

    Args:
        module: an evaluation, not fitted, whose networks, optimizer and augmentation are taken.
        data: with ``synthetic`` "random", the teachers' store as ``trajectories``, and held-out images.
        networks: how many for each epoch.
        epochs: of each network over the images.
        device: where to compute; None: the CPU.
        progress: show bars.
    """
    options, device = data.hparams, device or torch.device("cpu")
    if options["trajectories"] is None:
        raise InputError("the labels are a teacher's: give the store of the teachers as data.trajectories")
    chosen = data.training_set()
    assert chosen is not None, "the random images"
    held_out = [values.to(device) for values in data.val]
    if not len(data.val.labels):
        raise InputError("held-out images choose the epoch, and none are held out: give data.val_fraction above 0")
    store, teacher = TrajectoryStore(options["trajectories"]), options["teacher"]
    check_compatible(store, data.describe())
    module.data = data.description()
    architecture = module.make_networks()
    hparams, images = module.hparams, chosen.images.to(device)
    seed = hparams["seed"]
    protocol = EvaluationProtocol(
        epochs=epochs,
        lr=DEFAULT_LR if hparams["lr"] is None else hparams["lr"],
        batch_size=options["batch_size"],
        momentum=hparams["momentum"],
        weight_decay=hparams["weight_decay"],
        augment=module.augment,
    )
    # A teacher's network that is not of this library has to be the evaluation's.
    own = () if store.metadata["network"]["name"] in NETWORKS else (architecture.network, architecture.options)
    network = student_networks(store, *own).architecture()
    losses = IndependentLosses(hparams["compile"], device, rho=hparams["rho"])
    labels: dict[int, Tensor] = {}
    measured: list[dict[str, Any]] = []
    for epoch in candidate_epochs(store.teacher_metadata(teacher)["epochs"]):
        labels[epoch] = teacher_labels(
            store, chosen.images, epoch=epoch, teacher=teacher, statistics=data.train.images, network=network
        )
        fresh = [architecture.build(seed, "label epoch", index).to(device) for index in range(networks)]
        bar = f"labels of epoch {epoch}" if progress else None
        draws = derive_seed(seed, "label epoch")
        train_fresh_networks(fresh, images, labels[epoch].to(device), protocol, seed=draws, losses=losses, progress=bar)
        measured.append({"epoch": epoch, **mean_and_std(torch.tensor(accuracies(fresh, *held_out)))})
    best = max(measured, key=lambda one: float(one["mean"]))["epoch"]
    made = {
        "labels_made": "teacher",
        "label_teacher": {"teacher": teacher, "epoch": best, "held_out_accuracy": measured},
        "versions": versions(),
    }
    return replace(chosen, labels=labels[best], metadata={**chosen.metadata, **made})


# Follow the user's options: the config is read, nothing is fitted or recorded.
LAST_OPTIONS = ("--data.synthetic", "random", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")


def label(
    out: Path, *, config: Path, networks: int = 2, epochs: int | None = None, overrides: Sequence[str] = ()
) -> SyntheticSet:
    """Write a set of random real images with the labels of a teacher, after the epoch whose labels train best.

    Further options are those of the config: --data.trajectories STORE names the teachers, --data.ipc N the images of
    each class, --data.teacher the teacher.

    Args:
        out: the set to write, e.g. set.safetensors.
        config: of an evaluation, a file or a shipped one by its name, e.g. digits/evaluate.
        networks: trained for each of at most eight epochs, and measured on held-out images.
        epochs: of each network; by default those of the config (trainer.max_epochs).
        overrides: further options, for the config.
    """
    if out.exists() and SyntheticSet.read_metadata(out).get("labels_made") != "teacher":
        raise InputError(f"{out}: is there already, and is another set; name another file")
    cli = run(["--config", str(config), *overrides, *LAST_OPTIONS], start=False)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    if not isinstance(module, SyntheticEvaluation) or not isinstance(data, DistillationDataModule):
        raise InputError(f"{config}: is not a config of a SyntheticEvaluation with a DistillationDataModule")
    epochs = trainer.max_epochs if epochs is None else epochs
    if epochs is None:
        raise InputError(f"{config}: has no trainer.max_epochs: give --epochs")
    torch.set_float32_matmul_precision("high")  # as for a fit
    device, bars = trainer.strategy.root_device, trainer.progress_bar_callback is not None
    made = label_random_images(module, data, networks=networks, epochs=epochs, device=device, progress=bars)
    made.save(out)
    return made


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd label``."""
    parsed = parse_command(label, "label", arguments)
    made = label(**parsed)
    by = made.metadata["label_teacher"]
    for one in by["held_out_accuracy"]:
        chosen = "  chosen" if one["epoch"] == by["epoch"] else ""
        print(f"epoch {one['epoch']:>3}  {per_cent(one, count=True)} % on held-out images{chosen}")
    source = f"labels of teacher {by['teacher']} after epoch {by['epoch']}"
    print(f"{parsed['out']}: {len(made.labels)} random images, {source}")
