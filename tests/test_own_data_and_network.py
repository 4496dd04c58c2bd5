"""A torchvision-style dataset and a network of one's own, in a plain Trainer: the whole job in under forty lines."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision.datasets import VisionDataset

from ftd_lightning import DistillationDataModule, FlatTeacher, SyntheticEvaluation, TrajectoryMatching
from ftd_lightning.callbacks import EvaluateSynthetic


class Digits(VisionDataset):
    """Pictures as torchvision's datasets give them: PIL images, with classes and a transform."""

    classes = tuple("0123456789")

    def __init__(self, *, train: bool, transform=None) -> None:
        super().__init__(root="", transform=transform)
        images, targets = load_digits(return_X_y=True)
        part = slice(0, 1400) if train else slice(1400, None)
        self.images, self.targets = (images[part].reshape(-1, 8, 8) * 15.9375).astype("uint8"), targets[part].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index])
        return (self.transform(image) if self.transform else image), self.targets[index]


def network() -> nn.Module:
    """A small network with BatchNorm."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*The number of training batches.*")
def test_the_whole_job_beats_random_images_by_ten_points(tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def fit(module, name, *callbacks, synthetic=None, **limits):
        data = DistillationDataModule.from_datasets(
            Digits(train=True), Digits(train=False), batch_size=64, synthetic=synthetic
        )
        keep = ModelCheckpoint(tmp_path / name, save_last=True)
        trainer = Trainer(
            accelerator="cpu",
            logger=CSVLogger(tmp_path, name, version=0),
            callbacks=[keep, *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            **limits,
        )
        trainer.fit(module, datamodule=data)
        if isinstance(module, SyntheticEvaluation):
            trainer.test(module, datamodule=data, verbose=False)
        return type(module).load_from_checkpoint(keep.last_model_path, network=network), tmp_path / name / "version_0"

    teachers = FlatTeacher(network, teachers=3, epochs=15, lr=0.1, rho=0.02, augment="")
    teacher, folder = fit(teachers, "teachers", max_epochs=-1)
    assert teacher.network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    matching = TrajectoryMatching(
        folder / "trajectories",
        network,
        syn_steps=20,
        max_start_epoch=8,
        lr_images=10.0,
        step_size_init=0.1,
        augment="",
    )
    distillation, folder = fit(matching, "matching", EvaluateSynthetic(2, networks=2, epochs=100), max_steps=200)
    assert distillation.synthetic_set().class_names == list("0123456789")
    results = {}
    for name, synthetic in (("random", "random"), ("distilled", str(folder / "set.safetensors"))):
        evaluation = SyntheticEvaluation(network, networks=3, augment="", lr=0.05)
        loaded, _ = fit(evaluation, name, synthetic=synthetic, max_epochs=200)
        assert len(loaded.networks) == 3
        (results[name],) = (value["mean"] for value in evaluation.results["accuracy"].values())
    assert results["distilled"] >= results["random"] + 0.1, results
