"""DataModules in the shapes of public projects go through all phases in a plain Trainer, and from the command line."""

import json
import sys

import pytest
import torch
from fits import SMALL, make_trainer, small_matching, small_teacher
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, random_split
from torchvision import transforms

from ftd_lightning import (
    DistillationDataModule,
    Standardization,
    SyntheticEvaluation,
    SyntheticSet,
    TrajectoryStore,
    lightning_cli,
)
from ftd_lightning.callbacks import TrajectoryRecorder
from ftd_lightning.data import get_dataset
from ftd_lightning.studies.plots import count_images

pl = pytest.importorskip("pytorch_lightning")
NAMES = [f"digit {i}" for i in range(10)]
NORMALISED = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.3,), (0.4,))])


class Digits(Dataset):
    """The interface of torchvision's data sets."""

    def __init__(self, train, transform, count=120):
        self.images, self.labels = get_dataset("digits").load()["train" if train else "test"].take(torch.arange(count))
        self.transform, self.classes = transform, NAMES

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index, 0].mul(255).round().byte().numpy())
        return self.transform(image), int(self.labels[index])


class Scenes(Digits):
    """torchgeo's samples: two bands of larger numbers, in a dictionary."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"filename": f"{index}.tif", "image": torch.cat([image, image]) * 1e4, "label": torch.tensor(label)}


class Shards(IterableDataset):
    """webdataset's stream, which makes the batches itself."""

    def __init__(self, train):
        self.part = get_dataset("digits").load()["train" if train else "test"].take(torch.arange(120))

    def __iter__(self):
        return zip(*(values.split(32) for values in self.part), strict=True)


class Loaders:
    def train_dataloader(self):
        return DataLoader(self.parts["train"], batch_size=self.size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts["val"], batch_size=self.size)

    def test_dataloader(self):
        return DataLoader(self.parts["test"], batch_size=self.size)


class Normalised(Loaders, LightningDataModule):
    """lightning-hydra-template: normalised, and split at random from the joined training and test images."""

    def __init__(self, size: int = 32):
        super().__init__()
        self.save_hyperparameters()
        self.size = self.hparams.size

    def setup(self, stage):
        everything = ConcatDataset([Digits(train, NORMALISED) for train in (True, False)])
        parts = random_split(everything, [160, 40, 40], torch.Generator().manual_seed(42))
        self.parts = dict(zip(("train", "val", "test"), parts, strict=True))


class Dictionaries(Loaders, LightningDataModule):
    """torchgeo: samples are dictionaries; each stage has its datasets; a hook changes batches on the device."""

    size, parts = 32, {}

    def setup(self, stage):
        counts = {"train": 120, "val": 30} if stage == "fit" else {"test": 60}
        new = {part: Scenes(part == "train", transforms.ToTensor(), count) for part, count in counts.items()}
        self.parts = {**self.parts, **new}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        raise AssertionError


class SeveralLoaders(Loaders, pl.LightningDataModule):
    """lightning-bolts and lightly: of the package pytorch_lightning, with lists of loaders."""

    size = 32

    def setup(self, stage):
        self.parts = {part: Digits(part == "train", transforms.ToTensor()) for part in ("train", "test")}

    def val_dataloader(self):
        return [DataLoader(Digits(False, transforms.ToTensor(), count), batch_size=32) for count in (20, 30)]


class Stream(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Shards(True), batch_size=None)

    def test_dataloader(self):
        return DataLoader(Shards(False), batch_size=None)


SHAPES = {
    Normalised: ({}, (160, 40, 40), NAMES),
    Dictionaries: ({"batch": lambda b: (b["image"] / 1e4, b["label"])}, (120, 30, 60), NAMES),
    SeveralLoaders: ({"loaders": {"val": 1}}, (120, 30, 120), NAMES),
    Stream: ({}, (120, 0, 120), [str(i) for i in range(10)]),
}


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_datamodules_go_through_all_phases(shape, tmp_path):
    options, counts, names = SHAPES[shape]

    def data(**more):
        return DistillationDataModule.from_datamodule(shape(), **options, **more)

    make_trainer(tmp_path).fit(small_teacher(teachers=1, epochs=2), datamodule=data())
    store = TrajectoryStore(tmp_path / "trajectories")
    assert store.metadata["batch_size"] == 32
    make_trainer(tmp_path, max_steps=2).fit(small_matching(store.path, max_start_epoch=1), datamodule=data())
    synthetic = SyntheticSet.load(tmp_path / "set.safetensors")
    assert synthetic.class_names == names
    assert synthetic.metadata["dataset"] == store.metadata["dataset"]
    evaluation = SyntheticEvaluation(network_options=SMALL, networks=1, lr=0.05, augment="")
    trainer, last = make_trainer(tmp_path, max_epochs=60), data(synthetic=synthetic)
    trainer.fit(evaluation, datamodule=last)
    (tested,) = trainer.test(evaluation, datamodule=last, verbose=False)
    assert tested["evaluation/test_accuracy_mean"] > 0.2
    assert tuple(len(last.part(part).labels) for part in ("train", "val", "test")) == counts
    pictures = last.transform.invert(last.train.images)
    assert -1e-6 <= float(pictures.min()) < 0.01
    assert 0.99 < float(pictures.max()) <= 1 + 1e-6


