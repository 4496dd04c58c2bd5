"""DataModules in the shapes of public projects go through all phases in a plain Trainer, and from the command line."""

import sys

import pytest
import torch
from fits import SMALL, make_trainer, small_matching, small_teacher
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, random_split
from torchvision import transforms

from ftd_lightning import DistillationDataModule, SyntheticEvaluation, SyntheticSet, TrajectoryStore, lightning_cli
from ftd_lightning.callbacks import TrajectoryRecorder
from ftd_lightning.data import get_dataset

pl = pytest.importorskip("pytorch_lightning")
NORMALIZE = transforms.Normalize((0.3,), (0.4,))


NAMES = [f"digit {i}" for i in range(10)]


class Digits(Dataset):
    """The interface of torchvision's data sets."""

    def __init__(self, train, transform=None, count=120):
        self.images, self.labels = get_dataset("digits").load()["train" if train else "test"].take(torch.arange(count))
        self.transform, self.classes = transform, NAMES

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index, 0].mul(255).round().byte().numpy())
        return self.transform(image) if self.transform else image, int(self.labels[index])


class Normalised(LightningDataModule):
    """lightning-hydra-template: normalised, and split at random from the joined training and test images."""

    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.save_hyperparameters()
        self.transforms = transforms.Compose([transforms.ToTensor(), NORMALIZE])
        self.data_train = None

    def setup(self, stage=None):
        if not self.data_train:
            everything = ConcatDataset([Digits(train, transform=self.transforms) for train in (True, False)])
            generator = torch.Generator().manual_seed(42)
            self.data_train, self.data_val, self.data_test = random_split(everything, [160, 40, 40], generator)

    def train_dataloader(self):
        return DataLoader(self.data_train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data_val, batch_size=self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.data_test, batch_size=self.hparams.batch_size)


class Dictionaries(LightningDataModule):
    """torchgeo: samples are dictionaries; a stage sets its own datasets up; images are scaled on the device."""

    class Scenes(Digits):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            image = torch.cat([transforms.functional.pil_to_tensor(image).float() * 40] * 2)
            return {"image": image, "label": torch.tensor(label), "filename": f"{index}.tif"}

    def setup(self, stage):
        if stage == "fit":
            self.train_dataset = self.Scenes(True)
            self.val_dataset = self.Scenes(False, count=30)
        else:
            self.test_dataset = self.Scenes(False, count=60)

    def train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_dataset, batch_size=32)

    def test_dataloader(self):
        return DataLoader(self.test_dataset, batch_size=32)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        raise AssertionError


class SeveralLoaders(pl.LightningDataModule):
    """lightning-bolts and lightly: of the package pytorch_lightning, with lists of loaders."""

    def loaders(self, *counts):
        return [DataLoader(Digits(False, transforms.ToTensor(), count=n), batch_size=32) for n in counts]

    def train_dataloader(self):
        return DataLoader(Digits(True, transforms.ToTensor()), batch_size=32, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self.loaders(20, 30)

    def test_dataloader(self):
        return self.loaders(40)


class Stream(LightningDataModule):
    """webdataset: an iterable that makes the batches itself; no validation."""

    class Shards(IterableDataset):
        def __init__(self, train):
            self.images, self.labels = get_dataset("digits").load()["train" if train else "test"]

        def __iter__(self):
            return zip(self.images[:120].split(32), self.labels[:120].split(32), strict=True)

    def train_dataloader(self):
        return DataLoader(self.Shards(True), batch_size=None)

    def test_dataloader(self):
        return DataLoader(self.Shards(False), batch_size=None)


def scaled(batch):
    return batch["image"] / 10200, batch["label"]


SHAPES = {
    Normalised: ({}, (160, 40, 40), NAMES),
    Dictionaries: ({"batch": scaled}, (120, 30, 60), NAMES),
    SeveralLoaders: ({"loaders": {"val": 1}}, (120, 30, 40), NAMES),
    Stream: ({}, (120, 0, 120), [str(i) for i in range(10)]),
}


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
    if shape is Normalised:
        assert last.transform.describe() == {"kind": "standardization", "mean": [0.3], "std": [0.4]}


def test_teachers_of_a_bare_datamodule_are_matched_with_it_wrapped(tmp_path):
    make_trainer(tmp_path).fit(small_teacher(network=network, network_options=None, epochs=2), datamodule=Normalised())
    matching = small_matching(tmp_path / "trajectories", network=network, max_start_epoch=1)
    with pytest.warns(UserWarning, match="does not describe its teachers' images"):
        make_trainer(tmp_path, max_steps=1).fit(matching, DistillationDataModule.from_datamodule(Normalised()))
    assert SyntheticSet.load(tmp_path / "set.safetensors").transform.describe()["mean"] == [0.3]


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


class Classifier(pl.LightningModule):
    """Somebody's classifier, of the package pytorch_lightning."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_recorder_works_in_the_trainer_of_pytorch_lightning(tmp_path):
    data = DistillationDataModule.from_datamodule(Normalised())
    recorder = TrajectoryRecorder(str(tmp_path / "store"), data=data)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, callbacks=[recorder], **quiet)
    loader = Normalised()
    loader.setup()
    trainer.fit(Classifier(), loader.train_dataloader())
    matching = small_matching(tmp_path / "store", network=network, max_start_epoch=1)
    make_trainer(tmp_path, max_steps=1).fit(matching, data)
    assert SyntheticSet.load(tmp_path / "set.safetensors").metadata["dataset"] == data.describe()["dataset"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning's own CLI
@pytest.mark.parametrize("run", [lightning_cli.run, lambda given: LightningCLI(args=given)], ids=["ftd", "own"])
def test_a_datamodule_is_an_option_of_the_command_line(run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    quiet = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    teacher = ["--model=ftd_lightning.FlatTeacher", "--model.epochs=2", "--model.network_options={width: 4, depth: 1}"]
    data = ["--data=ftd_lightning.DistillationDataModule", f"--data.datamodule={__name__}.Normalised"]

    def fit(*more):
        run(["fit", *quiet, *teacher, *data, "--trainer.default_root_dir=mine", *more])
        (store,) = {file.parent for file in tmp_path.rglob("teacher_*.safetensors")}
        return TrajectoryStore(store)

    store = fit("--data.datamodule.init_args.batch_size=20", "--model.teachers=1")
    assert store.metadata["batch_size"] == 20
    assert store.data.class_names == NAMES
    (checkpoint,) = (path for path in tmp_path.rglob("*.ckpt") if path.name != "last.ckpt")
    hparams = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
    assert "datamodule" not in hparams
    recorder = [
        "--trainer.callbacks+=ftd_lightning.callbacks.TrajectoryRecorder",
        f"--trainer.callbacks.path={store.path}",
    ]
    resumed = ["--model.teachers=2", f"--ckpt_path={checkpoint}", *recorder]
    with refused("data.batch_size=32"):
        fit(*resumed)
    assert len(fit("--data.datamodule.init_args.batch_size=20", *resumed)) == 2
