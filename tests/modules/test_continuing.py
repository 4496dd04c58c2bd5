"""A distillation that starts from a set: every method continues with its images, labels and step size."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, small_data, small_matching

from ftd_lightning import SyntheticSet, modules
from ftd_lightning.functional import InnerAdam
from ftd_lightning.models import ConvNet
from ftd_lightning.modules.distillation import Distillation
from ftd_lightning.rules import CorrectImages, LearnedLabels

LABELS = {"rules": [LearnedLabels(lr=1.0, init="one_hot")]}
METHODS = {
    "matching": (small_matching, LABELS),
    "bilevel": (modules.BilevelDistillation, {"syn_steps": 2, "schedule": "fixed", "batch_real": 20, **LABELS}),
    "dm": (modules.DistributionMatching, {"batch_real": 4}),
    "dsa": (modules.GradientMatching, {"outer_loops": 1, "inner_epochs": 1, "batch_real": 4}),
    "cafe": (modules.FeatureAlignment, {"batch_real": 4}),
    "kip": (modules.KernelInducingPoints, {"learn_labels": True, "batch_target": 20}),
    "frepo": (modules.FeatureRegression, {"pool_size": 1, "batch_target": 20}),
}


def make(method: str, trajectories: Path, **options) -> Distillation:
    kind, settings = METHODS[method]
    place = {"trajectories": trajectories} if kind is small_matching else {"network_options": SMALL}
    return kind(**{**place, **settings, **options})


def fit(folder: Path, module: Distillation, steps: int, checkpoint: Path | None = None) -> SyntheticSet:
    make_trainer(folder, max_steps=steps).fit(module, small_data(), ckpt_path=checkpoint)
    return module.synthetic_set()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_from_its_set(method: str, tmp_path: Path, trajectories: Path) -> None:
    fit(tmp_path, make(method, trajectories, ipc=2, lr_images=1.0), 2)
    before = SyntheticSet.load(tmp_path / "set.safetensors")
    module = make(method, trajectories, init=str(tmp_path / "set.safetensors"))
    start = fit(tmp_path / "start", module, 0)
    assert module.ipc == module.hparams["ipc"] == 2
    assert torch.equal(start.images, before.images)
    assert torch.equal(module.initial_images, before.images)
    torch.testing.assert_close(start.labels, before.labels)
    assert torch.equal(start.step_size, before.step_size)
    assert start.metadata["settings"]["init"] == f"set {before.fingerprint()}"
    after = fit(tmp_path / "on", make(method, trajectories, init=before), 1)
    assert not torch.equal(after.images, before.images)
    assert after.metadata["settings"] == start.metadata["settings"]


def test_it_resumes_exactly_and_loads_without_the_set(tmp_path: Path, trajectories: Path, refused) -> None:
    first = fit(tmp_path / "first", make("dm", trajectories), 1)
    whole = fit(tmp_path / "whole", make("dm", trajectories, init=first), 4)
    half, ckpt = make("dm", trajectories, init=first), tmp_path / "half.ckpt"
    trainer = make_trainer(tmp_path / "half", max_steps=2)
    trainer.fit(half, small_data())
    trainer.save_checkpoint(ckpt)
    resumed = fit(tmp_path / "half", make("dm", trajectories, init=first), 4, ckpt)
    assert torch.equal(resumed.images, whole.images)
    loaded = modules.DistributionMatching.load_from_checkpoint(ckpt)
    assert torch.equal(loaded.synthetic_set().images, half.synthetic_set().images)
    with refused("init=", first.fingerprint()):
        fit(tmp_path / "half", make("dm", trajectories, init=whole), 4, ckpt)


def test_without_a_datamodule_the_set_keeps_its_own_transform(tmp_path: Path, trajectories: Path) -> None:
    first, network = fit(tmp_path / "first", make("dm", trajectories), 1), partial(ConvNet, 1, 10, 8, **SMALL)
    data, trainer = small_data(), make_trainer(tmp_path, max_steps=1)
    data.setup()
    module = modules.DistributionMatching(network, init=first, real=data.part("train"), batch_real=4)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    loaded = modules.DistributionMatching.load_from_checkpoint(tmp_path / "own.ckpt", network=network)
    for made in (module.synthetic_set(), loaded.synthetic_set()):
        assert made.transform == first.transform == data.transform
        assert (made.class_names, made.metadata["dataset"]) == (first.class_names, {"name": "own images"})


def test_a_set_for_adam_keeps_its_step_size_to_itself(tmp_path: Path, trajectories: Path) -> None:
    first = replace(fit(tmp_path / "first", make("dm", trajectories), 1), step_size=0.7)
    for options, rate in (({}, 0.7), ({"optimizer": InnerAdam()}, 0.01)):
        module = make("bilevel", trajectories, init=first, **options)
        fit(tmp_path / str(rate), module, 0)
        assert module.step_size.tolist() == pytest.approx([rate, rate])


def test_unequal_classes_continue_class_by_class(tmp_path: Path, trajectories: Path) -> None:
    first = fit(tmp_path / "first", make("dm", trajectories), 1)
    joined = SyntheticSet.concatenate([first, first.take_classes(["8", "3"])])
    mixed = replace(joined, images=joined.images.flip(0), labels=joined.labels.flip(0))
    module = make("dm", trajectories, init=mixed)
    assert module.ipc == [1, 1, 1, 2, 1, 1, 1, 1, 2, 1]
    fit(tmp_path / "on", module, 1)
    assert torch.equal(module.initial_images, joined.images)
    assert torch.equal(module.labels, joined.labels)


def test_sets_that_do_not_fit_are_refused(tmp_path: Path, trajectories: Path, refused) -> None:
    good = fit(tmp_path / "first", make("dm", trajectories), 1)
    for change, words in (
        ({"images": torch.zeros(10, 1, 9, 9)}, "shape"),
        ({"class_names": list("abcdefghij")}, "class_names"),
        ({"transform": type(good.transform)([0.5], [2.0])}, "transform"),
    ):
        with refused("init: ", words):
            fit(tmp_path / "no", make("dm", trajectories, init=replace(good, **change)), 1)
    with refused("init='rael'", "'real' or 'noise'"):
        make("dm", trajectories, init="rael")
    with refused("init=", "CorrectImages"):
        make("matching", trajectories, init=good, rules=[CorrectImages()])


def test_a_trainer_without_limits_says_how_long_it_takes(tmp_path: Path, trajectories: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1000, limit_train_batches=0)
    with pytest.warns(UserWarning, match="this fit has 100,000 iterations; Trainer"):
        trainer.fit(make("dm", trajectories), small_data())
