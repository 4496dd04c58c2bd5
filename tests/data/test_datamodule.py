import hashlib
from collections import Counter
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from fits import small_data
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from ftd_lightning.contracts import BatchPlan
from ftd_lightning.data import DistillationDataModule, SegmentLoader, random_real_images
from ftd_lightning.data.loaders import BatchOrder, TensorLoader
from ftd_lightning.files import Standardization, SyntheticSet, TrajectoryStore, Whitening, write_teacher

TEST_OF_EACH_DIGIT = [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
TRAIN_OF_EACH_DIGIT = [142, 146, 141, 147, 144, 146, 145, 143, 139, 144]


@pytest.fixture
def ready(tmp_path):
    """Give ``ready(**options)``: a DataModule of the digits, set up."""

    def make(**options):
        data = DistillationDataModule(
            **{"dataset": "digits", "root": str(tmp_path / "root"), "cache_dir": str(tmp_path / "cache"), **options}
        )
        data.prepare_data()
        data.setup()
        return data

    return make


def pixels(images, data):
    """What each image was, as bytes of 17 grey levels, so that images can be told apart and counted."""
    pictures = data.transform.invert(images.images)
    return [picture.numpy().tobytes() for picture in (pictures * 16).round().to(torch.uint8)]


def counts(labels):
    return labels.bincount(minlength=10).tolist()


# The digits and their parts


def test_digits_are_split_once_and_for_all(ready):
    data = ready(val_fraction=0.0)
    assert counts(data.train.labels) == TRAIN_OF_EACH_DIGIT
    assert counts(data.test.labels) == TEST_OF_EACH_DIGIT
    assert data.test.labels[:20].tolist() == [0, 2, 4, 7, 1, 6, 8, 9, 5, 3, 0, 2, 7, 6, 4, 0, 1, 3, 9, 8]
    digest = hashlib.sha256(b"".join(pixels(data.test, data))).hexdigest()
    assert digest == "3c05733c55d710109b9a1878ea98f552bb9d33485cd2bddb57cbade1c3c55d6d"


def test_digits_are_those_of_scikit_learn_and_none_is_in_both_parts(ready):
    data = ready(val_fraction=0.0)
    train, test = pixels(data.train, data), pixels(data.test, data)
    assert (len(train), len(test)) == (1437, 360)
    assert not set(train) & set(test)
    bunch = load_digits()
    labels = {image.astype(np.uint8).tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)}
    found = dict(zip(train + test, torch.cat([data.train.labels, data.test.labels]).tolist(), strict=True))
    assert found == labels


def test_split_does_not_depend_on_the_seed(ready):
    a, b = ready(seed=0), ready(seed=1)
    assert torch.equal(a.test.images, b.test.images)
    assert set(pixels(a.train, a) + pixels(a.val, a)) == set(pixels(b.train, b) + pixels(b.val, b))


def test_images_have_the_shapes_types_and_range_that_networks_expect(ready):
    data = ready()
    for part in (data.train, data.val, data.test):
        assert part.images.shape[1:] == (1, 8, 8)
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
    assert abs(float(data.train.images.mean())) < 0.02
    assert abs(float(data.train.images.std()) - 1) < 0.02
    pictures = data.transform.invert(data.train.images)
    assert pictures.min() > -1e-6
    assert pictures.max() < 1 + 1e-6
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 8)
    assert data.class_names == list("0123456789")


def test_constants_of_the_digits_are_those_of_their_training_part(ready):
    data = ready(val_fraction=0.0)
    pictures = data.transform.invert(data.train.images)
    assert abs(float(pictures.mean()) - data.spec.mean[0]) < 1e-4
    assert abs(float(pictures.std()) - data.spec.std[0]) < 1e-4


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_held_out_images_are_an_equal_share_of_every_class_and_of_training_alone(ready, fraction):
    data, whole = ready(val_fraction=fraction), ready(val_fraction=0.0)
    assert counts(data.val.labels) == [round(fraction * n) for n in TRAIN_OF_EACH_DIGIT]
    train, val = pixels(data.train, data), pixels(data.val, data)
    assert not set(train) & set(val)
    assert Counter(train + val) == Counter(pixels(whole.train, whole))
    assert torch.equal(data.test.images, whole.test.images)
    # Each image kept its label.
    labels = dict(zip(pixels(whole.train, whole), whole.train.labels.tolist(), strict=True))
    assert [labels[picture] for picture in val] == data.val.labels.tolist()


def test_held_out_images_are_a_function_of_the_seed(ready):
    data = ready(seed=3)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(ready(seed=3).val.images, data.val.images)
    assert not torch.equal(ready(seed=4).val.images, data.val.images)


