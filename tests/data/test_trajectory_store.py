import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ftd_lightning.errors import DivergenceError
from ftd_lightning.files import TrajectoryStore, check_compatible, write_teacher
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors

NETWORK = {"name": "convnet", "width": 8}
STANDARD = {"kind": "standardization", "mean": [0.3058], "std": [0.3762]}
SHARED = {"network": NETWORK, "dataset": {"name": "digits", "seed": 0}, "transform": STANDARD, "rho": 0.01}


def snapshots(teacher, epochs=4, parameters=6):
    """Weights that say whose they are: teacher, epoch and place are one decimal place apart."""
    return [100.0 * teacher + epoch + torch.arange(parameters) / 10 for epoch in range(epochs + 1)]


def record(folder, teachers, **changes):
    for teacher in teachers:
        metadata = {**SHARED, "seed": 1000 + teacher, "accuracies": [0.05 * teacher], **changes}
        write_teacher(folder, teacher, snapshots(teacher), metadata)
    return folder


@pytest.fixture
def folder(tmp_path):
    return record(tmp_path / "teachers", [2, 0, 1])


def test_segment_is_two_rows_of_the_trajectory(folder):
    store = TrajectoryStore(folder)
    for teacher in range(3):
        trajectory = store.trajectory(teacher)
        assert torch.equal(trajectory, torch.stack(snapshots(teacher)))
        for start_epoch in range(5):
            for expert_epochs in range(1, 5 - start_epoch):
                start, target = store.segment(teacher, start_epoch, expert_epochs)
                assert torch.equal(start, trajectory[start_epoch])
                assert torch.equal(target, trajectory[start_epoch + expert_epochs])
                assert start.dtype == target.dtype == torch.float32


def test_teachers_come_in_the_order_of_their_numbers(folder):
    record(folder, [11])  # after 2, not between 1 and 2
    store = TrajectoryStore(str(folder))
    assert [store.teacher_metadata(i)["teacher"] for i in range(len(store))] == [0, 1, 2, 11]
    assert [float(store.segment(i, 0, 1).start[0]) for i in range(len(store))] == [0.0, 100.0, 200.0, 1100.0]


def test_store_says_what_its_teachers_share_and_each_says_its_own(folder):
    store = TrajectoryStore(folder)
    assert (len(store), store.epochs, store.num_parameters) == (3, 4, 6)
    assert store.metadata == {**SHARED, "parameters": 6}
    assert store.teacher_metadata(2)["seed"] == 1002
    assert store.teacher_metadata(2)["accuracies"] == [0.1]
    assert store.teacher_metadata(2)["network"] == NETWORK


def test_write_teacher_returns_the_file_that_the_store_finds(tmp_path):
    path = write_teacher(str(tmp_path / "new"), 7, snapshots(7), SHARED)
    assert TrajectoryStore(tmp_path / "new").files == [path]


def test_equal_teachers_are_equal_files(tmp_path):
    a = write_teacher(tmp_path / "a", 0, snapshots(0), SHARED)
    b = write_teacher(tmp_path / "b", 0, snapshots(0), dict(reversed(SHARED.items())))
    assert a.read_bytes() == b.read_bytes()


