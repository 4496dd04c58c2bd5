"""Two processes with gloo on the CPU, against one process: every kind of fit, a killed rank, refused loaders.

Two processes run all jobs one after the other, because most of the time is their start.
"""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching, small_teacher
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from processes import on_ranks
from torch import nn

from ftd_lightning import SyntheticEvaluation, SyntheticSet, TrajectoryStore
from ftd_lightning.callbacks import (
    AtomicCheckpointIO,
    EvaluateSynthetic,
    SyntheticEMA,
    SyntheticSetWriter,
    TrajectoryRecorder,
)
from ftd_lightning.data.loaders import BatchOrder
from ftd_lightning.decoders import Bases
from ftd_lightning.functional import InnerAdam, gsam_direction, gsam_perturbation, load_flat
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import BackboneDistillation, BilevelDistillation, FeatureRegression
from ftd_lightning.rules import ClosestStep, LearnedLabels, LossGate, StartWindow, TargetLabels

pytestmark = pytest.mark.slow  # processes

BATCH_NORM = {"network_options": {**SMALL, "norm": "batch"}}


def trainer_of(folder: Path, ranks: int, **options):
    return make_trainer(folder, **({"strategy": "ddp", "devices": 2} if ranks == 2 else {}), **options)


# --- Jobs: each runs on one process or on two, and returns values that are compared.


def distil(module, folder: Path, ranks: int) -> dict:
    callbacks = [SyntheticEMA(0.9), SyntheticSetWriter()]
    trainer_of(folder, ranks, callbacks=callbacks, max_steps=5).fit(module, datamodule=small_data())
    made = module.synthetic_set()
    settings = {key: value for key, value in made.metadata["settings"].items() if key.endswith("_per_step")}
    tensors = {"images": made.images, "labels": made.labels, "step": made.step_size, "average": made.ema_images}
    return {**tensors, "gated": made.metadata.get("gated_steps"), "settings": settings}