def test_held_out_images_are_not_the_first_of_each_class(ready):
    data, whole = ready(val_fraction=0.1), ready(val_fraction=0.0)
    place = {picture: i for i, picture in enumerate(pixels(whole.train, whole))}
    assert max(place[picture] for picture in pixels(data.val, data)) > 1000


def test_with_nothing_held_out_there_is_no_validation(ready):
    data = ready(val_fraction=0)
    assert len(data.val.labels) == 0
    assert data.val_dataloader() == []
    assert len(data.train.labels) == 1437


def test_whitening_with_nothing_held_out(ready):
    data = ready(val_fraction=0, zca=True)
    assert data.val_dataloader() == []
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.train.images.isfinite().all()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_share_out_of_range_is_refused(refused, fraction):
    with refused(f"val_fraction={fraction}"):
        DistillationDataModule(val_fraction=fraction)


def test_limit_keeps_so_many_of_every_class_in_training_and_test(ready):
    data = ready(max_per_class=20, val_fraction=0.1)
    assert counts(data.train.labels) == [18] * 10
    assert counts(data.val.labels) == [2] * 10
    assert counts(data.test.labels) == [20] * 10
    whole = ready(val_fraction=0.0)
    assert set(pixels(data.train, data) + pixels(data.val, data)) < set(pixels(whole.train, whole))
    assert set(pixels(data.test, data)) < set(pixels(whole.test, whole))
    assert torch.equal(ready(max_per_class=20).test.images, data.test.images)


def test_limit_above_a_class_keeps_all_of_it(ready):
    # "At most": 100 are there of each digit in training, but 36 in the test part.
    data = ready(max_per_class=100, val_fraction=0.0)
    assert counts(data.train.labels) == [100] * 10
    assert counts(data.test.labels) == TEST_OF_EACH_DIGIT
    data = ready(max_per_class=1000, val_fraction=0.0)
    assert counts(data.train.labels) == TRAIN_OF_EACH_DIGIT


def test_setup_of_a_second_stage_keeps_the_images(ready):
    data = ready()
    train = data.train.images
    data.setup("test")
    assert data.train.images is train


def test_setup_after_prepare_data_does_not_read_again_and_transforms_nothing(tmp_path, monkeypatch):
    data, calls = DistillationDataModule(root=str(tmp_path)), []
    load, apply = data.spec.load, Standardization.apply
    data.spec = replace(data.spec, load=lambda: calls.append("read") or load())
    monkeypatch.setattr(Standardization, "apply", lambda *args: calls.append("transform") or apply(*args))
    data.prepare_data()
    data.setup("fit")
    assert calls == ["read"]
    assert data.train is data.part("train")
    assert data.test.images.shape[0] == 360
    assert calls == ["read", "transform", "transform"]


# Whitening


def covariance_eigenvalues(pictures):
    return np.linalg.eigvalsh(np.cov(pictures.double().flatten(1).numpy().T))


def test_whitened_covariance_is_shrunk_as_the_formula_says(ready):
    plain, white = ready(), ready(zca=True)
    s = covariance_eigenvalues(plain.transform.invert(plain.train.images))
    found = covariance_eigenvalues(white.train.images)
    assert np.abs(np.sort(found) - np.sort(s / (s + 0.1))).max() < 1e-4
    assert found.max() > 0.8  # the strongest directions come out with a variance near 1
    assert white.train.images.mean(0).abs().max() < 1e-4


def test_whitening_is_fitted_on_what_is_trained_on_and_applied_to_all(ready):
    plain, white = ready(), ready(zca=True)

    def back(data, images):
        return data.transform.invert(images.images)

    wanted = Whitening.fit(back(plain, plain.train), eps=0.1)
    for name in ("train", "val", "test"):
        pictures = back(plain, getattr(plain, name))
        assert torch.allclose(getattr(white, name).images, wanted.apply(pictures), atol=1e-3)
        assert (back(white, getattr(white, name)) - pictures).abs().max() < 1e-4


def test_whitening_is_fitted_once_and_read_afterwards(ready, tmp_path, monkeypatch):
    first = ready(zca=True)
    (file,) = (tmp_path / "cache" / "whitening").iterdir()
    written = file.stat().st_mtime_ns

    def fail(*args, **kwargs):
        raise AssertionError("fitted again")

    monkeypatch.setattr(Whitening, "fit", fail)
    again = ready(zca=True)
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.test.images, first.test.images)
    assert again.describe() == first.describe()
    assert list((tmp_path / "cache" / "whitening").iterdir()) == [file]
    assert file.stat().st_mtime_ns == written
    # The seed of the batches alone would do; but it also decides what is held out.
    with pytest.raises(AssertionError, match="fitted again"):
        ready(zca=True, seed=1)


