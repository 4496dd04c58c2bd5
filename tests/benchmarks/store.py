"""The trajectory store: segments read from files of their own, beside whole buffers kept in memory.

The buffers are what public scripts keep: torch files of lists of weights, loaded whole. Such a script draws from memory
and is the faster one at that; the figures say how much a read costs, to be set against a step of tens or hundreds of
milliseconds, and what the memory is that it saves. Both files have just been written, so both are read from the file
cache, not from the disk. Teachers are noise of the CIFAR-10 network's size (320,010 weights, 1.2 MiB a snapshot), of 2
epochs where real ones have 50.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import Result, Row
from benchmarks.processes import in_process, resident
from ftd_lightning.functional import flatten_parameters, make_generator
from ftd_lightning.models import ConvNet

EPOCHS, DRAWS = 2, 40
SIZES = {"quick": {"teachers": (2, 6), "width": 128}, "normal": {"teachers": (4, 100), "width": 128}}


def write(folder: Path, teachers: int, *, width: int) -> None:
    """Write teachers of noise: the store, and beside it the same ones as buffers."""
    from ftd_lightning.files.trajectory_store import write_teacher

    network = ConvNet(3, 10, 32, width=width)
    size = len(flatten_parameters(network))
    shapes = [p.shape for p in network.parameters()]
    for teacher in range(teachers):
        generator = make_generator("teacher of noise", teacher)
        snapshots = [torch.randn(size, generator=generator) for _ in range(EPOCHS + 1)]
        write_teacher(folder / "store", teacher, snapshots, {"network": {"name": "noise"}})
        lists = [
            [part.view(shape).clone() for part, shape in zip(s.split([h.numel() for h in shapes]), shapes, strict=True)]
            for s in snapshots
        ]
        (folder / "buffers").mkdir(exist_ok=True)
        torch.save(lists, folder / "buffers" / f"buffer_{teacher:04d}.pt")


def _draws(teachers: int) -> list[int]:
    return torch.randint(teachers, (DRAWS,), generator=make_generator("draws")).tolist()


def read_store(folder: str) -> dict[str, float]:
    """Open the store and read segments; seconds and MiB."""
    # Here, before anything is measured: it brings Lightning along, which readers of buffers need not wait for.
    from ftd_lightning.files.trajectory_store import TrajectoryStore

    torch.set_num_threads(1)  # copying 2 MiB: waking a second thread would be most of the time
    before, began = resident(), time.perf_counter()
    store = TrajectoryStore(Path(folder) / "store")
    opened = time.perf_counter() - began
    seconds, check = [], 0.0
    for teacher in _draws(len(store)):
        began = time.perf_counter()
        start, target = store.segment(teacher, 0, EPOCHS)
        check += float((start - target).sum())  # every value is looked at: a mapped page counts when it is touched
        seconds.append(time.perf_counter() - began)
    return {"open": opened, "segment": median(seconds), "memory": resident() - before, "check": check}


def read_buffers(folder: str) -> dict[str, float]:
    """Load the buffers whole and draw segments from them; seconds and MiB."""
    torch.set_num_threads(1)  # copying 2 MiB: waking a second thread would be most of the time
    before, began = resident(), time.perf_counter()
    buffers = [torch.load(path) for path in sorted((Path(folder) / "buffers").glob("*.pt"))]
    opened = time.perf_counter() - began
    seconds, check = [], 0.0
    for teacher in _draws(len(buffers)):
        began = time.perf_counter()
        start, target = (torch.cat([p.reshape(-1) for p in buffers[teacher][epoch]]) for epoch in (0, EPOCHS))
        check += float((start - target).sum())
        seconds.append(time.perf_counter() - began)
    return {"open": opened, "segment": median(seconds), "memory": resident() - before, "check": check}


def compare(teachers: int, repeats: int, *, width: int = 128) -> list[Row]:
    """Measure both, every time in a process of its own, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), teachers, width=width)
        pairs = [
            [in_process(f"store:{name}", folder=folder) for name in ("read_store", "read_buffers")]
            for _ in range(repeats)
        ]
    assert all(ours["check"] == theirs["check"] for ours, theirs in pairs), "both sides must read the same weights"
    case = f"{teachers} teachers of {EPOCHS} epochs"
    quantities = {
        "memory": ("memory held", "MiB", 1),
        "open": ("time to open", "ms", 1000),
        "segment": ("time of a segment", "ms", 1000),
    }
    return [
        Row("store", case, what, unit, *([factor * pair[side][key] for pair in pairs] for side in (0, 1)))
        for key, (what, unit, factor) in quantities.items()
    ]


def run(scale: str, repeats: int, **_: object) -> Result:
    """Measure at a scale."""
    size = SIZES["quick" if scale == "quick" else "normal"]
    rows = [row for teachers in size["teachers"] for row in compare(teachers, repeats, width=size["width"])]
    remark = (
        "store: a draw from buffers in memory is faster and meant to be; a real teacher of 50 epochs takes 62 MiB of "
        "such memory, 100 of them 6 GiB"
    )
    return Result(rows, [remark])
