import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from fits import make_trainer, small_data
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from ftd_lightning.contracts import BatchPlan, LearnsSet
from ftd_lightning.data import DistillationDataModule, SegmentLoader, random_real_images
from ftd_lightning.data.loaders import BatchOrder, TensorLoader
from ftd_lightning.files import Standardization, SyntheticSet, TrajectoryStore, Whitening, write_teacher

TEST_OF_EACH_DIGIT = [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
TRAIN_OF_EACH_DIGIT = [142, 146, 141, 147, 144, 146, 145, 143, 139, 144]


@pytest.fixture
def ready(tmp_path):
    """Give ``ready(**options)``: a DataModule of the digits, set up."""

    def make(**options):
        data = DistillationDataModule(**{"cache_dir": str(tmp_path / "cache"), **options})
        data.prepare_data()
        data.setup()
        return data

    return make


def pixels(images, data):
    """The pixels of each image as bytes of 17 grey levels, so that images can be told apart and counted."""
    pictures = data.transform.invert(images.images)
    return [picture.numpy().tobytes() for picture in (pictures * 16).round().to(torch.uint8)]


def counts(labels):
    return labels.bincount(minlength=10).tolist()


# The digits and their parts


@pytest.mark.parametrize("zca", [False, True], ids=["standardised", "whitened"])
def test_some_classes_are_numbered_in_their_order(zca, ready):
    whole, data = ready(val_fraction=0.0), ready(val_fraction=0.0, classes=["7", "3"], zca=zca)
    assert (data.num_classes, data.class_names) == (2, ["7", "3"])
    assert data.count("train") == [TRAIN_OF_EACH_DIGIT[7], TRAIN_OF_EACH_DIGIT[3]]
    for number, label in enumerate((7, 3)):
        ours, theirs = (images.take(images.labels == one) for images, one in ((data.test, number), (whole.test, label)))
        assert pixels(ours, data) == pixels(theirs, whole)
    assert data.describe()["dataset"]["classes"] == ["7", "3"]
    random = ready(classes=["7", "3"], synthetic="random", ipc=2).synthetic_set
    assert (random.labels.tolist(), random.class_names) == ([0, 0, 1, 1], ["7", "3"])


@pytest.mark.parametrize("classes", [[], ["7", "7"], ["seven"]])
def test_unknown_classes_are_refused(classes, refused):
    with refused(f"classes={classes}: give some of 0, 1, 2"):
        DistillationDataModule(classes=classes).setup()


def test_objects_have_classes_too(refused):
    pictures, labels = torch.rand(40, 1, 8, 8), torch.arange(4).repeat(10)
    names = ["ant", "bee", "cat", "dog"]
    data = DistillationDataModule.from_datasets(
        (pictures, labels), (pictures[:6], labels[:6]), class_names=names, classes=["dog", "bee"]
    )
    data.setup()
    assert (data.class_names, data.count("train"), data.count("test")) == (["dog", "bee"], [9, 9], [1, 2])


def test_digits_are_split_once_and_for_all(ready):
    data = ready(val_fraction=0.0)
    assert counts(data.train.labels) == TRAIN_OF_EACH_DIGIT
    assert counts(data.test.labels) == TEST_OF_EACH_DIGIT
    train, test = pixels(data.train, data), pixels(data.test, data)
    assert not set(train) & set(test)
    digests = [hashlib.sha256(b"".join(part)).hexdigest()[:16] for part in (train, test)]
    assert digests == ["bf2b3910a03b69f5", "3c05733c55d71010"]
    assert data.test.labels[:20].tolist() == [0, 2, 4, 7, 1, 6, 8, 9, 5, 3, 0, 2, 7, 6, 4, 0, 1, 3, 9, 8]
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 8)
    assert abs(float(data.train.images.mean())) < 0.02
    assert abs(float(data.train.images.std()) - 1) < 0.02
    other = ready(seed=1)
    assert torch.equal(other.test.images, data.test.images)
    assert set(pixels(other.train, other) + pixels(other.val, other)) == set(train)


