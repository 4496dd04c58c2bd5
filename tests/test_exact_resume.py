"""A fit that was stopped anywhere and resumed in a plain Trainer ends with the bits of one that was never stopped."""

import os
import signal
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ftd_lightning import FlatTeacher, SyntheticEvaluation, SyntheticSet
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA
from ftd_lightning.callbacks.checkpoint_io import FitCheckpoint
from ftd_lightning.modules import (
    BackboneDistillation,
    DistributionMatching,
    FeatureAlignment,
    FeatureRegression,
    GradientMatching,
    KernelInducingPoints,
)

NET = {"network_options": SMALL}
RIVAL = {**NET, "batch_real": 8, "iterations_per_epoch": 5}
RIDGE = {**NET, "batch_target": 32, "learn_labels": True, "iterations_per_epoch": 5}
BACKBONE = {"batch_target": 32, "copies": 2, "iterations_per_epoch": 5}
POOL = {"pool_size": 2, "max_steps_per_network": 4, "pool_batch": 7}


class KilledError(Exception):
    """Stands for SIGKILL: nothing is written after it but what callbacks write on any exception."""


class Kill(Callback):
    """Ends the process's work at the n-th call of a hook."""

    def __init__(self, hook: str, count: int) -> None:
        self.hook, self.left = hook, count

    def _hit(self, hook: str) -> None:
        self.left -= hook == self.hook
        if self.left == 0:
            raise KilledError

    def on_train_batch_start(self, *args) -> None:
        self._hit("batch")

    def on_train_epoch_end(self, *args) -> None:
        self._hit("epoch end")

    def on_validation_start(self, *args) -> None:
        self._hit("validation")

    def on_validation_end(self, *args) -> None:
        self._hit("validated")


class Stop(Callback):
    """Stops after the n-th batch, as the timer of ``max_time`` does or as the system asks for by SIGTERM."""

    def __init__(self, by: str, count: int) -> None:
        self.by, self.left = by, count

    def on_train_batch_end(self, trainer, *args) -> None:
        self.left -= 1
        if self.left == 0 and self.by == "max_time":
            trainer.should_stop = True
        elif self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def checkpointing(folder: Path, rhythm) -> ModelCheckpoint:
    """Every so many steps, at the end of training epochs, after validations, or at a signal; always ``last.ckpt``."""
    if rhythm == "signal":
        return FitCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_epochs=100)
    when = {"every_n_train_steps": rhythm} if isinstance(rhythm, int) else {"save_on_train_epoch_end": rhythm == "end"}
    return ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, **when)


class Case:
    """A fit of a few seconds: how to make the module, its data, its callbacks and the trainer's limits."""

    def __init__(self, module, data=small_data, callbacks=list, **limits) -> None:
        self.module, self.data, self.callbacks, self.limits = module, data, callbacks, limits

    def run(self, folder: Path, rhythm, *more, resume: bool = False, **limits) -> None:
        last = folder / "checkpoints" / "last.ckpt"
        callbacks = [*self.callbacks(), checkpointing(folder, rhythm), *more]
        options = {**self.limits, **limits, "callbacks": callbacks, "enable_checkpointing": True}
        trainer, module, data = make_trainer(folder, **options), self.module(), self.data()
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if resume and last.exists() else None)
        if isinstance(module, SyntheticEvaluation):
            trainer.test(module, datamodule=data, verbose=False)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    store = record(folder)

    def teacher() -> FlatTeacher:
        return FlatTeacher(**NET, teachers=2, epochs=2, lr=0.1, momentum=0.9)

    def matching():
        return small_matching(store, max_start_epoch=2, augment="color_crop")

    def averaged():
        return [SyntheticEMA(0.9)]

    Case(matching, max_steps=5).run(folder / "set", "end")
    few = SyntheticSet.load(folder / "set" / "set.safetensors")
    many = SyntheticSet(few.images.repeat(9, 1, 1, 1), few.labels.repeat(9), few.step_size, class_names=few.class_names)
    many.transform, many.metadata = few.transform, few.metadata
    many.save(folder / "many.safetensors")

    def evaluated():
        return small_data(synthetic=str(folder / "many.safetensors"))

    def dynamic() -> FeatureAlignment:
        return FeatureAlignment(**RIVAL, query=4, loops={"outer_max": 4, "inner_max": 2, "window": 2})

    return {
        "teachers": Case(teacher),
        "teachers, nothing held out": Case(teacher, lambda: small_data(val_fraction=0.0)),
        "matching": Case(
            matching, callbacks=lambda: [*averaged(), EvaluateSynthetic(1, networks=1, epochs=1)], max_steps=17
        ),
        "dc": Case(lambda: GradientMatching(**RIVAL, outer_loops=3, inner_epochs=2), callbacks=averaged, max_steps=17),
        "dm": Case(lambda: DistributionMatching(**RIVAL), callbacks=averaged, max_steps=17),
        "cafe": Case(dynamic, callbacks=averaged, max_steps=17),
        "kip": Case(lambda: KernelInducingPoints(**RIDGE), callbacks=averaged, max_steps=17),
        "frepo": Case(lambda: FeatureRegression(**RIDGE, **POOL), callbacks=averaged, max_steps=17),
        "backbone": Case(lambda: BackboneDistillation(str(store), **BACKBONE), callbacks=averaged, max_steps=17),
        "evaluation": Case(lambda: SyntheticEvaluation(**NET, networks=2, measure_every=1), evaluated, max_epochs=4),
    }