def match(folder: Path, ranks: int, store: Path, *rules, **options) -> dict:
    """Two segments in every step, both on one process or one on each."""
    given = {"augment": "crop_scale", "segments_per_step": 2 // ranks, "rules": list(rules), **options}
    return distil(small_matching(store, **given), folder, ranks)


def gated(folder: Path, ranks: int, store: Path, threshold: float) -> dict:
    """Labels by the target, a window, the closest step, and a gate that judges the mean loss."""
    rules = [TargetLabels(), StartWindow(ceiling=1, growth_iterations=3), ClosestStep(), LossGate(threshold)]
    return match(folder, ranks, store, *rules)


def learn_without_teachers(folder: Path, ranks: int) -> dict:
    options = {"optimizer": InnerAdam(), "window": 2, "clip": 1.0, "step_size_init": 0.01, "syn_steps": 4}
    module = BilevelDistillation(network_options=SMALL, batch_real=32, networks_per_step=2 // ranks, **options)
    return distil(module, folder, ranks)


def regress(folder: Path, ranks: int) -> dict:
    """FRePo: real images of each rank's own, one set, one pool."""
    module = FeatureRegression(network_options=SMALL, batch_target=16, learn_labels=True, pool_size=2)
    trainer_of(folder, ranks, max_steps=6).fit(module, datamodule=small_data())
    pool = {
        f"{place}.{name}": value
        for place in range(2)
        for name, value in module.pool.networks[place].state_dict().items()
    }
    made = {"images": module.images.detach(), "targets": module.soft_labels.values.detach(), **pool}
    return {**made, "scores": module.synthetic_set().metadata["scores"], "start": module.initial_images}


def probe(folder: Path, ranks: int, store: Path) -> dict:
    """CLP-DD: features of each rank's own real images, one set."""
    return distil(BackboneDistillation(str(store), batch_target=16, copies=2), folder, ranks)


def evaluate(folder: Path, ranks: int, *, resumed: bool = False) -> dict:
    """Six epochs of three networks, in one fit or in two."""
    data = small_data(synthetic="random", ipc=2, batch_size=8)
    options = {**BATCH_NORM, "networks": 3, "augment": "crop_scale", "lr": 0.05, "measure_every": 2}
    if resumed:
        module = SyntheticEvaluation(**options)
        trainer = trainer_of(folder, ranks, limit_train_batches=3, max_steps=9, max_epochs=6)
        trainer.fit(module, datamodule=data)
        trainer.save_checkpoint(folder / "half.ckpt")
    module = SyntheticEvaluation(**options)
    trainer = trainer_of(folder, ranks, limit_train_batches=3, max_epochs=6)
    trainer.fit(module, datamodule=data, ckpt_path=folder / "half.ckpt" if resumed else None)
    trainer.test(module, datamodule=data, verbose=False)
    networks = {index: network.state_dict() for index, network in zip(module.own, module.networks, strict=True)}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"networks": networks, "history": module.history, "each": module.results["each"], "metrics": metrics}


def measure(folder: Path, ranks: int, store: Path) -> dict:
    """Four iterations that leave the images alone, measured after two and after four on three networks."""
    module = small_matching(store, iterations_per_epoch=2, augment="crop_scale")
    module.configure_optimizers = lambda: torch.optim.SGD([module.images, module.step_size], lr=0.0)
    callback = EvaluateSynthetic(every_n_epochs=1, networks=3, epochs=3)
    trainer_of(folder, ranks, callbacks=[SyntheticEMA(0.9), callback], max_steps=4).fit(module, datamodule=small_data())
    return {"history": callback.history, "scores": module.scores}


def teach(folder: Path, ranks: int, *callbacks: Callback, ckpt_path: str | None = None, **options) -> dict:
    """Teachers with a checkpoint every epoch."""
    # Not save_last with save_top_k 0: lightning 2.6 then saves at the end of the fit alone.
    last = ModelCheckpoint(dirpath=folder / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False)
    module = small_teacher(**{"epochs": 3, "rho": 0.1, **options})
    settings = {"callbacks": [TrajectoryRecorder(str(folder)), last, *callbacks], "enable_checkpointing": True}
    trainer = trainer_of(folder, ranks, plugins=[AtomicCheckpointIO()], **settings)
    trainer.fit(module, datamodule=small_data(), ckpt_path=ckpt_path)
    return {"network": module.network.state_dict()}


THREE = {"teachers": 3, "momentum": 0.9, "augment": "crop_scale", **BATCH_NORM}


JOBS = {
    "match": match,
    "learned_labels": match,
    "decoded": partial(match, decoder=Bases(5, 1), lr_images=3.0),
    "gated": gated,
    "learn_without_teachers": learn_without_teachers,
    "regress": regress,
    "probe": probe,
    "whole": evaluate,
    "resumed": partial(evaluate, resumed=True),
    "measure": measure,
    "teachers": partial(teach, **THREE),
    "data": partial(teach, parallel="data"),
}


def run_jobs(root: Path, arguments: dict[str, tuple]) -> None:
    for name, job in JOBS.items():
        found = job(root / name, 2, *arguments.get(name, ()))
        torch.save(found, root / f"{name}{os.environ['LOCAL_RANK']}.pt")


@pytest.fixture(scope="module")
def threshold(tmp_path_factory: pytest.TempPathFactory, store: Path) -> float:
    """A limit that refuses one of five losses."""
    rules, losses = [TargetLabels(), StartWindow(ceiling=1, growth_iterations=3), ClosestStep()], []
    module = small_matching(store, augment="crop_scale", segments_per_step=2, rules=rules)
    noted = LambdaCallback(on_train_batch_end=lambda trainer, module, outputs, *_: losses.append(outputs["loss"]))
    trainer = make_trainer(tmp_path_factory.mktemp("ungated"), callbacks=[noted], max_steps=5)
    trainer.fit(module, datamodule=small_data())
    return float(sorted(losses)[3]) * 1.0001


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("teachers"), epochs=8, lr=0.2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, store: Path, threshold: float) -> Path:
    """The folder of all jobs on two processes."""
    root = tmp_path_factory.mktemp("two")
    arguments = dict.fromkeys(("match", "decoded", "measure", "probe"), (store,))
    arguments |= {"gated": (store, threshold), "learned_labels": (store, LearnedLabels(lr=2.0))}
    for done in on_ranks(run_jobs, root, arguments):
        assert "sync_dist" not in done.stderr
    return root


def saved(two: Path, job: str) -> list[dict]:
    return [torch.load(two / f"{job}{rank}.pt", weights_only=True) for rank in range(2)]


def same(one: dict, other: dict, **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], rtol=0, atol=tolerance.get("atol", 0))
        else:
            assert value == other[key], key


# --- Distillation


@pytest.mark.parametrize("job", ["match", "learned_labels", "decoded", "gated", "learn_without_teachers"])
def test_two_ranks_learn_the_set_of_one_process(job: str, two: Path, store: Path, threshold: float, tmp_path) -> None:
    """Their gradients are averaged; a skipped step is skipped by both."""
    arguments = {"learned_labels": (store, LearnedLabels(lr=2.0)), "gated": (store, threshold)}
    arguments |= dict.fromkeys(("match", "decoded"), (store,))
    first, second = saved(two, job)
    one = JOBS[job](tmp_path, 1, *arguments.get(job, ()))
    labels = {"labels": first["labels"]} if job == "gated" else {}  # by the target of its own segment, on each rank
    same(first, {**second, **labels})
    same(first, one, atol=1e-5)
    assert 2 in first["settings"].values()
    written = SyntheticSet.load(two / job / "set.safetensors")
    assert torch.equal(written.images, first["images"])
    if job == "gated":
        assert first["gated"] >= 1
    if job == "match":
        alone = small_matching(store, augment="crop_scale")
        make_trainer(tmp_path / "alone", max_steps=5).fit(alone, datamodule=small_data())
        assert (alone.images - one["images"]).abs().max() > 1e-3, "the second rank's segments must matter"


def test_ranks_regress_together(two: Path, tmp_path: Path) -> None:
    (first, second), one = saved(two, "regress"), regress(tmp_path, 1)
    same(first, second)
    assert not torch.equal(first["images"], first["start"])
    assert not torch.equal(first["images"], one["images"]), "the second rank draws images of its own"


