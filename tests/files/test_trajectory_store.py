import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.errors import DivergenceError
from ftd_lightning.files import Standardization, TrajectoryStore, Whitening, check_compatible, write_teacher
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors
from ftd_lightning.files.trajectory_store import (
    OPTIONAL_KEYS,
    OWN_KEYS,
    differences,
    load_store_data,
    store_data_file,
    write_store_data,
)
from ftd_lightning.models import build_network, describe_network

STORES_OF_0_1 = Path(__file__).resolve().parents[3] / "shared" / "data" / "teachers-cifar10-w32"
SHAPE = ImageShape(in_channels=1, num_classes=10, image_size=8)
NETWORK = {"name": "convnet", "options": {"width": 4, "depth": 1}, **SHAPE._asdict()}
STANDARD = Standardization([0.4], [0.25])
RECORDED = {
    "network": NETWORK,
    "dataset": {"name": "digits", "seed": 0, "fingerprint": "ab"},
    "transform": STANDARD.describe(),
    "augmentation": {"strategy": "flip", "mode": "single"},
    "rho": 0.01,
}


def snapshots(teacher, epochs=4, parameters=6):
    """Weights that say whose they are: teacher, epoch and place are one decimal place apart."""
    return [100.0 * teacher + epoch + torch.arange(parameters) / 10 for epoch in range(epochs + 1)]


def record(folder, teachers, **changes):
    for teacher in teachers:
        metadata = {**RECORDED, "seed": 1000 + teacher, "accuracies": [0.05 * teacher], **changes}
        write_teacher(folder, teacher, snapshots(teacher), metadata)
    return folder


@pytest.fixture
def folder(tmp_path):
    return record(tmp_path / "teachers", [2, 0, 1])


# Teachers


def test_segment_is_two_rows_of_the_trajectory(folder, refused):
    record(folder, [11])  # after 2, not between 1 and 2
    store = TrajectoryStore(str(folder))
    assert (len(store), store.epochs, store.num_parameters) == (4, 4, 6)
    for index, teacher in enumerate((0, 1, 2, 11)):
        trajectory = store.trajectory(index)
        assert torch.equal(trajectory, torch.stack(snapshots(teacher)))
        assert torch.equal(store.weights(index, 2), trajectory[2])
        assert torch.equal(store.weights(index), trajectory[4])
        start, target = store.segment(index, 1, 3)
        assert torch.equal(start, trajectory[1])
        assert torch.equal(target, trajectory[4])
    for start_epoch, expert_epochs, wrong in ((4, 1, 5), (0, 5, 5), (-1, 2, -1)):
        with refused(folder, f"epoch {wrong}", "0 to 4"):
            store.segment(0, start_epoch, expert_epochs)
    with refused(folder, "teacher 4", "0 to 3"):
        store.segment(4, 0, 1)


def test_store_says_what_its_teachers_share_and_each_says_its_own(folder):
    store = TrajectoryStore(folder)
    assert store.metadata == {**RECORDED, "parameters": 6}
    assert store.teacher_metadata(2)["seed"] == 1002
    assert store.teacher_metadata(2)["accuracies"] == [0.1]
    assert store.set_metadata()["method"] == "ftd"


def test_snapshots_that_diverged_or_stood_still_leave_the_file_that_was_there(folder):
    path, before = folder / "teacher_0001.safetensors", (folder / "teacher_0001.safetensors").read_bytes()
    still = snapshots(1)
    still[3] = still[2].clone()  # as views of live weights would be: the loss would divide by zero
    with pytest.raises(DivergenceError, match=r"teacher 1.* 2 and 3 "):
        write_teacher(folder, 1, still, RECORDED)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DivergenceError, match="teacher 1 diverged"):
            write_teacher(folder, 1, [*snapshots(1), torch.full((6,), bad)], RECORDED)
    assert path.read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_the_shortest_teacher_decides_how_far_segments_reach(folder, refused):
    # One that EarlyStopping ended is as good as the others, as far as it goes.
    write_teacher(folder, 3, snapshots(3, epochs=2), RECORDED)
    store = TrajectoryStore(folder)
    assert (store.epochs, store.lengths) == (2, [4, 4, 4, 2])
    assert torch.equal(store.weights(3), snapshots(3)[2])
    with refused(folder, "epoch 3", "0 to 2"):
        store.weights(3, 3)