def test_prepare_data_leaves_nothing_to_fit_for_other_processes(tmp_path, monkeypatch):
    def make():
        return DistillationDataModule(cache_dir=str(tmp_path), zca=True)

    make().prepare_data()
    monkeypatch.setattr(Whitening, "fit", lambda *args, **kwargs: pytest.fail("fitted in setup"))
    data = make()  # another rank on this node: prepare_data was not called in it
    data.setup("fit")
    assert data.transform.describe()["kind"] == "zca"


@pytest.mark.parametrize("changes", [{"val_fraction": 0.2}, {"zca_eps": 0.2}, {"max_per_class": 30}])
def test_whitening_of_something_else_has_a_file_of_its_own(ready, tmp_path, changes):
    ready(zca=True)
    before = ready(zca=True).describe()
    data = ready(zca=True, **changes)
    assert len(list((tmp_path / "cache" / "whitening").iterdir())) == 2
    assert data.describe()["transform"] != before["transform"]


# What is trained on


def all_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches_of_real_images(ready):
    data = ready(batch_size=100)
    batches = list(data.train_dataloader())
    assert [len(images) for images, _ in batches] == [100] * 12 + [94]
    for images, labels in batches:
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.shape == (len(images),)
    images, labels = all_of(data.train_dataloader())
    assert not torch.equal(labels, data.train.labels)  # shuffled
    by_bytes = {p.numpy().tobytes(): int(label) for p, label in zip(*data.train, strict=True)}
    assert {p.numpy().tobytes(): int(label) for p, label in zip(images, labels, strict=True)} == by_bytes


def test_held_out_and_test_images_come_in_order(ready):
    data = ready(batch_size=100)
    for loader, part in ((data.val_dataloader(), data.val), (data.test_dataloader(), data.test)):
        images, labels = all_of(loader)
        assert torch.equal(images, part.images)
        assert torch.equal(labels, part.labels)


