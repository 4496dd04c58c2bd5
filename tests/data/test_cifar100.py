"""CIFAR-100 by a small set in its pickle format: the original is not among the shared images."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from ftd_lightning.data import DistillationDataModule, get_dataset
from ftd_lightning.data.sources import CIFAR100_CLASSES


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Write 200 training and 100 test images as the original does; give the folder and what is in the files."""
    folder, numbers, written = tmp_path / "cifar-100-python", np.random.default_rng(0), {}
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        written[name] = content
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def part(name, each):
        fine = numbers.permutation(np.repeat(np.arange(100), each)).tolist()
        content = {
            "filenames": [f"{i}.png" for i in range(len(fine))],
            "batch_label": f"{name} batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [label % 20 for label in fine],
            "data": numbers.integers(0, 256, (len(fine), 3072), dtype=np.uint8),
        }
        return [[name, write(name, content)]]

    monkeypatch.setattr(CIFAR100, "train_list", part("train", 2))
    monkeypatch.setattr(CIFAR100, "test_list", part("test", 1))
    names = {"fine_label_names": list(CIFAR100_CLASSES), "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": write("meta", names)})
    return tmp_path, written


@pytest.fixture
def data(cifar100):
    module = DistillationDataModule(dataset="cifar100", root=str(cifar100[0]), download=False, val_fraction=0.0)
    module.prepare_data()
    module.setup()
    return module


def test_pixels_and_fine_labels_are_those_of_the_files(data, cifar100):
    for images, name in ((data.train, "train"), (data.test, "test")):
        content = cifar100[1][name]
        pictures = data.transform.invert(images.images).mul(255).round().to(torch.uint8)
        assert torch.equal(pictures, torch.from_numpy(content["data"]).view(-1, 3, 32, 32))
        assert images.labels.tolist() == content["fine_labels"]


def test_description(data):
    assert (data.num_classes, data.in_channels, data.image_size) == (100, 3, 32)
    assert (get_dataset("cifar100").mean, get_dataset("cifar100").std) == (
        get_dataset("cifar10").mean,
        get_dataset("cifar10").std,
    )
    names = data.class_names
    assert names == sorted(set(names)), "the original order is alphabetical"
    assert (len(names), names[0], names[44], names[99]) == (100, "apple", "lizard", "worm")
    assert data.describe()["dataset"] == {"name": "cifar100", "val_fraction": 0.0, "max_per_class": None, "seed": 0}


def test_absent_or_broken_files_are_refused(cifar100, refused):
    root, _ = cifar100
    (root / "cifar-100-python" / "train").write_bytes(b"")
    with refused("CIFAR-100", root, "cifar-100-python", "data.download"):
        DistillationDataModule(dataset="cifar100", root=str(root), download=False).prepare_data()


def test_resizing_changes_the_images_and_the_description(cifar100, data):
    small = DistillationDataModule(
        dataset="cifar100", root=str(cifar100[0]), download=False, val_fraction=0.0, image_size=16
    )
    small.setup()
    assert small.train.images.shape == (200, 3, 16, 16)
    assert small.image_size == 16
    assert small.describe()["dataset"]["image_size"] == 16
    # Antialiased: noise halved in size is averaged, not picked.
    assert small.train.images.std() < 0.7 * data.train.images.std()
    same = DistillationDataModule(
        dataset="cifar100", root=str(cifar100[0]), download=False, val_fraction=0.0, image_size=32
    )
    same.setup()
    assert torch.equal(same.train.images, data.train.images)
    assert same.describe() == data.describe()