def artefacts(folder: Path) -> dict[str, bytes]:
    names = ("evaluation.json", "evaluations.json")
    found = [path for path in folder.rglob("*") if path.suffix == ".safetensors" or path.name in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def check(case: Case, folder: Path, stops: list[tuple]) -> None:
    """Compare the files of an uninterrupted run with those of each run that is stopped once and resumed."""
    case.run(folder / "whole", "end")
    expected = artefacts(folder / "whole")
    assert expected
    wrong = []
    for number, (rhythm, hook, count) in enumerate(stops):
        place = folder / str(number)
        if hook == "max_steps":
            case.run(place, rhythm, max_steps=count)
        elif hook == "max_time":
            case.run(place, rhythm, Stop(hook, count))
        elif hook == "SIGTERM":
            with pytest.raises(SIGTERMException):
                case.run(place, rhythm, Stop(hook, count))
            saved = torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)
            assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == count
        else:
            with pytest.raises(KilledError):
                case.run(place, rhythm, Kill(hook, count))
        case.run(place, rhythm, resume=True)
        if artefacts(place) != expected:
            wrong.append((rhythm, hook, count))
    assert not wrong


NAMES = [
    "teachers",
    "teachers, nothing held out",
    "matching",
    "dc",
    "dm",
    "cafe",
    "kip",
    "frepo",
    "backbone",
    "evaluation",
]
# Within an epoch, after one, between its last batch and its end, cut short by a limit, and asked to end by the system.
FEW = [(3, "batch", 5), ("end", "batch", 7), (2, "epoch end", 2), ("end", "max_steps", 7), ("signal", "SIGTERM", 7)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:.*manual optimization and every_n_train_steps.*")
@pytest.mark.filterwarnings("ignore:.*ends this fit before.*")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "grid", [pytest.param("few", marks=pytest.mark.slow), pytest.param("all", marks=pytest.mark.exhaustive)]
)
def test_resumed_is_uninterrupted(grid: str, name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    stops = list(FEW)
    if name == "teachers":
        stops += [(1, "validation", 2), ("validated", "validated", 2), ("validated", "batch", 7), (3, "max_time", 7)]
    if grid == "all":
        length = {"evaluation": 12}.get(name, 17)
        stops += [(rhythm, "batch", n) for rhythm in (1, 2, 3, 7, "end") for n in range(2, length)]
        stops += [(rhythm, "epoch end", n) for rhythm in (1, 2, 3, "end") for n in (1, 2, 3)]
        stops += [(rhythm, "max_steps", n) for rhythm in (1, 2, 3, "end") for n in (1, 3, 5, 7, 10)]
        stops += [(rhythm, "max_time", n) for rhythm in (1, 2, "end") for n in (3, 5, 7)]
    check(cases[name], tmp_path, stops)
