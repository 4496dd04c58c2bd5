"""Images given as objects: torch datasets, pairs of tensors, and other LightningDataModules."""

import pytest
import torch
import torchvision.transforms as v1
from fits import SMALL, make_trainer
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision.transforms import v2

from ftd_lightning import DistillationDataModule, SyntheticEvaluation
from ftd_lightning.contracts import DataSource
from ftd_lightning.data import in_memory
from ftd_lightning.data.in_memory import read_datasets, write_images_file
from ftd_lightning.files import Standardization
from ftd_lightning.files.safetensors_io import write_tensors
from ftd_lightning.functional.seeding import make_generator

FORMS = ("pillow", "uint8", "float", "numpy")


def pictures(count, *, channels=3, size=6, seed=0):
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=make_generator("own", seed))


def labels(count, classes=3):
    return torch.arange(count) % classes


class Items(Dataset):
    """Items as torchvision's datasets return them, in one of several forms."""

    def __init__(self, images, targets, form="pillow"):
        self.images, self.targets, self.form, self.reads = images, targets, form, 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.reads += 1
        image = self.images[index]
        if self.form in ("pillow", "numpy"):
            array = image.permute(1, 2, 0).numpy()
            image = array if self.form == "numpy" else Image.fromarray(array.squeeze())
        elif self.form == "float":
            image = image.float().div(255)
        return image, int(self.targets[index])


class Wrapped(Dataset):
    """Somebody's own wrapper, with a transform of each image."""

    def __init__(self, dataset, transform=None):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image if self.transform is None else self.transform(image), label


def items(count, form="pillow", **options):
    return Items(pictures(count, **options), labels(count), form)


def own(train, test=None, **options):
    return DistillationDataModule.from_datasets(train, test or (pictures(6, seed=1), labels(6)), **options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_of_the_same_images_is_the_same_data(form, channels):
    test = (pictures(6, channels=channels), labels(6))
    pair = own((pictures(30, channels=channels), labels(30)), test)
    train = items(30, form, channels=channels)
    data = own(train, test)
    assert train.reads == 38  # once but for the first
    assert data.describe() == pair.describe()
    assert torch.equal(data.train.images, pair.train.images)
    assert data.train.labels.dtype == torch.int64
    assert (data.in_channels, data.image_size, data.num_classes) == (channels, 6, 3)
    assert isinstance(data, DataSource)
    if channels == 1:  # without an axis of channels
        whole = own((pictures(30, channels=1)[:, 0], labels(30)), (pictures(6, channels=1)[:, 0], labels(6)))
        assert whole.describe() == own(items(30, form, channels=1), (pictures(6, channels=1), labels(6))).describe()


def test_floats_that_are_no_bytes_stay_floats_and_a_constant_channel_has_deviation_one():
    images = torch.rand(30, 2, 4, 4, generator=make_generator(0))
    images[:, 1] = 0.3
    data = own((images, labels(30)), (images[:6], labels(6)), val_fraction=0.0)
    assert data.spec.std[1] == 1.0
    assert torch.allclose(data.transform.invert(data.train.images), images, atol=1e-6)


def test_contents_and_the_split_identify_the_data():
    options = {"val_fraction": 0.2, "max_per_class": 5, "seed": 3}
    dataset = own((pictures(30), labels(30)), **options).describe()["dataset"]
    assert dataset == {"name": "own images", **options, "fingerprint": dataset["fingerprint"]}
    others = [
        own((pictures(30), labels(30).flip(0)), **options),
        own((pictures(30), labels(30)), (pictures(6, seed=2), labels(6)), **options),
    ]
    assert len({dataset["fingerprint"], *(other.describe()["dataset"]["fingerprint"] for other in others)}) == 3


def test_given_held_out_images_are_the_held_out_part():
    val = (pictures(9, seed=2), labels(9))
    data = own((pictures(30), labels(30)), val=val, val_fraction=0.5)
    assert (len(data.train.labels), len(data.val.labels)) == (30, 9)
    assert torch.equal(data.transform.invert(data.val.images).mul(255).round().byte(), val[0])
    assert data.describe()["dataset"]["val_fraction"] is None
    assert data.describe() != own((pictures(30), labels(30)), val=(pictures(9, seed=5), labels(9))).describe()


def test_class_names_are_those_of_the_dataset_or_given_or_numbers():
    named = items(30)
    named.classes = ["ant", ("bee", "honeybee"), "cow"]
    assert own(named).class_names == ["ant", "bee, honeybee", "cow"]
    assert own(named, class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]
    assert own(items(30)).class_names == ["0", "1", "2"]
    part, _ = random_split(named, [24, 6])
    assert own(ConcatDataset([part, part])).class_names == ["ant", "bee, honeybee", "cow"]
    assert own(ConcatDataset([part, items(30)])).class_names == ["0", "1", "2"]
    assert own(Wrapped(Subset(ConcatDataset([part, Wrapped(part)]), range(30)))).class_names[0] == "ant"
    two = Subset(named, [i for i in range(30) if i % 3 < 2])
    assert own(two, (pictures(6), labels(6, classes=2))).class_names == ["ant", "bee, honeybee"]


def test_random_augmentation_is_noticed():
    class Random(Items):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.rand(()) / 1000, label

    random = Random(pictures(30).float().div(300), labels(30), "tensor")
    for reading in (lambda: own(random), lambda: read(Theirs(random))):
        with pytest.warns(UserWarning, match="differ when they are read twice") as caught:
            reading()
        assert len(caught) == 1


def test_streams_are_read_as_they_come():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(pictures(30), labels(30).tolist(), strict=True))

    assert own(Stream()).describe() == own((pictures(30), labels(30))).describe()