def test_held_out_images_are_a_drawn_share_of_every_class_of_training_alone(ready):
    data, whole = ready(val_fraction=0.25, seed=3), ready(val_fraction=0.0)
    assert counts(data.val.labels) == [round(0.25 * n) for n in TRAIN_OF_EACH_DIGIT]
    train, val, everything = pixels(data.train, data), pixels(data.val, data), pixels(whole.train, whole)
    assert not set(train) & set(val)
    assert Counter(train + val) == Counter(everything)
    labels = dict(zip(everything, whole.train.labels.tolist(), strict=True))
    assert [labels[picture] for picture in val] == data.val.labels.tolist()
    assert max(map(everything.index, val)) > 1000  # not the first ones
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(ready(val_fraction=0.25, seed=3).val.images, data.val.images)
    assert not torch.equal(ready(val_fraction=0.25, seed=4).val.images, data.val.images)


def test_limit_keeps_at_most_so_many_of_every_class_in_training_and_test(ready):
    data = ready(max_per_class=20, val_fraction=0.1)
    assert (counts(data.train.labels), counts(data.val.labels)) == ([18] * 10, [2] * 10)
    assert counts(data.test.labels) == [20] * 10
    assert data.count("train") == [18] * 10
    assert torch.equal(ready(max_per_class=20).test.images, data.test.images)
    data = ready(max_per_class=100, val_fraction=0.0)
    assert counts(data.train.labels) == [100] * 10
    assert counts(data.test.labels) == TEST_OF_EACH_DIGIT


# Whitening


def test_whitening_is_fitted_on_training_images_and_applied_to_all(ready):
    plain, white = ready(), ready(zca=True)

    def back(data, images):
        return data.transform.invert(images.images)

    wanted = Whitening.fit(back(plain, plain.train), eps=0.1)
    for name in ("train", "val", "test"):
        pictures = back(plain, getattr(plain, name))
        assert torch.allclose(getattr(white, name).images, wanted.apply(pictures), atol=1e-3)
        assert (back(white, getattr(white, name)) - pictures).abs().max() < 1e-4

    def eigenvalues(images):
        return np.linalg.eigvalsh(np.cov(images.double().flatten(1).numpy().T))

    s = eigenvalues(back(plain, plain.train))
    assert np.abs(np.sort(eigenvalues(white.train.images)) - np.sort(s / (s + 0.1))).max() < 1e-4


def test_whitening_is_fitted_once_and_read_afterwards_without_the_pictures(ready, tmp_path, monkeypatch):
    first = ready(zca=True)
    (file,) = (tmp_path / "cache" / "whitening").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Whitening, "fit", lambda *args, **options: pytest.fail("fitted again"))
        patch.setattr("ftd_lightning.data.decoding.fingerprint", lambda *args: pytest.fail("hashed all pixels"))
        other_rank = DistillationDataModule(cache_dir=str(tmp_path / "cache"), zca=True)
        other_rank.setup("fit")  # prepare_data was called in the first one
        for again in (ready(zca=True), other_rank):
            assert torch.equal(again.train.images, first.train.images)
            assert again.describe() == first.describe()
    assert list(file.parent.iterdir()) == [file]
    changes = [{"val_fraction": 0.2}, {"zca_eps": 0.2}, {"max_per_class": 30}, {"seed": 1}, {"image_size": 6}]
    for count, change in enumerate(changes, start=2):
        assert ready(zca=True, **change).describe()["transform"] != first.describe()["transform"]
        assert len(list(file.parent.iterdir())) == count


# Training images and their stand-ins


