import os

import pytest
import torch
from safetensors.torch import save_file

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.files import Standardization, TrajectoryStore, Whitening, write_teacher
from ftd_lightning.files.safetensors_io import TensorFile
from ftd_lightning.files.trajectory_store import read_store_data, store_data_file, write_store_data

SHAPE = ImageShape(in_channels=1, num_classes=2, image_size=4)
DATASET = {"name": "toy", "seed": 0, "fingerprint": "ab"}
STANDARD = Standardization([0.4], [0.25])


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["standardization", "zca"])
def described(request, pictures):
    transform = STANDARD if request.param == "standardization" else Whitening.fit(pictures)
    return DataDescription(SHAPE, ["ant", "Käfer"], transform, DATASET, batch_size=16)


def record(folder, **metadata):
    for teacher in range(2):
        weights = [torch.full((3,), float(epoch + teacher)) for epoch in range(3)]
        write_teacher(folder, teacher, weights, {"network": {"name": "tiny"}, "dataset": DATASET, **metadata})
    return folder


def test_store_keeps_what_its_teachers_were_trained_on(tmp_path, described, pictures):
    record(tmp_path, transform=described.transform.describe())
    write_store_data(str(tmp_path), described)
    store = TrajectoryStore(tmp_path)
    assert len(store) == 2  # the file is no teacher
    assert store.shape == SHAPE
    assert store.class_names == ["ant", "Käfer"]
    assert store.transform.describe() == described.transform.describe()
    images = described.transform.apply(pictures)
    assert torch.allclose(store.transform.apply(pictures), images, atol=1e-4)
    assert torch.equal(store.transform.invert(images), described.transform.invert(images))
    assert store.data.metadata() == described.metadata()


def test_description_is_written_once(tmp_path, described):
    write_store_data(tmp_path, described)
    before = store_data_file(tmp_path).stat()
    write_store_data(tmp_path, described)
    after = store_data_file(tmp_path).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["data.safetensors"]


def test_description_of_other_data_is_replaced(tmp_path, described):
    # A store that was emptied and recorded anew.
    write_store_data(tmp_path, described)
    write_store_data(tmp_path, DataDescription(SHAPE, ["bee", "fly"], STANDARD, {**DATASET, "fingerprint": "cd"}))
    assert read_store_data(tmp_path).class_names == ["bee", "fly"]


def test_description_is_read_only_when_it_is_asked_for(tmp_path, described, monkeypatch):
    write_store_data(record(tmp_path, transform=described.transform.describe()), described)
    store, read = TrajectoryStore(tmp_path), []
    original = TensorFile.__init__
    monkeypatch.setattr(
        TensorFile, "__init__", lambda file, path, **more: read.append(path) or original(file, path, **more)
    )
    store.segment(0, 0, 1)
    assert store_data_file(tmp_path) not in read
    assert store.transform is store.transform
    assert read.count(store_data_file(tmp_path)) == 1


def test_description_with_another_transform_than_the_teachers_is_refused(tmp_path, described, refused):
    record(tmp_path, transform={"kind": "zca", "eps": 0.1, "fitted_on": "somewhere else"})
    write_store_data(tmp_path, described)
    with refused(store_data_file(tmp_path), "transform", "delete this file"):
        _ = TrajectoryStore(tmp_path).transform


def test_broken_or_foreign_description_is_refused(tmp_path, described, refused):
    write_store_data(record(tmp_path, transform=described.transform.describe()), described)
    path = store_data_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    if described.transform.tensors():
        with refused(path):
            _ = TrajectoryStore(tmp_path).class_names
    save_file({"mean": torch.zeros(1)}, path)
    with refused(path, "another program"):
        _ = TrajectoryStore(tmp_path).shape


def test_standardization_of_a_store_without_description_is_rebuilt(tmp_path, pictures):
    store = TrajectoryStore(record(tmp_path, transform=STANDARD.describe()))
    assert torch.equal(store.transform.apply(pictures), STANDARD.apply(pictures))
    assert store.class_names is None
    assert store.shape is None  # "tiny" does not tell


@pytest.mark.parametrize("transform", [{"kind": "zca", "eps": 0.1, "fitted_on": "ab"}, None])
def test_other_transforms_of_a_store_without_description_are_not_known(tmp_path, transform):
    assert TrajectoryStore(record(tmp_path, transform=transform)).transform is None


def test_shape_of_a_store_without_description_is_that_of_its_named_network(tmp_path):
    network = {"name": "convnet", "options": {}, **SHAPE._asdict()}
    assert TrajectoryStore(record(tmp_path, network=network)).shape == SHAPE
