"""The whole job on a part of the real CIFAR-10, whitened: narrow teachers, a few iterations, evaluation, pictures."""

from pathlib import Path

import pytest
import torch
from fits import make_trainer

from ftd_lightning import (
    DistillationDataModule,
    FlatTeacher,
    SyntheticEvaluation,
    SyntheticSet,
    TrajectoryMatching,
    TrajectoryStore,
)
from ftd_lightning.callbacks import SyntheticEMA, SyntheticSetWriter, TrajectoryRecorder
from ftd_lightning.data.sources import unit_range


@pytest.fixture(scope="module")
def job(cifar_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all three phases; give the folder with what they made."""
    folder = tmp_path_factory.mktemp("cifar_job")

    def data(**options) -> DistillationDataModule:
        part = {
            "dataset": "cifar10",
            "root": str(cifar_root),
            "download": False,
            "max_per_class": 100,
            "batch_size": 32,
        }
        return DistillationDataModule(**part, zca=options.get("synthetic") is None, **options)

    teacher = FlatTeacher(network_options={"width": 16, "depth": 3}, teachers=2, epochs=5, lr=0.05, rho=0.01, alpha=0.3)
    make_trainer(folder, callbacks=[TrajectoryRecorder()]).fit(teacher, datamodule=data())
    matching = TrajectoryMatching(
        str(folder / "trajectories"), syn_steps=5, expert_epochs=1, max_start_epoch=3, iterations_per_epoch=5
    )
    callbacks = [SyntheticEMA(0.9), SyntheticSetWriter()]
    make_trainer(folder, callbacks=callbacks, max_steps=10).fit(matching, datamodule=data())
    evaluation = SyntheticEvaluation(network_options={"width": 16, "depth": 3}, networks=2)
    trainer, images = make_trainer(folder, max_epochs=30), data(synthetic=str(folder / "set.safetensors"))
    trainer.fit(evaluation, datamodule=images)
    trainer.test(evaluation, datamodule=images, verbose=False)
    assert all(0.1 < accuracy < 1 for accuracy in evaluation.results["each"]), "ten classes"
    assert min(TrajectoryStore(folder / "trajectories").teacher_metadata(k)["accuracies"][-1] for k in (0, 1)) > 0.15
    return folder


def test_pictures_of_the_initial_images_are_the_originals(job: Path, cifar_root: Path) -> None:
    """Whitening undone: the inverse error, on the transform that travelled with the set."""
    synthetic = SyntheticSet.load(job / "set.safetensors")
    plain = DistillationDataModule(dataset="cifar10", root=str(cifar_root), download=False)
    train = plain.spec.load()["train"]
    originals = unit_range(train.pictures[:64])
    whitened = synthetic.transform.apply(originals)
    assert (whitened - originals).abs().mean() > 0.1, "the transform does something"
    assert (synthetic.transform.invert(whitened) - originals).abs().max() < 1e-3


def test_distilled_pictures_stay_near_where_they_began_and_did_move(job: Path, cifar_root: Path) -> None:
    synthetic = SyntheticSet.load(job / "set.safetensors")
    pictures = synthetic.pictures()
    assert pictures.shape == (10, 3, 32, 32)
    real = DistillationDataModule(dataset="cifar10", root=str(cifar_root), download=False, max_per_class=100, zca=True)
    real.setup()
    from ftd_lightning.data import random_real_images

    start = random_real_images(real.train, 1, 0)
    assert torch.equal(start.labels, synthetic.labels)
    distance = (synthetic.images - start.images).abs().mean()
    assert 0 < distance < 0.5
    before = real.transform.invert(start.images).clamp(0, 1)
    assert (pictures - before).abs().mean() < 0.2