def test_sixteen_bits_are_scaled_by_the_largest_value_of_all_parts():
    def deep(count, high):
        levels = torch.arange(count * 36).remainder(high + 1).to(torch.uint16).reshape(count, 1, 6, 6)
        return Items(levels, labels(count)), (levels, labels(count))

    data = [own(train, test, val_fraction=0.0) for train, test in zip(deep(30, 1000), deep(9, 250), strict=True)]
    train, test = (data[0].spec.load()[part].pictures for part in ("train", "test"))
    assert torch.equal(train.flatten(), torch.arange(30 * 36).remainder(1001) / 1000)
    assert float(test.max()) == 0.25
    assert data[0].describe() == data[1].describe()
    assert data[0].describe()["dataset"]["maximum"] == 1000


def test_images_of_several_sizes_are_resized_or_refused(refused, monkeypatch):
    class Sizes(Items):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.resize((6, 5 + index % 2)), label

    train = Sizes(pictures(30), labels(30))
    with refused("train", "5 x 6", "image_size="):
        own(train)
    said = []
    monkeypatch.setattr(in_memory, "rank_zero_info", said.append)
    data = own(train, image_size=4)
    assert said == ["train: images become 4 x 4 px: 15 of 30 are squashed, aspect ratio changed by up to 1.20"]
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (3, 4, 4)


def test_images_that_are_no_pictures_are_refused(refused):
    for wrong in (*(pictures(30).float().div(255) * scale for scale in (255, -1, float("nan"))), pictures(30).long()):
        with refused("train", "transform="):
            own((wrong, labels(30)))


def test_wrong_labels_are_refused(refused):
    for wrong, words in (
        (labels(30) - 1, "from -1 to 1"),
        (labels(30).float(), "integers"),
        (labels(30) * 2, "class 1"),
        (labels(29), "30 integers"),
        (nn.functional.one_hot(labels(30)), "argmax(1)"),
        (labels(30)[:, None], "squeeze(1)"),
        (["ant", "bee", "cow"] * 10, "integers, not 'ant'"),
        ([None] * 30, "integers, not None"),
    ):
        with refused("train", words):
            own((pictures(30), wrong))
    for label in ("ant", None):
        with refused("train", f"integers, not {label!r}"):
            own([(image, label) for image in pictures(30)])


def test_parts_that_do_not_belong_together_are_refused(refused):
    with refused("test", "labels go from 0 to 3"):
        own((pictures(30), labels(30)), (pictures(8), labels(8, classes=4)))
    with refused("test", "(1, 6, 6)", "convert them"):
        own((pictures(30), labels(30)), (pictures(6, channels=1), labels(6)))
    with refused("train", "no images"):
        own((pictures(0), labels(0)))
    with refused("class 3"):
        own((pictures(30), labels(30)), class_names=list("abcd"))
    with refused("train", "pairs"):
        own(TensorDataset(pictures(30)))
    with refused("train", "argmax(1)"):
        own(TensorDataset(pictures(30), nn.functional.one_hot(labels(30))))
    with refused("root="):
        own((pictures(30), labels(30)), root="data")


