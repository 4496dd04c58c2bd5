import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from ftd_lightning.files import Standardization, SyntheticSet, Whitening
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors

METADATA = {
    "dataset": {"name": "toy", "val_fraction": 0.1},
    "network": {"name": "convnet", "width": 8},
    "augment": "color,crop",
    "scores": {"raw": {"mean": 0.25, "std": None}},
    "versions": {"torch": "2"},
}


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 2, 4, 4, generator=generator)


@pytest.fixture
def whitening():
    # Neighbouring pixels alike, as in photographs; white noise would make whitening nearly a no-op.
    generator = torch.Generator().manual_seed(1)
    smooth = torch.rand(300, 2, 4, 4, generator=generator).cumsum(-1).cumsum(-2)
    return Whitening.fit(smooth / smooth.max())


@pytest.fixture
def full(pictures):
    """A set with every field filled."""
    transform = Standardization([0.5, 0.4], [0.25, 0.2])
    return SyntheticSet(
        images=transform.apply(pictures),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
        step_size=torch.tensor(0.0123),
        ema_images=transform.apply(pictures.flip(0)),
        class_names=["ant", "bee", "Käfer"],
        transform=transform,
        metadata=METADATA,
    )


def there_and_back(synthetic, path):
    synthetic.save(path)
    return SyntheticSet.load(path)


def test_every_field_comes_back(full, tmp_path):
    back = there_and_back(full, tmp_path / "deep" / "set.safetensors")
    for name in ("images", "labels", "step_size", "ema_images"):
        assert torch.equal(getattr(back, name), getattr(full, name))
        assert getattr(back, name).dtype == getattr(full, name).dtype
    assert back.step_size.shape == ()
    assert back.class_names == full.class_names
    assert back.metadata == METADATA
    assert back.transform.describe() == full.transform.describe()


def test_metadata_is_read_without_any_tensor(full, whitening, tmp_path, monkeypatch, refused):
    full.transform = whitening
    full.save(tmp_path / "set.safetensors")
    monkeypatch.setattr(TensorFile, "__getitem__", lambda file, name: pytest.fail(f"read {name}"))
    assert SyntheticSet.read_metadata(tmp_path / "set.safetensors") == METADATA
    write_tensors(tmp_path / "other", {}, kind="whitening", metadata={})
    with refused(tmp_path / "other", "synthetic set"):
        SyntheticSet.read_metadata(tmp_path / "other")


def test_fields_that_are_not_there_come_back_as_none(pictures, tmp_path):
    back = there_and_back(SyntheticSet(pictures, torch.arange(6)), str(tmp_path / "set.safetensors"))
    assert back.step_size is None
    assert back.ema_images is None
    assert back.class_names == []
    assert back.metadata == {}
    # Without a transform, images are pictures.
    assert torch.equal(back.pictures(), pictures)


def test_a_step_size_may_be_a_number(pictures, tmp_path):
    SyntheticSet(pictures, torch.arange(6), step_size=0.02).save(tmp_path / "set")
    assert SyntheticSet.load(tmp_path / "set").learning_rate == pytest.approx(0.02)


def test_soft_labels_come_back(pictures, tmp_path):
    soft = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    back = there_and_back(SyntheticSet(pictures, soft), tmp_path / "set.safetensors")
    assert back.labels.dtype == torch.float32
    assert torch.equal(back.labels, soft)


def test_images_being_learned_are_saved(full, tmp_path):
    full.images = full.images.requires_grad_()
    full.step_size = torch.nn.Parameter(full.step_size)
    back = there_and_back(full, tmp_path / "set.safetensors")
    assert torch.equal(back.images, full.images.detach())
    assert not back.images.requires_grad


def test_images_and_their_average_may_be_one_tensor(pictures, tmp_path):
    # As they are before the first update.
    back = there_and_back(SyntheticSet(pictures, torch.arange(6), ema_images=pictures), tmp_path / "set.safetensors")
    assert torch.equal(back.images, pictures)
    assert torch.equal(back.ema_images, pictures)


def test_standardised_pictures_are_restored_after_loading(full, pictures, tmp_path):
    back = there_and_back(full, tmp_path / "set.safetensors")
    assert torch.allclose(back.pictures(), pictures, atol=1e-6)
    assert torch.allclose(back.pictures(ema=True), pictures.flip(0), atol=1e-6)
    assert torch.allclose(back.transform.apply(pictures), full.images, atol=1e-6)


