from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
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
    return torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def whitening():
    # Neighbouring pixels alike, as in photographs; white noise would make whitening nearly a no-op.
    smooth = torch.rand(300, 2, 4, 4, generator=torch.Generator().manual_seed(1)).cumsum(-1).cumsum(-2)
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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.safetensors"


def there_and_back(synthetic, path):
    synthetic.save(path)
    return SyntheticSet.load(path)


def test_every_field_comes_back_from_plain_safetensors(full, path, whitening):
    full.step_size = torch.nn.Parameter(full.step_size)
    back = there_and_back(full, path.parent / "deep" / "set.safetensors")
    for name in ("images", "labels", "step_size", "ema_images"):
        assert torch.equal(getattr(back, name), getattr(full, name))
        assert getattr(back, name).dtype == getattr(full, name).dtype
        assert not getattr(back, name).requires_grad
    assert (back.class_names, back.metadata) == (full.class_names, METADATA)
    assert back.transform.describe() == full.transform.describe()
    assert torch.equal(load_file(path.parent / "deep" / "set.safetensors")["images"], full.images)
    for transform in (full.transform, whitening):
        full.transform = transform
        first = there_and_back(full, path)
        content = path.read_bytes()
        first.save(path)
        assert path.read_bytes() == content


def test_metadata_is_read_without_any_tensor(full, path, monkeypatch, refused):
    full.save(path)
    monkeypatch.setattr(TensorFile, "read", lambda file, name, **options: pytest.fail(f"read {name}"))
    assert SyntheticSet.read_metadata(path) == METADATA
    write_tensors(path, {}, kind="whitening", metadata={})
    with refused(path, "synthetic set"):
        SyntheticSet.read_metadata(path)


def test_fields_that_are_not_there_come_back_as_none(pictures, path):
    back = there_and_back(SyntheticSet(pictures, torch.arange(6)), str(path))
    assert (back.step_size, back.ema_images, back.class_names, back.metadata) == (None, None, [], {})
    assert torch.equal(back.pictures(), pictures)  # without a transform, images are pictures


def test_other_labels_step_sizes_and_an_average_that_has_not_begun(pictures, path):
    soft = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    back = there_and_back(SyntheticSet(pictures, soft, step_size=0.02, ema_images=pictures), path)
    assert torch.equal(back.labels, soft)
    assert torch.equal(back.ema_images, pictures)
    assert back.learning_rate == pytest.approx(0.02)
    targets = SyntheticSet(pictures.double(), soft * 9, torch.tensor([0.1, 0.3]), metadata={"label_kind": "target"})
    back = there_and_back(targets, path)
    assert torch.equal(back.labels, soft * 9)
    assert back.images.dtype == torch.float32
    assert back.learning_rate == pytest.approx(0.2)
    assert torch.allclose(back.training_labels().sum(1), torch.ones(6))