def test_an_array_of_all_images_is_read_as_numpy_and_torch_hold_them():
    tensors = pictures(30)
    data = own((tensors.permute(0, 2, 3, 1).numpy(), labels(30)), (tensors[:8].numpy(), labels(8)))
    assert (data.in_channels, data.image_size) == (3, 6)
    assert torch.equal(data.test.images, data.transform.apply(tensors[:8].float() / 255))


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZE = v2.Normalize(MEAN, STD)
COMPOSED = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Compose([NORMALIZE])])


def test_torchvisions_normalize_says_how_images_are_normalised(refused, monkeypatch):
    said = []
    monkeypatch.setattr(in_memory, "rank_zero_info", said.append)
    plain = [items(count, "uint8") for count in (30, 6)]
    train, test = (Wrapped(dataset, COMPOSED) for dataset in plain)
    for transform in (Standardization(MEAN, STD), NORMALIZE, v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])):
        data = own(train, test, transform=transform, val_fraction=0.0)
        assert torch.equal(data.transform.invert(data.train.images).mul(255).round().byte(), plain[0].images)
        said.clear()
    for parts in ((train, test), (Subset(train, range(30)), ConcatDataset([test]))):
        assert own(*parts, val_fraction=0.0).describe() == data.describe()
        assert "Standardization(mean=[0.5, 0.4, 0.3]" in said.pop()
    with refused("zca"):
        own(train, test, zca=True).setup()
    with refused("floats"):
        own(*plain, transform=NORMALIZE)
    with refused("1 channels", "has 3"):
        own((pictures(30, channels=1).float() / 255, labels(30)), transform=NORMALIZE)
    for wrong in (v1.ToTensor(), v2.Compose([NORMALIZE, NORMALIZE]), "imagenet"):
        with refused("transform=", "Normalize"):
            own(train, test, transform=wrong)
    with refused("train: images without their Standardization", "from -0."):
        own(train, test, transform=v2.Normalize(MEAN, [0.4] * 3))
    with refused("train", "transform=Normalize"):  # the parts disagree
        own(train, Wrapped(items(6, "float"), v2.Normalize(MEAN, [0.3] * 3)))


# One file


@pytest.mark.parametrize("val", [False, True])
def test_a_data_set_in_a_file_is_read_as_it_was_given(tmp_path, val):
    train, test, held_out = ((pictures(n, size=8, seed=n), labels(n, classes=2)) for n in (8, 4, 6))
    held_out = held_out if val else None
    write_images_file(read_datasets(train, test, held_out, class_names=["cat", "dog"]), tmp_path)
    for size in (None, 4):
        options = {"val_fraction": 0.25, "image_size": size}
        theirs = DistillationDataModule("images", root=str(tmp_path), **options)
        ours = own(train, test, val=held_out, class_names=["cat", "dog"], **options)
        assert theirs.class_names == ours.class_names == ["cat", "dog"]
        for part in ("train", "val", "test"):
            given, found = (data.transform.invert(data.part(part).images) for data in (ours, theirs))
            assert found.shape[1:] == (3, size or 8, size or 8)
            assert torch.allclose(given, found, atol=1e-5)
            assert torch.equal(theirs.part(part).labels, ours.part(part).labels)
        assert len(theirs.val.labels) == (6 if val else 2)
        if size is None:
            described = [data.describe() for data in (theirs, ours)]
            assert [one["dataset"].pop("name") for one in described] == ["images", "own images"]
            assert described[0] == described[1]


def test_the_maximum_of_sixteen_bits_is_kept_in_the_file(tmp_path):
    train, test = (((pictures(n).int() * 16).to(torch.uint16), labels(n)) for n in (9, 6))
    dataset = read_datasets(train, test)
    write_images_file(dataset, tmp_path)
    found = DistillationDataModule("images", root=str(tmp_path)).spec
    assert found.fingerprint() == dataset.fingerprint()
    assert found.fingerprint()["maximum"] == max(int(part[0].int().max()) for part in (train, test))


def test_other_files_are_refused(tmp_path, refused):
    data, path = DistillationDataModule("images", root=str(tmp_path)), tmp_path / "images.safetensors"
    with refused("images.safetensors: no such file"):
        data.setup()
    tensors, names = {"train_images": pictures(9), "train_labels": labels(9)}, ["a", "b", "c"]
    for more, class_names, words in (
        ({}, names, "has no tensor 'test_images'"),
        ({}, "cat", "class_names is 'cat', a list of names is needed"),
        ({"test_images": pictures(9).int(), "test_labels": labels(9)}, names, "torch.int32"),
    ):
        write_tensors(path, tensors | more, kind="images", metadata={"class_names": class_names})
        with refused(path, words):
            data.setup()