def test_whitened_pictures_are_restored_after_loading(full, pictures, whitening, tmp_path):
    full.transform = whitening
    full.images, full.ema_images = whitening.apply(pictures), whitening.apply(pictures.flip(0))
    assert (full.images - pictures).abs().max() > 0.5  # whitening did something
    back = there_and_back(full, tmp_path / "set.safetensors")
    assert (back.pictures() - pictures).abs().max() < 1e-4
    assert (back.pictures(ema=True) - pictures.flip(0)).abs().max() < 1e-4
    # New pictures, a test set for instance, go the same way as they would have before.
    others = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(back.transform.apply(others), whitening.apply(others), atol=1e-4)
    assert back.transform.describe() == whitening.describe()


def test_saving_what_was_loaded_gives_the_same_bytes(full, whitening, tmp_path):
    for transform in (full.transform, whitening):
        full.transform = transform
        there_and_back(full, tmp_path / "first").save(tmp_path / "second")
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_pictures_lie_in_the_unit_range(full):
    full.images = full.images * 10
    assert full.pictures().min() == 0
    assert full.pictures().max() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["images", "ema_images", "step_size"])
def test_values_that_are_not_finite_are_refused_and_the_old_file_stays(full, refused, tmp_path, name, value):
    path = tmp_path / "set.safetensors"
    full.save(path)
    before = path.read_bytes()
    bad = getattr(full, name).clone()
    bad.view(-1)[-1] = value
    setattr(full, name, bad)
    with refused(path, name):
        full.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    # Nor is a new file begun.
    with refused(tmp_path / "new", name):
        full.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_file_is_refused(refused, tmp_path):
    with refused(tmp_path / "set.safetensors"):
        SyntheticSet.load(tmp_path / "set.safetensors")


def test_truncated_file_is_refused_wherever_it_was_cut(full, refused, tmp_path):
    path = tmp_path / "set.safetensors"
    full.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with refused(path):
            SyntheticSet.load(path)


def test_foreign_file_is_refused(full, refused, tmp_path):
    path = tmp_path / "set.safetensors"
    save_file({"images": full.images, "labels": full.labels}, path)
    with refused(path, "another program"):
        SyntheticSet.load(path)
    write_tensors(path, {"epoch_0000": torch.zeros(3)}, kind="teacher_trajectory", metadata={})
    with refused(path, "teacher trajectory"):
        SyntheticSet.load(path)
    torch.save({"images": full.images}, path)
    with refused(path):
        SyntheticSet.load(path)


def test_transform_of_a_later_version_is_refused(full, refused, tmp_path):
    class Later(Standardization):
        def describe(self):
            return {"kind": "fourier"}

    full.transform = Later([0.5, 0.5], [1.0, 1.0])
    full.save(tmp_path / "set.safetensors")
    with refused("fourier"):
        SyntheticSet.load(tmp_path / "set.safetensors")


def test_file_is_plain_safetensors(full, whitening, tmp_path):
    full.transform = whitening
    path = tmp_path / "set.safetensors"
    full.save(path)
    tensors = load_file(path)
    assert torch.equal(tensors["images"], full.images)
    assert torch.equal(tensors["labels"], full.labels)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ftd_lightning"])
    assert header["class_names"] == full.class_names
    assert header["network"] == METADATA["network"]


@pytest.mark.slow
def test_loading_unpickles_nothing(full, tmp_path):
    full.save(tmp_path / "set.safetensors")
    program = (
        "import pickle, sys, torch\n"
        "from ftd_lightning.data import SyntheticSet\n"
        "def refuse(*args, **kwargs): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse\n"
        "print(tuple(SyntheticSet.load(sys.argv[1]).images.shape))\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "set.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(6, 2, 4, 4)", done.stderr


def test_dataset_works_in_an_ordinary_dataloader(full):
    for ema, images in ((False, full.images), (True, full.ema_images)):
        batches = list(DataLoader(full.dataset(ema=ema), batch_size=4))
        assert [len(labels) for _, labels in batches] == [4, 2]
        assert torch.equal(torch.cat([b for b, _ in batches]), images)
        assert torch.equal(torch.cat([labels for _, labels in batches]), full.labels)


def test_averaged_images_are_given_only_where_there_are_any(full, refused):
    assert full.chosen(ema=False) is full.images
    assert full.chosen(ema=True) is full.ema_images
    full.ema_images = None
    for use in (full.chosen, full.dataset, full.pictures):
        with refused("no EMA images"):
            use(ema=True)
    assert full.chosen(ema=False) is full.images