def test_folders_and_files_that_hold_no_teachers_are_refused(tmp_path, folder, refused):
    for missing in (tmp_path / "nowhere", tmp_path):
        with refused(missing, "no teachers"):
            TrajectoryStore(missing)
    path = folder / "teacher_0001.safetensors"
    whole, metadata = path.read_bytes(), TensorFile(path).metadata
    store = TrajectoryStore(folder)
    path.write_bytes(whole[:-8])
    for read in (lambda: TrajectoryStore(folder), lambda: store.segment(1, 0, 2)):
        with refused(path):
            read()
    for missing in (0, 2, 4):
        weights = {f"epoch_{epoch:04d}": w for epoch, w in enumerate(snapshots(1)) if epoch != missing}
        write_tensors(path, weights, kind="teacher_trajectory", metadata=metadata)
        with refused(path):
            TrajectoryStore(folder)
    save_file({"epoch_0000": torch.zeros(6)}, path)
    with refused(path, "another program"):
        TrajectoryStore(folder)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"network": {**NETWORK, "options": {"width": 8, "depth": 1}}}, "network"),
        ({"dataset": {"name": "digits", "seed": 1}}, "dataset"),
        ({"transform": {"kind": "zca", "eps": 0.1, "fitted_on": "ab"}}, "transform"),
        ({"rho": 0.02}, "rho"),
        ({"alpha": 0.3}, "alpha"),
    ],
)
def test_teachers_that_differ_are_refused(folder, refused, changes, key):
    store = TrajectoryStore(folder)
    check_compatible(store, RECORDED)
    with refused(folder, f"have {key} ", changes[key]):
        check_compatible(store, {**RECORDED, **changes})
    record(folder, [3], **changes)
    with refused(folder / "teacher_0003", key):
        TrajectoryStore(folder)
    path = write_teacher(folder, 3, snapshots(3, parameters=7), RECORDED)
    with refused(path, "parameters"):
        TrajectoryStore(folder)


# Their data


def pictures():
    return torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["standardization", "zca"])
def test_store_keeps_what_its_teachers_were_trained_on(tmp_path, kind, refused):
    transform = STANDARD if kind == "standardization" else Whitening.fit(pictures())
    described = DataDescription(SHAPE, ["ant", "Käfer"], transform, RECORDED["dataset"], batch_size=16)
    write_store_data(record(tmp_path, [0, 1], transform=transform.describe()), described)
    before = store_data_file(tmp_path).stat()
    write_store_data(tmp_path, described)
    assert store_data_file(tmp_path).stat().st_mtime_ns == before.st_mtime_ns  # written once
    store = TrajectoryStore(tmp_path)
    assert len(store) == 2  # the file is no teacher
    assert (store.shape, store.data.class_names) == (SHAPE, ["ant", "Käfer"])
    images = transform.apply(pictures())
    assert torch.allclose(store.description().transform.apply(pictures()), images, atol=1e-4)
    assert torch.equal(store.description().transform.invert(images), transform.invert(images))
    assert store.data.metadata() == described.metadata()
    # A store that was emptied and recorded anew.
    write_store_data(tmp_path, DataDescription(SHAPE, ["bee"], STANDARD, {"fingerprint": "cd"}))
    assert load_store_data(store_data_file(tmp_path)).class_names == ["bee"]
    record(tmp_path, [0, 1], transform={"kind": "zca", "eps": 0.1, "fitted_on": "somewhere else"})
    with refused(store_data_file(tmp_path), "transform", "delete this file"):
        _ = TrajectoryStore(tmp_path).data
    save_file({"mean": torch.zeros(1)}, store_data_file(tmp_path))
    with refused(store_data_file(tmp_path), "another program"):
        _ = TrajectoryStore(tmp_path).shape