def test_equal_snapshots_in_a_row_are_refused(tmp_path):
    # What comes of snapshots that are views of live weights: the loss would divide by zero.
    weights = snapshots(0)
    weights[3] = weights[2].clone()
    with pytest.raises(DivergenceError, match=r"teacher 5.* 2 and 3 "):
        write_teacher(tmp_path, 5, weights, SHARED)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_that_diverged_leave_the_file_that_was_there(folder):
    path, before = folder / "teacher_0001.safetensors", (folder / "teacher_0001.safetensors").read_bytes()
    for weights in ([*snapshots(1), snapshots(1)[-1]], [*snapshots(1), torch.full((6,), torch.nan)]):
        with pytest.raises(DivergenceError):
            write_teacher(folder, 1, weights, SHARED)
        assert path.read_bytes() == before
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("epoch", [0, 4])
def test_snapshots_that_are_not_finite_are_refused(tmp_path, bad, epoch):
    weights = snapshots(0)
    weights[epoch][3] = bad
    with pytest.raises(DivergenceError, match="teacher 5 diverged"):
        write_teacher(tmp_path, 5, weights, SHARED)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_empty_folders_are_refused(tmp_path, refused):
    with refused(tmp_path / "nowhere", "no teachers"):
        TrajectoryStore(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing here")
    with refused(tmp_path, "no teachers"):
        TrajectoryStore(tmp_path)


@pytest.mark.parametrize("teacher", [0, 1])
def test_truncated_teacher_is_refused_wherever_it_was_cut(folder, refused, teacher):
    path = folder / f"teacher_{teacher:04d}.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        with refused(path):
            TrajectoryStore(folder)


def test_teacher_that_breaks_after_the_store_was_opened_is_refused(folder, refused):
    store = TrajectoryStore(folder)
    path = folder / "teacher_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with refused(path):
        store.segment(1, 0, 2)
    path.unlink()
    with refused(path):
        store.segment(1, 0, 2)
    assert torch.equal(store.segment(2, 0, 2).start, snapshots(2)[0])


def test_foreign_file_with_the_name_of_a_teacher_is_refused(folder, refused):
    path = folder / "teacher_0001.safetensors"
    save_file({"epoch_0000": torch.zeros(6), "epoch_0004": torch.ones(6)}, path)
    with refused(path, "another program"):
        TrajectoryStore(folder)


def test_file_of_another_kind_with_the_name_of_a_teacher_is_refused(folder, refused):
    path = folder / "teacher_0000.safetensors"
    write_tensors(path, {"images": torch.zeros(1)}, kind="synthetic_set", metadata=SHARED)
    with refused(path, "synthetic set"):
        TrajectoryStore(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network", {"name": "convnet", "width": 16}),
        ("dataset", {"name": "digits", "seed": 1}),
        ("transform", {"kind": "zca", "eps": 0.1, "fitted_on": "ab"}),
        ("rho", 0.02),
    ],
)
def test_teachers_that_differ_are_refused(folder, refused, key, value):
    record(folder, [3], **{key: value})
    with refused(folder / "teacher_0003.safetensors", "teacher_0000.safetensors", key):
        TrajectoryStore(folder)


def test_teachers_of_which_only_one_has_a_setting_are_refused(folder, refused):
    # In either order: the first teacher lacks it here, and there the others do.
    record(folder, [3], alpha=0.3)
    with refused(folder / "teacher_0003.safetensors", "alpha"):
        TrajectoryStore(folder)
    (folder / "teacher_0003.safetensors").unlink()
    record(folder, [0], alpha=0.3)
    with refused(folder / "teacher_0001.safetensors", "alpha"):
        TrajectoryStore(folder)


def test_teachers_of_different_size_are_refused(folder, refused):
    path = write_teacher(folder, 3, snapshots(3, parameters=7), SHARED)
    with refused(path, "parameters"):
        TrajectoryStore(folder)


@pytest.mark.parametrize("short", [0, 3])
def test_the_shortest_teacher_decides_how_far_segments_reach(folder, refused, short):
    # One that EarlyStopping ended is as good as the others, as far as it goes.
    write_teacher(folder, short, snapshots(short, epochs=2), {**SHARED, "seed": 5, "accuracies": []})
    store = TrajectoryStore(folder)
    assert store.epochs == 2
    assert [len(store.trajectory(teacher)) for teacher in range(len(store))] == [e + 1 for e in store.lengths]
    assert sorted(store.lengths) == [2, *[4] * (len(store) - 1)]
    assert torch.equal(store.trained(short), snapshots(short)[2])
    assert torch.equal(store.trained(1), snapshots(1)[4])
    assert torch.equal(store.segment(1, 1, 1).target, snapshots(1)[2])
    with refused(folder, "1 to 3", "0 to 2"):
        store.segment(1, 1, 2)


@pytest.mark.parametrize("missing", [0, 4])
@pytest.mark.parametrize("teacher", [0, 1])
def test_teacher_that_lacks_an_end_is_refused(folder, refused, teacher, missing):
    path = folder / f"teacher_{teacher:04d}.safetensors"
    metadata = TensorFile(path, kind="teacher_trajectory").metadata
    weights = {f"epoch_{e:04d}": w for e, w in enumerate(snapshots(teacher)) if e != missing}
    write_tensors(path, weights, kind="teacher_trajectory", metadata=metadata)
    with refused(path):
        TrajectoryStore(folder)


def test_teacher_that_lacks_an_epoch_in_between_is_refused_when_it_is_read(folder, refused):
    path = folder / "teacher_0001.safetensors"
    metadata = TensorFile(path, kind="teacher_trajectory").metadata
    weights = {f"epoch_{e:04d}": w for e, w in enumerate(snapshots(1)) if e != 2}
    write_tensors(path, weights, kind="teacher_trajectory", metadata=metadata)
    with refused(path):
        TrajectoryStore(folder).segment(1, 0, 2)