def test_ranks_share_a_set_for_a_backbone(two: Path, store: Path, tmp_path: Path) -> None:
    (first, second), one = saved(two, "probe"), probe(tmp_path, 1, store)
    same(first, second)
    assert not torch.equal(first["images"], one["images"]), "the second rank draws images of its own"


# --- Evaluation


def test_two_ranks_evaluate_as_one_process_does(two: Path, tmp_path: Path) -> None:
    one = evaluate(tmp_path, 1)
    assert [len(entry["test"]) for entry in one["history"]] == [3, 3, 3]
    resumed = evaluate(tmp_path / "resumed", 1, resumed=True)
    for name, weights in resumed["networks"].items():
        same(weights, one["networks"][name])
    for job in ("whole", "resumed"):
        ranks = saved(two, job)
        assert [list(rank["networks"]) for rank in ranks] == [[0, 2], [1, 3]], "the fourth fills up the round"
        for rank in ranks:
            for index, weights in rank["networks"].items():
                same(weights, one["networks"].get(index, weights))
            assert (rank["history"], rank["each"]) == (one["history"], one["each"])
            assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
        assert (two / job / "evaluation.json").read_bytes() == (tmp_path / "evaluation.json").read_bytes()


def test_measurements_on_the_way_are_spread_over_ranks(two: Path, store: Path, tmp_path: Path) -> None:
    (first, second), one = saved(two, "measure"), measure(tmp_path, 1, store)
    assert len(one["history"]) == 8, "two measurements of raw and averaged images on two parts"
    assert any(entry["std"] for entry in one["history"]), "the networks differ"
    assert one == first == second
    assert json.loads((two / "measure" / "evaluations.json").read_text()) == one["history"]


# --- Teachers


def store_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_two_ranks_record_the_teachers_of_one_process(two: Path, tmp_path: Path) -> None:
    """The fourth teacher, which fills up the last round, is not recorded."""
    teach(tmp_path, 1, **THREE)
    assert len(TrajectoryStore(tmp_path)) == 3
    assert store_files(two / "teachers") == store_files(tmp_path)
    assert not (two / "teachers" / ".unfinished").exists()


def test_ranks_that_share_batches_step_along_the_mean_direction(two: Path) -> None:
    """The first epoch on two ranks, against both halves of every batch worked out here."""
    first, second = (rank["network"] for rank in saved(two, "data"))
    same(first, second)
    store, data = TrajectoryStore(two / "data"), small_data()
    data.setup()
    network, weights = ConvNet(1, 10, 8, **SMALL), store.trajectory(0)[0]
    assert len(store) == 2

    def gradient(at: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        load_flat(network, at)
        loss = nn.functional.cross_entropy(network(data.train.images[index]), data.train.labels[index])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    orders = [list(BatchOrder(len(data.train.labels), 32, shuffle=True, rank=r, world_size=2)) for r in range(2)]
    for indices in zip(*orders, strict=True):
        directions = []
        for index in indices:
            g = gradient(weights, index)
            g_p = gradient(weights + gsam_perturbation([weights], [g], rho=0.1)[0], index)
            directions += gsam_direction([g], [g_p], alpha=1.0)
        weights = weights - 0.1 * torch.stack(directions).mean(0)
    torch.testing.assert_close(weights, store.trajectory(0)[1], rtol=1e-4, atol=1e-5)


class Killed(Callback):
    """Kills the second rank in the second epoch of the second round: one teacher of each rank is done."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (4, 1, 1):
            os.kill(os.getpid(), signal.SIGKILL)


class Begun(Callback):
    """Notes where a fit begins."""

    def on_train_start(self, trainer, module) -> None:
        self.at = (trainer.current_epoch, module.teacher_progress().teacher)


FOUR = {**THREE, "teachers": 4}


def teach_and_die(folder: Path) -> None:
    teach(folder, 2, Killed(), **FOUR)


def teach_on(folder: Path) -> None:
    begun = Begun()
    found = teach(folder, 2, begun, ckpt_path=str(folder / "checkpoints" / "last.ckpt"), **FOUR)
    torch.save({**found, "begun": begun.at}, folder / f"resumed{os.environ['LOCAL_RANK']}.pt")


def test_a_killed_rank_ends_the_run_and_a_resumed_one_records_the_same_teachers(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    with pytest.raises(AssertionError):
        on_ranks(teach_and_die, folder)
    assert [path.name for path in sorted(folder.glob("teacher_*"))] == [
        "teacher_0000.safetensors",
        "teacher_0001.safetensors",
    ]
    on_ranks(teach_on, folder)
    ranks = saved(folder, "resumed")
    assert [rank["begun"] for rank in ranks] == [(4, 2), (4, 3)]
    whole = teach(tmp_path / "whole", 1, **FOUR)
    assert store_files(folder) == store_files(tmp_path / "whole")
    assert not (folder / ".unfinished").exists()
    # Running statistics too, which no trajectory shows: DDP copies the first rank's before its first step.
    assert any("running_var" in name for name in whole["network"])
    same(ranks[1]["network"], whole["network"])