def test_images_in_host_memory_come_through_a_dataloader_in_the_same_order(ready):
    tensors, host = ready(batch_size=300), ready(batch_size=300, on_device="no")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        a, b = getattr(tensors, name)(), getattr(host, name)()
        assert isinstance(a, TensorLoader)
        assert isinstance(b, DataLoader)
        for (x, y), (u, v) in zip(a, b, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert ready(on_device="no", num_workers=2).train_dataloader().num_workers == 2


@pytest.mark.parametrize(("value", "kind"), [(False, DataLoader), (True, TensorLoader)])
def test_place_of_images_as_yaml_reads_no_and_yes(ready, value, kind):
    assert isinstance(ready(on_device=value).train_dataloader(), kind)


def test_random_baseline_is_real_images_of_each_class(ready):
    data = ready(synthetic="random", ipc=3)
    synthetic = data.synthetic_set
    assert synthetic.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert synthetic.class_names == data.class_names
    assert synthetic.metadata["method"] == "random"
    assert synthetic.metadata["dataset"]["name"] == "digits"
    real = {p.numpy().tobytes(): int(label) for p, label in zip(*data.train, strict=True)}
    found = [p.numpy().tobytes() for p in synthetic.images]
    assert [real[p] for p in found] == synthetic.labels.tolist()
    assert len(set(found)) == 30
    images, _ = all_of(data.train_dataloader())
    assert images.shape == (30, 1, 8, 8)
    # The draw is that of the initial images of a distillation, so the two can be compared.
    assert torch.equal(random_real_images(data.train, 3, 0).images, synthetic.images)
    assert torch.equal(ready(synthetic="random", ipc=3).synthetic_set.images, synthetic.images)
    assert not torch.equal(ready(synthetic="random", ipc=3, seed=1).synthetic_set.images, synthetic.images)


def test_real_baseline_is_all_training_images(ready):
    data = ready(synthetic="real")
    assert torch.equal(data.synthetic_set.images, data.train.images)
    assert data.synthetic_set.metadata["method"] == "real"
    assert sum(len(labels) for _, labels in data.train_dataloader()) == len(data.train.labels)


@pytest.mark.parametrize("synthetic", ["random", "real"])
def test_baseline_can_be_saved_and_evaluated_later(ready, tmp_path, synthetic):
    data = ready(synthetic=synthetic, zca=True)
    data.synthetic_set.save(tmp_path / "set.safetensors")
    back = ready(synthetic=str(tmp_path / "set.safetensors"))
    assert torch.equal(back.synthetic_set.images, data.synthetic_set.images)
    assert back.synthetic_set.metadata["method"] == synthetic


def test_more_images_than_a_class_has_are_refused(ready, refused):
    with refused("200 images per class", "class 0"):
        ready(synthetic="random", ipc=200)


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


def test_file_is_trained_on_and_brings_its_transform(ready, synthetic_file):
    plain, data = ready(), ready(synthetic=synthetic_file())
    images, labels = all_of(data.train_dataloader())
    assert torch.equal(images, torch.full((20, 1, 8, 8), 0.5))
    assert counts(labels) == [2] * 10
    assert data.transform.describe() == Standardization([0.1], [0.7]).describe()
    # The test images go through it too: a network that saw the set would not know them otherwise.
    pictures = plain.transform.invert(plain.test.images)
    assert torch.allclose(data.test.images, (pictures - 0.1) / 0.7, atol=1e-5)
    assert torch.allclose(data.val.images, (plain.transform.invert(plain.val.images) - 0.1) / 0.7, atol=1e-5)


def test_whitened_file_is_used_without_another_fit(ready, synthetic_file, monkeypatch):
    white = ready(zca=True)
    path = synthetic_file(transform=white.transform)
    monkeypatch.setattr(Whitening, "fit", lambda *args, **kwargs: pytest.fail("fitted again"))
    # Even where zca is asked for, and with other images held out.
    data = ready(synthetic=path, zca=True, seed=1)
    assert torch.allclose(data.test.images, white.test.images, atol=1e-3)
    assert data.describe()["transform"] == white.describe()["transform"]


def test_averaged_images_are_trained_on_where_asked_for(ready, synthetic_file, refused):
    images, _ = all_of(ready(synthetic=synthetic_file(), ema=True).train_dataloader())
    assert torch.equal(images, torch.full((20, 1, 8, 8), 0.25))
    data = ready(synthetic=synthetic_file(ema_images=None), ema=True)
    with refused("no EMA images"):
        data.train_dataloader()


def test_soft_labels_reach_the_batches(ready, synthetic_file):
    soft = torch.softmax(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), dim=1)
    _, labels = all_of(ready(synthetic=synthetic_file(labels=soft)).train_dataloader())
    assert labels.dtype == torch.float32
    assert torch.equal(labels.sort(0).values, soft.sort(0).values)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": torch.zeros(20, 3, 8, 8), "ema_images": None},
        {"images": torch.zeros(20, 1, 16, 16), "ema_images": None},
        {"class_names": list("0123456789")[::-1]},
        {"class_names": list("abcdefghij")},
    ],
    ids=["channels", "size", "order of classes", "classes"],
)
def test_set_of_another_data_set_is_refused(ready, synthetic_file, refused, changes):
    path = synthetic_file(**changes)
    with refused(path, "digits"):
        ready(synthetic=path)


def test_missing_set_is_refused(ready, refused, tmp_path):
    with refused(tmp_path / "nothing"):
        ready(synthetic=str(tmp_path / "nothing"))