def test_segment_beyond_the_record_is_refused(folder, refused):
    store = TrajectoryStore(folder)
    store.segment(0, 3, 1)  # up to the last epoch is fine
    for start_epoch, expert_epochs in ((4, 1), (0, 5), (3, 2)):
        with refused(folder, f"{start_epoch} to {start_epoch + expert_epochs}", "0 to 4"):
            store.segment(0, start_epoch, expert_epochs)
    with refused(folder, "-1 to 1"):
        store.segment(0, -1, 2)


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("network", {"name": "convnet", "width": 16}, NETWORK),
        ("dataset", {"name": "cifar10", "seed": 0}, SHARED["dataset"]),
        ("transform", {"kind": "zca", "eps": 0.1, "fitted_on": "ab"}, STANDARD),
        ("augment", "flip", None),
    ],
)
def test_teachers_of_something_else_are_refused_and_both_values_named(folder, refused, key, value, theirs):
    store = TrajectoryStore(folder)
    check_compatible(store, SHARED)
    with refused(folder, key, value, theirs):
        check_compatible(store, {**SHARED, key: value})


def test_segment_reads_its_two_ends_and_nothing_else(folder, monkeypatch):
    store, read = TrajectoryStore(folder), []
    original = TensorFile.__getitem__
    monkeypatch.setattr(TensorFile, "__getitem__", lambda file, name: read.append(name) or original(file, name))
    store.segment(1, 1, 2)
    assert read == ["epoch_0001", "epoch_0003"]


class OneAtATime(Sequence):
    """Snapshots that are made when they are asked for; counts how many are in memory at the same time."""

    def __init__(self, values):
        self.values, self.made, self.most = values, [], 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        values = self.values[index].numpy().copy()  # lives as long as any tensor that shares its memory
        self.made.append(weakref.ref(values))
        self.most = max(self.most, sum(made() is not None for made in self.made))
        return torch.from_numpy(values)


def test_snapshots_are_written_one_by_one_and_the_file_is_that_of_safetensors(tmp_path):
    lazy = OneAtATime(snapshots(3))
    path = write_teacher(tmp_path / "lazy", 3, lazy, SHARED)
    assert lazy.most == 1
    assert path.read_bytes() == write_teacher(tmp_path / "list", 3, snapshots(3), SHARED).read_bytes()
    tensors = {f"epoch_{epoch:04d}": weights for epoch, weights in enumerate(snapshots(3))}
    with safe_open(path, framework="pt") as file:
        save_file(tensors, tmp_path / "theirs", metadata=file.metadata())
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


WRITE_LONG = """
import json, resource, sys, torch
from ftd_lightning.files.trajectory_store import write_teacher

class Snapshots(list):
    def __getitem__(self, epoch):
        return torch.full((size,), float(epoch))

size = 4_000_000
metadata = {"network": json.loads(sys.argv[2])}
write_teacher(sys.argv[1], 0, Snapshots(range(2)), metadata)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_teacher(sys.argv[1], 1, Snapshots(range(12)), metadata)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.slow
def test_memory_for_a_teacher_does_not_grow_with_its_epochs(tmp_path):
    # Without the setting, glibc keeps some freed tensors, which then count.
    done = subprocess.run(
        [sys.executable, "-c", WRITE_LONG, tmp_path, json.dumps(NETWORK)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    assert (tmp_path / "teacher_0001.safetensors").stat().st_size > 180 * 2**20
    assert float(done.stdout) < 12  # MB; one more epoch in memory would be 15


READ_MANY = """
import json, os, random, sys
from ftd_lightning.files import TrajectoryStore

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

def handles():
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("teacher_" in line for line in maps)

def read():
    start, target = store.segment(rng.randrange(len(store)), rng.randrange(store.epochs - 1), 2)
    assert float((target - start).mean()) > 0  # touches every page
    return resident_mb()

rng = random.Random(0)
store = TrajectoryStore(sys.argv[1])
read()
before, fds = resident_mb(), handles()[0]
peak = max(read() for _ in range(200))
print(json.dumps({"growth": peak - before, "fds": handles()[0] - fds, "mapped": handles()[1], "teachers": len(store)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_with_the_teachers(tmp_path):
    for teacher in range(30):
        write_teacher(tmp_path, teacher, snapshots(teacher, epochs=10, parameters=80_000), SHARED)
    size = sum(path.stat().st_size for path in tmp_path.iterdir()) / 2**20
    assert size > 95
    done = subprocess.run([sys.executable, "-c", READ_MANY, tmp_path], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["teachers"] == 30
    assert found["growth"] < 8  # MB; a segment takes 0.6, and 200 of them touch all of the store
    assert found["fds"] <= 0
    assert found["mapped"] == 0