def test_a_comparison_counts_the_images_of_a_wrapped_datamodule(tmp_path):
    given = {"datamodule": {"class_path": f"{__name__}.Normalised", "init_args": {"size": 20}}}
    settings = {**given, "synthetic": "random", "ipc": 2, "batch_size": 256, "ema": False}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"init_args": settings}}))
    found = count_images(tmp_path)
    assert (found["images"], found["training_images"], found["test_images"]) == (20, 200, 40)


class Staged(Loaders, LightningDataModule):
    """Reads the images of a stage alone."""

    size = 32

    def setup(self, stage):
        names = ("train", "val") if stage == "fit" else ("test",)
        self.parts = {name: Digits(name == "train", transforms.ToTensor()) for name in names}


def test_loaded_networks_are_tested_without_training_images(tmp_path):
    module = SyntheticEvaluation(network, networks=1, augment="", lr=0.1)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, datamodule=Staged())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.test(module, datamodule=Staged(), verbose=False)
    again = SyntheticEvaluation.load_from_checkpoint(tmp_path / "last.ckpt", network=network)
    make_trainer(tmp_path / "test").test(again, datamodule=Staged(), verbose=False)
    assert again.results["each"] == module.results["each"]


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_teachers_of_a_bare_datamodule_or_the_other_trainer_are_matched(package, tmp_path):
    wrapped = DistillationDataModule.from_datamodule(Normalised())
    store, matched = tmp_path / "store", {"network": network, "max_start_epoch": 1}
    if package == "lightning":
        recorder = TrajectoryRecorder(str(store))
        make_trainer(tmp_path, callbacks=[recorder]).fit(small_teacher(network=network), datamodule=Normalised())
        with pytest.warns(UserWarning, match="does not describe its teachers' images"):
            make_trainer(tmp_path, max_steps=1).fit(small_matching(store, **matched), wrapped)
    else:
        recorder = TrajectoryRecorder(str(store), data=wrapped)
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[recorder], logger=False, **quiet)
        trainer.fit(Classifier(), DataLoader(Digits(True, NORMALISED), batch_size=32))
        make_trainer(tmp_path, max_steps=1).fit(small_matching(store, **matched), wrapped)
    assert SyntheticSet.load(tmp_path / "set.safetensors").transform == Standardization([0.3], [0.4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning's own CLI
@pytest.mark.parametrize("run", [lightning_cli.run, lambda given: LightningCLI(args=given)], ids=["ftd", "own"])
def test_a_datamodule_is_an_option_of_the_command_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    options = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.accelerator=cpu", "--model=ftd_lightning.FlatTeacher", "--model.epochs=2"]
    options += ["--model.network_options={width: 4, depth: 1}", "--data=ftd_lightning.DistillationDataModule"]
    options += [f"--data.datamodule={__name__}.Normalised", "--trainer.callbacks.path=store"]
    options.insert(-1, f"--trainer.callbacks={TrajectoryRecorder.__module__}.TrajectoryRecorder")
    run(["fit", *options, "--data.datamodule.init_args.size=20", "--model.teachers=1"])
    assert TrajectoryStore("store").metadata["batch_size"] == 20
    (checkpoint,) = (path for path in tmp_path.rglob("*.ckpt") if path.name != "last.ckpt")
    assert "datamodule" not in torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
    options += ["--model.teachers=2", f"--ckpt_path={checkpoint}"]
    run(["fit", *options, "--data.datamodule.init_args.size=20"])
    assert len(TrajectoryStore("store")) == 2