def test_pictures_are_restored_after_loading(full, pictures, whitening, path):
    for transform in (full.transform, whitening):
        full.transform = transform
        full.images, full.ema_images = transform.apply(pictures), transform.apply(pictures.flip(0))
        assert (full.images - pictures).abs().max() > 0.5
        back = there_and_back(full, path)
        assert (back.pictures() - pictures).abs().max() < 1e-4
        assert (back.pictures(ema=True) - pictures.flip(0)).abs().max() < 1e-4
        # New pictures, a test set for instance, go the same way as they would have before.
        others = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(back.transform.apply(others), transform.apply(others), atol=1e-4)
    full.images = full.images * 10
    assert (full.pictures().min(), full.pictures().max()) == (0, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", torch.zeros(6, 2, 4)),
        ("labels", torch.tensor([0, 0, 1, 1, 2, 3])),
        ("labels", torch.arange(5) % 3),
        ("labels", torch.full((6, 3), 0.5)),
        ("step_size", torch.tensor(-0.1)),
        ("transform", Standardization([0.5] * 3, [0.5] * 3)),
        ("metadata", {"iterations": -1}),
        ("metadata", {"network": {"name": 3}}),
        ("metadata", {"ema_initial_weight": 2}),
        ("ema_images", torch.full((6, 2, 4, 4), torch.nan)),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_the_old_file_stays(full, refused, path, field, value):
    full.save(path)
    before = path.read_bytes()
    setattr(full, field, value)
    with refused(path, next(iter(value)) if field == "metadata" else field):
        full.save(path)
    assert path.read_bytes() == before


def test_dataset_works_in_an_ordinary_dataloader(full, refused):
    for ema, images in ((False, full.images), (True, full.ema_images)):
        assert full.chosen(ema=ema) is images
        batches = list(DataLoader(full.dataset(ema=ema), batch_size=4))
        assert [len(labels) for _, labels in batches] == [4, 2]
        assert torch.equal(torch.cat([batch for batch, _ in batches]), images)
    full.ema_images = None
    for use in (full.chosen, full.dataset, full.pictures):
        with refused("no EMA images"):
            use(ema=True)


def test_it_prints_in_five_lines_without_pixels(full):
    full.class_names = [f"class {number}" for number in range(40)]
    first, names, *_ = lines = repr(full).splitlines()
    assert first == "SyntheticSet of 6 images, 2 x 4 x 4, and their moving average"
    assert (len(lines), names[:24], names[-12:]) == (5, "  classes    40: class 0", "class 9, ...")


def test_classes_are_taken_in_the_order_of_their_names(full, pictures, refused):
    part = full.take_classes(["Käfer", "ant"])
    assert torch.equal(part.images, full.images[[4, 5, 0, 1]])
    assert torch.equal(part.ema_images, full.ema_images[[4, 5, 0, 1]])
    assert (part.labels.tolist(), part.class_names, part.step_size) == ([0, 0, 1, 1], ["Käfer", "ant"], full.step_size)
    assert part.metadata == {key: METADATA[key] for key in ("dataset", "augment", "versions")}
    labels = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]).repeat(2, 1)
    part = SyntheticSet(pictures, labels, class_names=["a", "b", "c"]).take_classes(["c", "a"])
    assert torch.equal(part.images, pictures[[2, 5, 0, 3]])  # of the most probable classes
    torch.testing.assert_close(part.labels[[0, 2]], torch.tensor([[7 / 8, 1 / 8], [1 / 3, 2 / 3]]))
    with refused("take_classes", "'d'", "ant, bee"):
        full.take_classes(["ant", "d"])


def test_sets_are_joined_by_the_names_of_their_classes(full, path, refused):
    names, metadata = ["bee", "wasp"], {"method": "ftd", "versions": {"torch": "2"}}
    other = replace(full, images=full.images + 1, labels=torch.tensor([1, 0] * 3), class_names=names, metadata=metadata)
    other = replace(other, step_size=0.0323, ema_images=None)
    assert SyntheticSet.concatenate([full, full, other]).learning_rate == pytest.approx((2 * 0.0123 + 0.0323) / 3)
    joined = SyntheticSet.concatenate([full, other])
    assert joined.class_names == ["ant", "bee", "Käfer", "wasp"]
    assert joined.labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3]
    both = torch.cat([full.images, other.images])
    assert torch.equal(joined.images, both[[0, 1, 2, 3, 7, 9, 11, 4, 5, 6, 8, 10]])
    assert joined.ema_images is None
    found = [(one["fingerprint"], one["class_names"], one["method"]) for one in joined.metadata.pop("joined")]
    assert found == [(full.fingerprint(), full.class_names, None), (other.fingerprint(), names, "ftd")]
    assert joined.metadata == {"versions": {"torch": "2"}}
    assert torch.equal(there_and_back(joined, path).take_classes(["wasp"]).images, other.images[::2])
    unlike = {"images": torch.zeros(6, 2, 5, 5), "transform": Standardization([0.0], [1.0]), "class_names": []}
    for field, value in unlike.items():
        with refused("concatenate", field):
            SyntheticSet.concatenate([full, replace(full, **{field: value})])


def test_soft_labels_are_widened_and_hard_ones_become_soft(full):
    targets = {"labels": torch.tensor([[0.3, -0.3]] * 6), "metadata": {"label_kind": "target", "target_scale": 0.6}}
    joined = SyntheticSet.concatenate([replace(full, class_names=["wasp", "ant"], **targets), full])
    assert joined.class_names == ["wasp", "ant", "bee", "Käfer"]
    assert torch.equal(joined.labels, torch.eye(4)[[0] * 6 + [1, 1, 2, 2, 3, 3]])
    assert not {"label_kind", "target_scale"} & joined.metadata.keys()