def test_store_without_description_tells_what_its_teachers_do(tmp_path):
    store = TrajectoryStore(record(tmp_path, [0]))
    assert torch.equal(store.description().transform.apply(pictures()), STANDARD.apply(pictures()))
    assert (store.data, store.shape) == (None, SHAPE)
    assert store.description().class_names == list("0123456789")
    for transform in ({"kind": "zca", "eps": 0.1, "fitted_on": "ab"}, None):
        unknown = TrajectoryStore(record(tmp_path, [0], transform=transform, network={"name": "tiny"}))
        assert (unknown.shape, unknown.description()) == (None, None)


# What differs


def both_ways(a, b, **options):
    assert differences(a, b, **options) == differences(b, a, **options)
    return differences(a, b, **options)


def test_differing_keys_are_named():
    parameters = describe_network(build_network("convnet", **SHAPE._asdict(), width=4, depth=1))
    same = [json.loads(json.dumps(RECORDED)), {**RECORDED, "network": parameters}]
    same += [{**RECORDED, key: 1} for key in (*OWN_KEYS, *OPTIONAL_KEYS)]
    for other in same:
        assert both_ways(RECORDED, other, whole=True) == []
    for key in OPTIONAL_KEYS:
        assert both_ways({**RECORDED, key: 1}, {**RECORDED, key: 2}, whole=True) == [key]
    assert both_ways({"betas": [0.9, 0.99]}, {"betas": (0.9, 0.99)}) == []  # as JSON holds tuples
    assert both_ways(RECORDED, {**RECORDED, "rho": 0.02, "dataset": None}, whole=True) == ["dataset", "rho"]
    less = {key: value for key, value in RECORDED.items() if key != "rho"}
    assert (differences(RECORDED, less), differences(RECORDED, less, whole=True)) == ([], ["rho"])


def test_datasets_differ_by_name_settings_and_fingerprint():
    def differ(a, b):
        return bool(both_ways({"dataset": a}, {"dataset": b}))

    named, other = RECORDED["dataset"], {"name": "digits", "seed": 1, "fingerprint": "ab"}
    assert differ(named, other)
    assert differ(named, {**named, "fingerprint": "ef"})
    older = {"name": "digits", "seed": 0}  # as 0.1 recorded it
    assert not differ(named, older)
    assert differ(other, older)
    unnamed = {"unnamed": "ab"}
    assert not differ(unnamed, unnamed)
    assert all(differ(unnamed, data) for data in ({"unnamed": "cd"}, None, {}, named, older))
    assert differ({"fingerprint": "ab"}, {"fingerprint": "cd"})


@pytest.mark.skipif(not STORES_OF_0_1.is_dir(), reason="no shared/data/teachers-cifar10-w32 beside the checkout")
@pytest.mark.parametrize("name", ["mtt", "ftd"])
def test_store_of_0_1_is_compatible_with_what_this_version_asks_for(name, refused):
    store = TrajectoryStore(STORES_OF_0_1 / name)
    assert (len(store), store.epochs, store.num_parameters) == (10, 4, 24714)
    assert (store.shape, store.data, store.description()) == ((3, 10, 32), None, None)  # its whitening was not kept
    wanted = {
        "network": describe_network(build_network("convnet", 3, 10, 32, width=32, depth=3)),
        "dataset": {**store.metadata["dataset"], "fingerprint": "ab"},
        "transform": store.metadata["transform"],
        "method": "FlatTeacher",
        "batches_per_epoch": 192,
    }
    check_compatible(store, wanted)
    with refused(store.path, "dataset"):
        check_compatible(store, {**wanted, "dataset": {**wanted["dataset"], "val_fraction": 0.1}})
