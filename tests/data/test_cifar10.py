import pickle
import shutil

import pytest
import torch

from ftd_lightning.data import DistillationDataModule, get_dataset


@pytest.fixture(scope="module")
def data(cifar_root):
    module = DistillationDataModule(dataset="cifar10", root=str(cifar_root), download=False, val_fraction=0.0)
    module.prepare_data()
    module.setup()
    return module


def test_all_images_are_there_in_the_shape_that_networks_expect(data):
    assert data.train.images.shape == (50_000, 3, 32, 32)
    assert data.test.images.shape == (10_000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    for part in (data.train, data.test):
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64


def test_images_are_standardised_channel_by_channel(data, cifar_root):
    # The first image of the first file: red, green and blue planes one after the other.
    with (cifar_root / "cifar-10-batches-py" / "data_batch_1").open("rb") as file:
        batch = pickle.load(file, encoding="latin1")
    picture = torch.from_numpy(batch["data"][0]).view(3, 32, 32).double() / 255
    mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010], dtype=torch.float64).view(3, 1, 1)
    assert torch.allclose(data.train.images[0].double(), (picture - mean) / std, atol=1e-5)
    assert data.train.labels[0] == batch["labels"][0]


def test_class_names_are_those_of_the_data_set(data, cifar_root):
    with (cifar_root / "cifar-10-batches-py" / "batches.meta").open("rb") as file:
        assert pickle.load(file, encoding="latin1")["label_names"] == data.class_names


def test_constants_are_those_of_the_training_images(data):
    # The deviation that this line of work goes by is the mean over images of each image's own,
    # not that of all pixels (0.2470 0.2435 0.2616).
    mean, std = torch.zeros(3), torch.zeros(3)
    for chunk in data.train.images.split(5000):
        pictures = data.transform.invert(chunk)
        mean += pictures.mean((2, 3)).sum(0) / 50_000
        std += pictures.flatten(2).std(2).sum(0) / 50_000
    spec = get_dataset("cifar10")
    assert torch.allclose(mean, torch.tensor(spec.mean), atol=5e-4)
    assert torch.allclose(std, torch.tensor(spec.std), atol=5e-4)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_truncated_file_is_refused(cifar_root, tmp_path, refused, name):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (cifar_root / "cifar-10-batches-py").iterdir():
        if file.name == name:
            shutil.copyfile(file, folder / name)
        else:
            (folder / file.name).symlink_to(file)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with refused("CIFAR-10", "broken", tmp_path):
        DistillationDataModule(dataset="cifar10", root=str(tmp_path), download=False).prepare_data()
