"""A data set in one file."""

import pytest
import torch

from ftd_lightning import DistillationDataModule
from ftd_lightning.data.in_memory import read_datasets, write_images_file
from ftd_lightning.files.safetensors_io import write_tensors


def pairs(seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (12, channels, 8, 8), dtype=torch.uint8, generator=generator)
    return (images[:8], torch.arange(8) % 2), (images[8:], torch.arange(4) % 2)


@pytest.mark.parametrize("val", [False, True])
def test_it_is_read_as_it_was_given(tmp_path, val):
    train, test = pairs()
    held_out = pairs(1)[1] if val else None
    names = ["cat", "dog"]
    write_images_file(read_datasets(train, test, held_out, class_names=names), tmp_path)
    theirs = DistillationDataModule("images", root=str(tmp_path), val_fraction=0.25)
    ours = DistillationDataModule.from_datasets(train, test, val=held_out, class_names=names, val_fraction=0.25)
    for data in (theirs, ours):
        data.setup()
    assert theirs.class_names == ours.class_names == ["cat", "dog"]
    for part in ("train", "val", "test"):
        assert torch.equal(theirs.part(part).images, ours.part(part).images)
        assert torch.equal(theirs.part(part).labels, ours.part(part).labels)
    described = [data.describe() for data in (theirs, ours)]
    names = [description["dataset"].pop("name") for description in described]
    assert names == ["images", "own images"]
    assert described[0] == described[1]
    assert len(theirs.part("val").labels) == (4 if val else 2)


def test_pictures_are_resized_in_every_part(tmp_path):
    train, test = pairs()
    held_out = pairs(1)[1]
    write_images_file(read_datasets(train, test, held_out), tmp_path)
    theirs = DistillationDataModule("images", root=str(tmp_path), image_size=4)
    ours = DistillationDataModule.from_datasets(train, test, val=held_out, image_size=4)
    for part in ("train", "val", "test"):
        assert theirs.part(part).images.shape[1:] == (3, 4, 4)
    assert torch.allclose(theirs.transform.invert(theirs.val.images), ours.transform.invert(ours.val.images), atol=1e-5)


def test_the_maximum_of_sixteen_bits_is_kept(tmp_path):
    train, test = (((images.int() * 16).to(torch.uint16), labels) for images, labels in pairs())
    dataset = read_datasets(train, test)
    write_images_file(dataset, tmp_path)
    found = DistillationDataModule("images", root=str(tmp_path)).spec
    assert found.identify() == dataset.identify()
    assert found.identify()["maximum"] == max(int(part[0].int().max()) for part in (train, test))


def test_other_files_are_refused(tmp_path, refused):
    data = DistillationDataModule("images", root=str(tmp_path))
    with refused("images.safetensors: no such file"):
        data.setup()
    path = tmp_path / "images.safetensors"
    (images, labels), _ = pairs()
    tensors = {"train_images": images, "train_labels": labels}
    write_tensors(path, tensors, kind="images", metadata={"class_names": ["cat", "dog"]})
    with refused(path, "holds no test_images and test_labels"):
        data.setup()
    write_tensors(path, tensors, kind="images", metadata={"class_names": "cat"})
    with refused(path, "class_names are not a list"):
        data.setup()
    tensors |= {"test_images": images.int(), "test_labels": labels}
    write_tensors(path, tensors, kind="images", metadata={"class_names": ["cat", "dog"]})
    with refused(f"{path}: test", "torch.int32"):
        data.setup()
    path.write_bytes(path.read_bytes()[:-10])
    with refused(path, "truncated"):
        data.setup()
