"""One matching step, forward and backward: the adjoint gradient beside the graph of all inner steps.

Both see the same weights, images, mini-batches (all images at every step, as for CIFAR-10) and augmentations, in
float32, and give the same loss and gradients up to rounding. "Added" is what the step puts on top of what the process
held before it, "peak" all that it held. Memory is that of a process which takes one step by one method; times are of
steps in turns within a process, after a first one in which a compiler compiles. A side that runs out of memory is
reported so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import DEVICE, Result, Row, in_turns, timed
from benchmarks.processes import NO_MEMORY, held, in_process, peak, stay_within_free_memory
from benchmarks.reference import matching_loss
from ftd_lightning.functional import (
    dsa,
    flatten_parameters,
    make_generator,
    seeded,
    trajectory_matching_loss,
)
from ftd_lightning.models import ConvNet

STEPS = (5, 15, 30, 80)
# (images per class, width, inner steps). Two CPU cores take minutes for a step of 500 images at the paper's width.
GRIDS: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {
    "quick": [(1, 16, (2, 6))],
    "cpu": [(1, 32, (30,)), (1, 128, (15,)), (10, 32, (5,)), (10, 128, (5,))],
    "full": [(1, 128, STEPS), (10, 128, STEPS), (50, 128, STEPS)],
    "short": [(1, 128, (5, 30)), (10, 128, (30,))],  # minutes on a GPU
}
ITERATIONS = 5000  # of a distillation of full length, for which "auto" decides
METHODS = ("ours", "compiled", "reference")


class Problem(NamedTuple):
    """Arguments of a matching loss."""

    network: nn.Module
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    step_size: Tensor


def problem(ipc: int, *, image_size: int = 32, classes: int = 10, **network: int) -> Problem:
    """A student at the initialisation, a target near it and ipc images of noise for each class."""
    with seeded(0, "matching benchmark"):
        student = ConvNet(3, classes, image_size, **network).to(DEVICE)
        start = flatten_parameters(student)
        target = start + 0.01 * torch.randn(start.shape).to(DEVICE)
        images = torch.randn(classes * ipc, 3, image_size, image_size).to(DEVICE).requires_grad_()
    labels = torch.arange(classes, device=DEVICE).repeat_interleave(ipc)
    return Problem(student, start, target, images, labels, torch.tensor(0.01, device=DEVICE, requires_grad=True))


def loss_of(method: str, case: Problem, steps: int) -> Tensor:
    """The loss by a method, of METHODS, with DSA as ours draws it for seed 0."""
    batches = [torch.arange(len(case.images), device=DEVICE)] * steps
    if method == "reference":
        return matching_loss(*case, batches=batches, augment=lambda x, i: dsa(x, make_generator(0, "inner", i)))
    return trajectory_matching_loss(*case, batches=batches, augment=dsa, compile=method == "compiled")


def step(method: str, case: Problem, steps: int) -> None:
    """Forward and backward."""
    case.images.grad = case.step_size.grad = None
    loss_of(method, case, steps).backward()


def memory(method: str, ipc: int, steps: int, width: int) -> dict[str, float]:
    """MiB of one step in this process."""
    if DEVICE == "cpu":
        stay_within_free_memory()
    case = problem(ipc, width=width)
    step(method, case, 1)  # what libraries allocate once is no part of a step
    before = held()
    step(method, case, steps)
    return {"peak": peak(), "added": peak() - before}


def times(methods: list[str], ipc: int, steps: int, width: int, repeats: int) -> dict[str, Any]:
    """Seconds of steps in turns in this process."""
    case = problem(ipc, width=width)
    for method in methods:
        step(method, case, min(steps, 2))
    works: dict[str, Callable[[], float]] = {m: partial(timed, partial(step, m, case, steps)) for m in methods}
    return {"seconds": in_turns(works, repeats)}


def compare(
    ipc: int, width: int, steps: int, repeats: int, *, compiled: bool, processes: int
) -> tuple[Result, dict[str, Any]]:
    """Measure one case: rows, and the figures of the plot."""
    methods = [m for m in METHODS if m != "compiled" or compiled]
    case = {"ipc": ipc, "width": width, "steps": steps}
    # On a CPU compiling first would take as long again for every figure.
    measured = [m for m in methods if m != "compiled" or DEVICE == "cuda"]
    used = in_turns_of_processes(measured, case, min(processes, repeats))
    able = [m for m in methods if used.get(m, used["ours"])]
    taken = in_process("matching:times", methods=able, repeats=repeats, **case)
    seconds = {m: taken["seconds"].get(m, []) for m in methods}
    name, result = f"ipc {ipc}, width {width}, {steps} inner steps", Result([])
    for method in methods[:-1]:
        which = "" if method == "ours" else ", compiled"
        result.rows.append(Row("matching", name, f"time{which}", "s", seconds[method], seconds["reference"]))
        for key in ("added", "peak") if method in used else ():
            sides = [[run[key] for run in used[m]] for m in (method, "reference")]
            result.rows.append(Row("matching", name, f"{key} memory{which}", "MiB", *sides))
    return result, {**case, "memory": used, **taken, "seconds": seconds}


def in_turns_of_processes(methods: list[str], case: dict[str, int], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Memory of each method; an empty list for one that ran out of it."""
    used: dict[str, list[dict[str, float]]] = {m: [] for m in methods}
    for _ in range(repeats):
        for method in methods:
            answer = in_process("matching:memory", method=method, **case)
            if answer != NO_MEMORY:
                used[method].append(answer)
    return {m: runs if len(runs) == repeats else [] for m, runs in used.items()}


def run(scale: str, repeats: int, *, compiled: bool = False) -> Result:
    """Measure a grid; on CUDA the full one unless a smaller one is named, always compiled and not."""
    grid = "full" if scale == "normal" and DEVICE == "cuda" else "cpu" if scale == "normal" else scale
    # A peak moves by a few pages from one process to the next: two of each show that.
    processes = 1 if grid == "cpu" else 2
    result = Result([], details={"cases": []})
    for ipc, width, all_steps in GRIDS[grid]:
        for steps in all_steps:
            found, figures = compare(ipc, width, steps, repeats, compiled=compiled, processes=processes)
            result.add(found)
            result.details["cases"].append(figures)
    return result