class Asking(LightningModule):
    """Learns nothing; keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AskingForSegments(Asking):
    def __init__(self, store):
        super().__init__()
        self.store = store

    def iteration_loader(self):
        return SegmentLoader(self.store, expert_epochs=1, max_start_epoch=1, length=3)


def fit(module, data, folder):
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return module.batches


def test_trainer_gives_each_module_what_it_trains_on(tmp_path, synthetic_file):
    root = str(tmp_path)
    real = fit(Asking(), DistillationDataModule(root=root), tmp_path)
    assert sum(len(labels) for _, labels in real) == 1437 - sum(round(0.1 * n) for n in TRAIN_OF_EACH_DIGIT)
    synthetic = fit(Asking(), DistillationDataModule(root=root, synthetic=synthetic_file()), tmp_path)
    assert sum(len(labels) for _, labels in synthetic) == 20
    write_teacher(tmp_path / "teachers", 0, [torch.zeros(2), torch.ones(2)], {"network": {"name": "tiny"}})
    segments = fit(
        AskingForSegments(TrajectoryStore(tmp_path / "teachers")), DistillationDataModule(root=root), tmp_path
    )
    assert [(b["iteration"], b["target"].tolist()) for (b,) in segments] == [(i, [1.0, 1.0]) for i in range(3)]


class Planning(Asking):
    """Wants the images of the second half of the ranks, in the order of another epoch."""

    def batch_plan(self):
        return BatchPlan(rank=1, world_size=2, epoch=lambda epoch: epoch + 5)


def test_a_module_may_plan_how_images_are_dealt_out(tmp_path):
    data = DistillationDataModule(root=str(tmp_path), val_fraction=0.0)
    batches = fit(Planning(), data, tmp_path)
    order = BatchOrder(1437, 256, shuffle=True, rank=1, world_size=2)
    order.set_epoch(5)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.train.labels[torch.cat(list(order))])


class Validating(Asking):
    validated = 0

    def validation_step(self, batch, batch_idx):
        self.validated += 1


class ValidatingSegments(Validating, AskingForSegments):
    pass


@pytest.mark.filterwarnings("error", "ignore::FutureWarning")  # those are of Lightning's own use of torch
@pytest.mark.parametrize("segments", [False, True])
def test_without_validation_nothing_is_warned_of_and_the_trainer_keeps_its_settings(tmp_path, segments):
    data = DistillationDataModule(root=str(tmp_path), val_fraction=0.1 if segments else 0.0)
    write_teacher(tmp_path / "teachers", 0, [torch.zeros(2), torch.ones(2)], {"network": {"name": "tiny"}})
    module = ValidatingSegments(TrajectoryStore(tmp_path / "teachers")) if segments else Validating()
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    assert trainer.limit_val_batches == 1.0
    assert module.validated == 0
    # It validates where images are held out.
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(module := Validating(), datamodule=DistillationDataModule(root=str(tmp_path)))
    assert module.validated == 2  # in the sanity check and after the epoch


def test_each_rank_gets_its_share(ready):
    class Rank:
        lightning_module = None
        world_size = 2
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

        def __init__(self, rank):
            self.global_rank = rank

    data = ready()
    shares = []
    for rank in range(2):
        data.trainer = Rank(rank)
        images, _ = all_of(data.train_dataloader())
        shares.append({p.numpy().tobytes() for p in images})
    assert len(shares[0]) == len(shares[1]) == len(data.train.labels) // 2
    assert not shares[0] & shares[1]


# Descriptions, and what is refused


def test_description_names_images_and_transform(ready):
    assert ready(val_fraction=0.2, max_per_class=20, seed=3).describe() == {
        "dataset": {"name": "digits", "val_fraction": 0.2, "max_per_class": 20, "seed": 3},
        "transform": {"kind": "standardization", "mean": [0.3058], "std": [0.3762]},
    }


def test_descriptions_are_equal_where_the_images_are(ready):
    description = ready(zca=True).describe()
    # What does not change the images does not change the description.
    assert ready(zca=True, batch_size=7, on_device="no", synthetic="random").describe() == description
    for changes in ({"zca": False}, {"zca_eps": 0.2}, {"val_fraction": 0.2}, {"seed": 1}, {"max_per_class": 30}):
        assert ready(**{"zca": True, **changes}).describe() != description


@pytest.mark.parametrize(("name", "near"), [("cifar11", "cifar10"), ("cifar-10", "cifar10"), ("digit", "digits")])
def test_unknown_data_set_is_refused_and_the_nearest_offered(refused, name, near):
    with refused(repr(name), repr(near)) as caught:
        DistillationDataModule(dataset=name)
    (far,) = {"cifar10", "digits"} - {near}
    assert repr(far) not in str(caught.value)


def test_unknown_data_set_that_is_like_none_gets_all_names(refused):
    with refused("'xyz'", "'cifar10'", "'digits'"):
        DistillationDataModule(dataset="xyz")


def test_absent_cifar10_is_refused_where_it_may_not_be_downloaded(tmp_path, refused):
    data = DistillationDataModule(dataset="cifar10", root=str(tmp_path / "nowhere"), download=False)
    for stage in (data.prepare_data, data.setup):
        with refused("CIFAR-10", tmp_path / "nowhere", "data.download"):
            stage()


def test_download_without_a_network_is_refused(tmp_path, refused, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    data = DistillationDataModule(dataset="cifar10", root=str(tmp_path))
    with refused("CIFAR-10", "no route to host", "network", tmp_path):
        data.prepare_data()


def test_a_set_without_class_names_has_those_of_the_data(tmp_path, refused):
    file = tmp_path / "set.safetensors"
    SyntheticSet(torch.zeros(10, 1, 8, 8), torch.arange(10), step_size=0.02).save(file)
    data = small_data(synthetic=str(file))
    data.setup()
    assert float(data.training_set().step_size) == pytest.approx(0.02)
    assert data.training_set().step_size.dtype == torch.float32
    SyntheticSet(torch.zeros(1, 1, 8, 8), torch.tensor([10])).save(file)
    with refused(file, "labels run from 10 to 10, classes from 0 to 9"):
        small_data(synthetic=str(file)).setup()