def all_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def as_mapping(images, labels):
    return {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def test_batches_of_real_images(ready):
    data, host = ready(batch_size=100), ready(batch_size=100, on_device="no")
    assert [len(images) for images, _ in data.train_dataloader()] == [100] * 12 + [94]
    images, labels = all_of(data.train_dataloader())
    assert not torch.equal(labels, data.train.labels)  # shuffled
    assert as_mapping(images, labels) == as_mapping(*data.train)
    for name, part in (("val_dataloader", data.val), ("test_dataloader", data.test)):
        assert torch.equal(all_of(getattr(data, name)())[0], part.images)  # in order
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = [getattr(one, name)() for one in (data, host)]
        assert [type(loaders[0]), isinstance(loaders[1], DataLoader)] == [TensorLoader, True]
        assert all(map(torch.equal, all_of(loaders[0]), all_of(loaders[1])))
    assert isinstance(ready(on_device=False).train_dataloader(), DataLoader)  # as YAML reads "no"
    assert isinstance(ready(on_device=True).train_dataloader(), TensorLoader)
    assert ready(on_device="no", num_workers=2).train_dataloader().num_workers == 2


def test_random_baseline_is_real_images_of_each_class(ready, refused):
    data = ready(synthetic="random", ipc=3)
    synthetic = data.synthetic_set
    assert synthetic.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert synthetic.class_names == data.class_names
    assert (synthetic.metadata["method"], synthetic.metadata["dataset"]["name"]) == ("random", "digits")
    assert len(as_mapping(synthetic.images, synthetic.labels)) == 30
    assert as_mapping(synthetic.images, synthetic.labels).items() <= as_mapping(*data.train).items()
    # The draw is that of the initial images of a distillation, so the two can be compared.
    assert torch.equal(random_real_images(data.train, 3, 0).images, synthetic.images)
    assert not torch.equal(ready(synthetic="random", ipc=3, seed=1).synthetic_set.images, synthetic.images)
    with refused("ipc=200: class 0 has 128 images to train on; this works: [128,131,"):
        ready(synthetic="random", ipc=200)


@pytest.mark.parametrize("synthetic", ["random", "real"])
def test_baseline_can_be_saved_and_evaluated_later(ready, tmp_path, synthetic):
    data = ready(synthetic=synthetic, zca=True)
    assert len(all_of(data.train_dataloader())[1]) == (10 if synthetic == "random" else len(data.train.labels))
    data.synthetic_set.save(tmp_path / "set.safetensors")
    back = ready(synthetic=str(tmp_path / "set.safetensors"))
    assert torch.equal(back.synthetic_set.images, data.synthetic_set.images)
    assert back.synthetic_set.metadata["method"] == synthetic


@pytest.fixture
def synthetic_file(tmp_path):
    """Write a set whose transform is not that of the digits; options change its fields."""

    def write(**options):
        fields = {
            "images": torch.full((20, 1, 8, 8), 0.5),
            "labels": torch.arange(10).repeat(2),
            "ema_images": torch.full((20, 1, 8, 8), 0.25),
            "class_names": list("0123456789"),
            "transform": Standardization([0.1], [0.7]),
            **options,
        }
        path = tmp_path / "set.safetensors"
        SyntheticSet(**fields).save(path)
        return str(path)

    return write


def test_file_is_trained_on_and_brings_its_transform(ready, synthetic_file, refused):
    plain, data = ready(), ready(synthetic=synthetic_file())
    images, labels = all_of(data.train_dataloader())
    assert torch.equal(images, torch.full((20, 1, 8, 8), 0.5))
    assert counts(labels) == [2] * 10
    assert data.transform.describe() == Standardization([0.1], [0.7]).describe()
    # The test images go through it too: a network that saw the set would not know them otherwise.
    for part in ("test", "val"):
        pictures = plain.transform.invert(plain.part(part).images)
        assert torch.allclose(data.part(part).images, (pictures - 0.1) / 0.7, atol=1e-5)
    images, _ = all_of(ready(synthetic=synthetic_file(), ema=True).train_dataloader())
    assert torch.equal(images, torch.full((20, 1, 8, 8), 0.25))
    soft = torch.softmax(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), dim=1)
    _, labels = all_of(ready(synthetic=synthetic_file(labels=soft)).train_dataloader())
    assert torch.equal(labels.sort(0).values, soft.sort(0).values)
    with refused("no EMA images"):
        ready(synthetic=synthetic_file(ema_images=None), ema=True).train_dataloader()


def test_whitened_file_is_used_without_another_fit(ready, synthetic_file, monkeypatch):
    white = ready(zca=True)
    path = synthetic_file(transform=white.transform)
    monkeypatch.setattr(Whitening, "fit", lambda *args, **kwargs: pytest.fail("fitted again"))
    # Even where zca is asked for, and with other images held out.
    data = ready(synthetic=path, zca=True, seed=1)
    assert torch.allclose(data.test.images, white.test.images, atol=1e-3)
    assert data.describe()["transform"] == white.describe()["transform"]


def test_set_of_another_data_set_is_refused(ready, synthetic_file, refused, tmp_path):
    for changes in (
        {"images": torch.zeros(20, 3, 8, 8), "ema_images": None, "transform": Standardization([0.1] * 3, [0.7] * 3)},
        {"images": torch.zeros(20, 1, 16, 16), "ema_images": None},
        {"class_names": list("0123456789")[::-1]},
    ):
        path = synthetic_file(**changes)
        with refused(path, "digits"):
            ready(synthetic=path)
    with refused(tmp_path / "nothing"):
        ready(synthetic=str(tmp_path / "nothing"))


