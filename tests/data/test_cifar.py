"""CIFAR-10 by the real images, where they are; CIFAR-100 by a small set in its pickle format."""

import hashlib
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torchvision.datasets import CIFAR100

from ftd_lightning.data import DistillationDataModule, get_dataset
from ftd_lightning.data.datasets import CIFAR100_CLASSES


def ready(name, root, **options):
    data = DistillationDataModule(name, root=str(root), **{"download": False, "val_fraction": 0.0, **options})
    data.prepare_data()
    data.setup()
    return data


def test_cifar10_is_all_there_and_standardised_by_its_constants(cifar_root):
    data = ready("cifar10", cifar_root)
    assert (data.train.images.shape, data.test.images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    folder = cifar_root / "cifar-10-batches-py"
    batch = pickle.loads((folder / "data_batch_1").read_bytes(), encoding="latin1")
    assert pickle.loads((folder / "batches.meta").read_bytes(), encoding="latin1")["label_names"] == data.class_names
    # The first image of the first file: red, green and blue planes one after the other.
    picture = torch.from_numpy(batch["data"][0]).view(3, 32, 32).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (data.spec.mean, data.spec.std))
    assert torch.allclose(data.train.images[0].double(), (picture - mean) / std, atol=1e-5)
    assert data.train.labels[0] == batch["labels"][0]
    # The deviation that this line of work goes by is the mean over images of each image's own.
    pictures = data.transform.invert(data.train.images[::10])
    assert torch.allclose(pictures.mean((0, 2, 3)), mean.flatten().float(), atol=5e-3)
    assert torch.allclose(pictures.flatten(2).std(2).mean(0), std.flatten().float(), atol=5e-3)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Write 200 training and 100 test images as the original does; give the folder and the files' contents."""
    folder, numbers, written = tmp_path / "cifar-100-python", np.random.default_rng(0), {}
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        written[name] = content
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def part(name, each):
        fine = numbers.permutation(np.repeat(np.arange(100), each)).tolist()
        data = numbers.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        return [[name, write(name, {"fine_labels": fine, "coarse_labels": [of % 20 for of in fine], "data": data})]]

    monkeypatch.setattr(CIFAR100, "train_list", part("train", 2))
    monkeypatch.setattr(CIFAR100, "test_list", part("test", 1))
    names = {"fine_label_names": list(CIFAR100_CLASSES), "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": write("meta", names)})
    return tmp_path, written


def test_cifar100_has_the_pixels_and_fine_labels_of_its_files(cifar100):
    root, written = cifar100
    data = ready("cifar100", root)
    for name in ("train", "test"):
        pictures = data.transform.invert(data.part(name).images).mul(255).round().to(torch.uint8)
        assert torch.equal(pictures, torch.from_numpy(written[name]["data"]).view(-1, 3, 32, 32))
        assert data.part(name).labels.tolist() == written[name]["fine_labels"]
    assert (data.num_classes, data.in_channels, data.image_size) == (100, 3, 32)
    assert (data.spec.mean, data.spec.std) == (get_dataset("cifar10").mean, get_dataset("cifar10").std)
    assert data.class_names == sorted(set(data.class_names)), "the original order is alphabetical"
    assert data.describe()["dataset"] == {"name": "cifar100", "val_fraction": 0.0, "max_per_class": None, "seed": 0}
    small, same = (ready("cifar100", root, image_size=size) for size in (16, 32))
    assert small.train.images.shape == (200, 3, 16, 16)
    assert small.describe()["dataset"]["image_size"] == small.image_size == 16
    assert small.train.images.std() < 0.7 * data.train.images.std()  # antialiased: averaged, not picked
    assert torch.equal(same.train.images, data.train.images)
    assert same.describe() == data.describe()


def test_absent_or_broken_files_are_refused(cifar100, tmp_path, refused, monkeypatch):
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")
    with refused("CIFAR-100", tmp_path, "cifar-100-python", "data.download"):
        ready("cifar100", tmp_path)
    with refused("CIFAR-10", tmp_path / "nowhere", "data.download"):
        DistillationDataModule("cifar10", root=str(tmp_path / "nowhere"), download=False).setup()

    def no_network(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with refused("CIFAR-10", "no route to host", "network", tmp_path):
        ready("cifar10", tmp_path, download=True)
