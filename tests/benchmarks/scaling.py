"""Scaling: seconds and memory against images per class, inner steps, classes, teachers in the store, and ranks.

Every point of every curve is a process of its own. Curves show growth and no ratio: their points do not take turns.
Matching steps are in eager mode; the memory that one adds is that of its images, its weights and all that the step
allocates. Ranks are processes of DDP on this machine, which share its cores and train the same teachers among them.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import store
from benchmarks.matching import problem, step
from benchmarks.measure import DEVICE, Result, timed
from benchmarks.processes import NO_MEMORY, held, in_process, peak, stay_within_free_memory

CURVES = {"ours": "adjoint", "reference": "full graph"}
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"width": 8, "ipc": (1, 2), "steps": (1, 2), "classes": (2, 4), "teachers": (1, 2), "ranks": (1,)},
    "normal": {
        "width": 16,
        "ipc": (1, 5, 10, 20),
        "steps": (5, 20, 40, 80),
        "classes": (2, 10, 50, 100),
        "teachers": (1, 50, 200),
        "ranks": (1, 2, 4),
    },
}
# Of a case where another quantity grows.
BASE = {"ipc": 1, "steps": 5, "classes": 10}
TEACHERS = 4  # that all ranks train among them
IMAGES = 512  # of an epoch of each


def matching_point(
    method: str, *, ipc: int, steps: int, classes: int, width: int, repeats: int, image_size: int = 32
) -> dict[str, Any]:
    """Seconds of a matching step, and MiB that it and its problem add to this process."""
    if DEVICE == "cpu":
        stay_within_free_memory()
    # What libraries allocate and set up once is no part of a step.
    step(method, problem(1, image_size=image_size, width=4), 1)
    before = held()
    case = problem(ipc, image_size=image_size, classes=classes, width=width)
    seconds = [timed(partial(step, method, case, steps)) for _ in range(repeats)]
    return {"seconds": median(seconds), "mib": peak() - before, "each": seconds}


def ranks_point(ranks: int, *, teachers: int, images: int, width: int, image_size: int = 32) -> dict[str, Any]:
    """Seconds of training the teachers on so many ranks, and peak MiB of all ranks' processes together."""
    # Here: they bring Lightning along, which the other points do without.
    from lightning.pytorch import Callback

    from benchmarks import teacher

    found: dict[str, Any] = {}

    class Usage(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            held()
            self.began = time.perf_counter()

        def on_train_end(self, trainer, pl_module) -> None:
            own = (time.perf_counter() - self.began, peak())
            every: list[Any] = [own] * ranks
            if ranks > 1:
                torch.distributed.all_gather_object(every, own)
            # Every rank prints this, so whichever comes last will do.
            found.update(seconds=max(s for s, _ in every), mib=sum(m for _, m in every), each=every)

    data = teacher.noise(images, image_size=image_size)
    teacher.fit(data, Usage(), epochs=1, compile=False, teachers=teachers, ranks=ranks, width=width)
    return found


def _point(curve: str, x: int, answer: dict[str, Any]) -> dict[str, Any]:
    return {"curve": curve, "x": x, **({"seconds": None, "mib": None} if answer == NO_MEMORY else answer)}


def matching_panel(quantity: str, values: tuple[int, ...], width: int, repeats: int) -> dict[str, Any]:
    """Matching steps where one of ``BASE`` grows."""
    points = [
        _point(CURVES[method], x, in_process("scaling:matching_point", method=method, repeats=repeats, **case))
        for x in values
        for case in [{**BASE, quantity: x, "width": width}]
        for method in CURVES
    ]
    fixed = ", ".join(f"{value} {name}" for name, value in BASE.items() if name != quantity)
    fixed = fixed.replace("1 ipc", "ipc 1").replace("5 steps", "5 inner steps")
    labels = {"seconds": "time of a matching step", "mib": "memory added by it"}
    return {"title": f"matching, {fixed}", **labels, "curves": list(CURVES.values()), "points": points}


def store_panel(values: tuple[int, ...], width: int) -> dict[str, Any]:
    """Stores of more and more teachers, and as many whole buffers."""
    points = []
    for teachers in values:
        with tempfile.TemporaryDirectory() as folder:
            store.write(Path(folder), teachers, width=width)
            for curve, function in (("store", "read_store"), ("whole buffers", "read_buffers")):
                found = in_process(f"store:{function}", folder=folder)
                answer = {"seconds": found["open"] + found["segment"], "mib": found["memory"], "each": found}
                points.append(_point(curve, teachers, answer))
    labels = {"seconds": "time to open, and of a segment", "mib": "memory held"}
    title = f"store, teachers of {store.EPOCHS} epochs"
    return {"title": title, **labels, "curves": ["store", "whole buffers"], "points": points}


def ranks_panel(values: tuple[int, ...], width: int) -> dict[str, Any]:
    """The same teachers on more and more ranks."""
    size = {"teachers": TEACHERS, "images": IMAGES, "width": width}
    points = [_point("flat teachers", x, in_process("scaling:ranks_point", ranks=x, **size)) for x in values]
    labels = {"seconds": "time of all", "mib": "peak of all processes"}
    title = f"{TEACHERS} teachers, {IMAGES} images"
    return {"title": title, **labels, "curves": ["flat teachers"], "points": points}


def run(scale: str, repeats: int, **_: object) -> Result:
    """Measure at a scale: no rows, but the panels of a picture."""
    size = SIZES["quick" if scale == "quick" else "normal"]
    width = size["width"]
    names = {"ipc": "images per class", "steps": "inner steps", "classes": "classes"}
    panels = {name: matching_panel(key, size[key], width, repeats) for key, name in names.items()}
    panels["teachers in the store"] = store_panel(size["teachers"], width)
    possible = [ranks for ranks in size["ranks"] if DEVICE == "cpu" or ranks <= torch.cuda.device_count()]
    panels["ranks"] = ranks_panel(tuple(possible), width)
    remark = f"scaling: width {width}; the curves are in scaling.png, their figures in benchmark.json"
    return Result([], [remark], {"panels": panels})