# Another LightningDataModule


class Theirs(LightningDataModule):
    """Shuffled training batches without the last one; records which hooks are called."""

    def __init__(self, train=None, val=None, test=None, **options):
        super().__init__()
        self.parts = {"train": train or items(31, "uint8"), "val": val, "test": test or items(6, "uint8", seed=1)}
        self.options, self.calls = {"batch_size": 4, "shuffle": True, "drop_last": True, **options}, []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)

    def train_dataloader(self):
        return DataLoader(self.parts["train"], **self.options)

    def val_dataloader(self):
        return [] if self.parts["val"] is None else DataLoader(self.parts["val"], batch_size=4)

    def test_dataloader(self):
        return DataLoader(self.parts["test"], batch_size=4)


def read(theirs, **options):
    data = DistillationDataModule.from_datamodule(theirs, **options)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def test_all_images_of_a_datamodule_are_read_in_order():
    theirs = Theirs()
    data = read(theirs)
    same = own((pictures(31), labels(31)), val_fraction=0.0)
    assert data.describe() == same.describe()
    assert torch.equal(data.train.images, same.train.images)
    assert (len(data.val.labels), data.description().batch_size) == (0, 4)
    assert theirs.calls == ["prepare_data", "fit", "test"]
    reads = theirs.parts["train"].reads
    data.setup("fit")
    assert theirs.parts["train"].reads == reads
    held_out = read(Theirs(val=items(9, "uint8", seed=2)))
    assert held_out.val.labels.tolist() == labels(9).tolist()
    assert "held_out" in held_out.describe()["dataset"]


def test_a_sampler_does_not_decide_what_is_read(monkeypatch):
    said = []
    monkeypatch.setattr(in_memory, "rank_zero_info", said.append)
    sampler = WeightedRandomSampler([1.0] + [1e-3] * 30, 31)
    for options in ({"sampler": sampler}, {"batch_sampler": BatchSampler(sampler, 4, True)}):
        theirs = Theirs()
        theirs.options = options
        assert read(theirs).describe()["dataset"] == read(Theirs()).describe()["dataset"]
        assert said.pop() == "train: all 31 images of the dataset are read once, whatever their weights"


def test_datamodules_without_what_is_needed_are_refused(tmp_path, refused):
    class NoTest(LightningDataModule):
        train_dataloader = Theirs.train_dataloader
        parts, options = {"train": items(30, "uint8")}, {}

    class Two(Theirs):
        def train_dataloader(self):
            return [super().train_dataloader(), super().train_dataloader()]

    without, evaluation = read(NoTest(), image_size=4), SyntheticEvaluation(network_options=SMALL, networks=1)
    with refused("test_dataloader"):
        make_trainer(tmp_path, max_epochs=1).fit(evaluation, datamodule=without)
    assert evaluation.trained_epochs == 0
    with refused("LightningDataModule has no train_dataloader"):
        read(LightningDataModule())
    with refused("Two.train_dataloader", "2 loaders", "loaders={'train': 0}"):
        read(Two())
    with refused("choose one of [0, 1]"):
        read(Two(), loaders={"train": 2})
    assert read(Two(), loaders={"train": 1}).describe() == read(Theirs()).describe()


def test_other_forms_of_batches_are_read_by_a_function(refused):
    for keys, function in (("abc", "lambda b: (b['b'], b['c'])"), ((0, 1, 2), "lambda b: (b[1], b[2])")):
        given = (items(31, "uint8"), items(6, "uint8", seed=1))
        train, test = ([dict(zip(keys, ("a", *data[i]), strict=True)) for i in range(len(data))] for data in given)
        theirs = Theirs(train, test=test)
        with refused("train", f"batch={function}"):
            read(theirs)
        with refused("train", f"batch={function}"):
            own(train, test)
        for same in (read(theirs, batch=eval(function)), own(train, test, batch=eval(function), val_fraction=0.0)):
            assert same.describe() == read(Theirs()).describe()
    with refused("train", "not Tensor", "batch="):
        read(Theirs(list(pictures(30))))
    with refused("batch= must return a pair"):
        read(Theirs(), batch=lambda b: b[0])