def test_a_set_without_class_names_has_those_of_the_data(synthetic_file, refused):
    data = small_data(synthetic=synthetic_file(class_names=[], step_size=0.02))
    assert data.training_set().step_size.dtype == torch.float32
    file = synthetic_file(class_names=[], labels=torch.full((20,), 10))
    with refused(file, "labels run from 10 to 10, classes from 0 to 9"):
        small_data(synthetic=file).setup()


# Modules that ask for batches


class Asking(LightningModule):
    """Learns nothing; keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.validated = [], 0

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AskingForSegments(Asking, LearnsSet):
    def __init__(self, folder):
        super().__init__()
        write_teacher(folder, 0, [torch.zeros(2), torch.ones(2)], {"network": {"name": "tiny"}})
        self.store = TrajectoryStore(folder)

    def train_dataloader(self):
        return SegmentLoader(self.store, expert_epochs=1, max_start_epoch=1, length=3)


class Planning(Asking):
    """Wants the images of the second half of the ranks, in the order of another epoch."""

    def batch_plan(self):
        return BatchPlan(rank=1, world_size=2, epoch=lambda epoch: epoch + 5)


def fit(module, folder, *, max_epochs=1, **options):
    data = DistillationDataModule(**options)
    make_trainer(folder, max_epochs=max_epochs, log_every_n_steps=1, num_sanity_val_steps=2).fit(
        module, datamodule=data
    )
    return module.batches, data


@pytest.mark.filterwarnings("error", "ignore::FutureWarning")  # those are of Lightning's own use of torch
def test_trainer_gives_each_module_its_batches(tmp_path, synthetic_file):
    real, data = fit(module := Asking(), tmp_path)
    assert sum(len(labels) for _, labels in real) == len(data.train.labels)
    assert module.validated == 2  # in the sanity check and after the epoch
    synthetic, _ = fit(Asking(), tmp_path, synthetic=synthetic_file())
    assert sum(len(labels) for _, labels in synthetic) == 20
    segments, _ = fit(module := AskingForSegments(tmp_path / "teachers"), tmp_path)
    assert [(b["iteration"], b["target"].tolist()) for (b,) in segments] == [(i, [1.0, 1.0]) for i in range(3)]
    assert module.validated == 0
    order = BatchOrder(1437, 256, shuffle=True, rank=1, world_size=2)
    for place in ("auto", "no"):  # Lightning tells both loaders their epoch
        planned, data = fit(module := Planning(), tmp_path, max_epochs=2, val_fraction=0.0, on_device=place)
        wanted = []
        for epoch in (5, 6):
            order.set_epoch(epoch)
            wanted += list(order)
        assert torch.equal(torch.cat([labels for _, labels in planned]), data.train.labels[torch.cat(wanted)])
        assert module.validated == 0
        assert module.trainer.limit_val_batches == 1.0


# Descriptions and wrong arguments


def test_descriptions_are_equal_where_the_images_are(ready):
    assert ready(val_fraction=0.2, max_per_class=20, seed=3).describe() == {
        "dataset": {"name": "digits", "val_fraction": 0.2, "max_per_class": 20, "seed": 3},
        "transform": {"kind": "standardization", "mean": [0.3058], "std": [0.3762]},
    }
    description = ready(zca=True).describe()
    assert ready(zca=True, batch_size=7, on_device="no", synthetic="random").describe() == description


def test_wrong_arguments_are_refused(refused):
    for options in ({"val_fraction": 1.0}, {"test_fraction": 0.0}, {"image_size": 0}):
        ((name, value),) = options.items()
        with refused(f"{name}={value}"):
            DistillationDataModule(**options)
    for name, near in (("cifar-10", "cifar10"), ("digit", "digits")):
        with refused(repr(name), repr(near)) as caught:
            DistillationDataModule(dataset=name)
        assert "imagenette" not in str(caught.value)
    with refused("'xyz'", "'cifar10'", "'digits'"):
        DistillationDataModule(dataset="xyz")
    for name in ("own", "own images"):
        with refused("from_datasets", "from_datamodule"):
            DistillationDataModule(dataset=name)
