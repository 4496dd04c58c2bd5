"""Measure this library beside plain loops, in turns, and print the ratios of neighbouring pairs with their range.

    make bench
    PYTHONPATH=tests python -m benchmarks.run [--parts teacher matching evaluation host] [--quick]

What else the machine does meets both sides alike when they take turns. Both sides see the same weights, images,
mini-batches and augmentations, in float32 where bf16 is not named. The library is measured in eager mode and compiled;
the first run of each path, in which a compiler compiles, is not counted. ``--allocator system`` measures both sides
with malloc as it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.host import host_pairs
from benchmarks.reference import Batches, gsam_epoch, matching_loss, sample_loader, train_network
from ftd_lightning import DistillationDataModule, FlatTeacher
from ftd_lightning.cli import keep_freed_memory
from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.functional import (
    derive_seed,
    dsa,
    flatten_parameters,
    make_generator,
    seeded,
    trajectory_matching_loss,
)
from ftd_lightning.models import ConvNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LR, RHO, ALPHA, BATCH = 0.01, 0.01, 1.0, 256
SIZES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    # (images, width)
    "teacher": {"quick": [(512, 16)], "cpu": [(1024, 32), (512, 128)], "cuda": [(50_000, 32), (50_000, 128)]},
    # (images per class, width, inner steps)
    "matching": {
        "quick": [(1, 16, 2), (1, 16, 6)],
        "cpu": [(1, 32, 30), (1, 128, 15), (10, 32, 5), (10, 128, 5)],
        "cuda": [(1, 128, 5), (1, 128, 30), (10, 128, 30), (50, 128, 30)],
    },
    # (images per class, width, epochs of a turn)
    "evaluation": {
        "quick": [(1, 16, 3)],
        "cpu": [(1, 32, 20), (1, 128, 6), (10, 32, 6), (10, 128, 2)],
        "cuda": [(1, 32, 300), (1, 128, 300), (10, 32, 300), (10, 128, 300)],
    },
    "host": {"quick": [(10,)], "cpu": [(150,)], "cuda": [(150,)]},  # (steps of an epoch,)
}


@dataclass
class Row:
    """Costs of the library and of the plain loop, pair by pair."""

    case: str
    quantity: str
    ours: list[float]
    reference: list[float]

    def line(self) -> str:
        """Format a line of the table."""
        ratios = [ours / other for ours, other in zip(self.ours, self.reference, strict=True) if other > 0]
        if not ratios:
            return f"| {self.case} | {self.quantity} | - | - | - |"
        sides = f"{median(self.ours):.4g} | {median(self.reference):.4g}"
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} pairs"
        return f"| {self.case} | {self.quantity} | {sides} | {spread} |"


class Clock:
    """Measures seconds of a piece of work, with all that it started on the GPU."""

    def __init__(self, name: str) -> None:
        self.now = CLOCKS[name]

    def __call__(self, work: Callable[[], Any]) -> float:
        """Give the seconds that a call takes."""
        self.wait()
        began = self.now()
        work()
        self.wait()
        return self.now() - began

    @staticmethod
    def wait() -> None:
        """Wait for the device."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()


def in_turns(works: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each once a round, in turned order every other round, and collect the results.

    The order is turned because the first after a pause finds another clock frequency and other caches.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            found[name].append(works[name]())
    return found


# A step of matching: the adjoint beside the graph of all inner steps.


class Problem(NamedTuple):
    """Arguments of a matching loss."""

    network: nn.Module
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    step_size: Tensor


def problem(ipc: int, *, image_size: int = 32, **network: int) -> Problem:
    """Make a student at its initialisation, a target near it and ipc images of noise for each of 10 classes."""
    with seeded(0, "matching benchmark"):
        student = ConvNet(3, 10, image_size, **network).to(DEVICE)
        start = flatten_parameters(student)
        target = start + 0.01 * torch.randn(start.shape).to(DEVICE)
        images = torch.randn(10 * ipc, 3, image_size, image_size).to(DEVICE).requires_grad_()
    labels = torch.arange(10, device=DEVICE).repeat_interleave(ipc)
    return Problem(student, start, target, images, labels, torch.tensor(0.01, device=DEVICE, requires_grad=True))


def matching_step(method: str, case: Problem, steps: int) -> Tensor:
    """Run forward and backward by "ours", "compiled", "compiled bf16" or "reference"; give the loss."""
    case.images.grad = case.step_size.grad = None
    batches = [torch.arange(len(case.images), device=DEVICE)] * steps
    if method == "reference":
        loss = matching_loss(*case, batches=batches, augment=lambda x, i: dsa(x, make_generator(0, "inner", i)))
    else:
        options: dict[str, Any] = {
            "compile": "compiled" in method,
            "precision": "bf16" if "bf16" in method else "float32",
        }
        loss = trajectory_matching_loss(*case, batches=batches, augment=dsa, **options)
    loss.backward()
    return loss.detach()


def print_added_memory(method: str, ipc: int, width: int, steps: int) -> None:
    """Print the MiB that a step adds at its peak to those held before: resident on a CPU, allocated on CUDA."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))

    case = problem(ipc, width=width)
    matching_step(method, case, 1)  # what libraries allocate once is no part of a step
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        matching_step(method, case, steps)
        print(torch.cuda.max_memory_allocated() / 2**20 - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    matching_step(method, case, steps)
    print(status("VmHWM") - before)


def measure_matching(sizes: Sequence[tuple[int, ...]], repeats: int, clock: Clock) -> list[Row]:
    """Time steps in turns in this process; measure the memory of each method in a process of its own."""
    from processes import Running

    rows = []
    for ipc, width, steps in sizes:
        case, name = problem(ipc, width=width), f"matching, ipc {ipc}, width {width}, {steps} inner steps"
        paths = ("ours", "compiled", "compiled bf16")
        works = {m: partial(matching_step, m, case, steps) for m in (*paths, "reference")}
        in_turns({name: partial(clock, work) for name, work in works.items()}, 1)
        seconds = in_turns({name: partial(clock, work) for name, work in works.items()}, repeats)
        rows += [Row(name, f"seconds, {m}", seconds[m], seconds["reference"]) for m in paths]
        ran = [Running(print_added_memory, m, ipc, width, steps).wait(3600) for m in ("ours", "reference")]
        if not any(done.returncode for done in ran):
            rows.append(Row(name, "added MiB", *([float(done.stdout)] for done in ran)))
    return rows


# Teachers: epochs of GSAM through Lightning's Trainer beside the plain loop.


def noise(images: int, *, image_size: int = 32) -> DistillationDataModule:
    """Make a data set of random pictures in [0, 1] in 10 classes, equally many of each."""
    pictures = torch.rand(images, 3, image_size, image_size, generator=make_generator("noise"))
    train = TensorDataset(pictures, torch.arange(images) % 10)
    test = TensorDataset(pictures[:10], torch.arange(10))
    return DistillationDataModule.from_datasets(train, test, batch_size=BATCH, val_fraction=0.0)


class InTurns(Callback):
    """Runs and times an epoch of the reference before each of ours."""

    def __init__(self, reference: Callable[[int], object], clock: Clock) -> None:
        self.run_reference, self.clock = reference, clock
        self.ours: list[float] = []
        self.reference: list[float] = []
        self._began: float | None = None

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.on_train_end(trainer, pl_module)
        self.reference.append(self.clock(partial(self.run_reference, trainer.current_epoch)))
        self._began = self.clock.now()

    def on_train_end(self, trainer, pl_module) -> None:
        if self._began is not None:
            self.clock.wait()
            self.ours.append(self.clock.now() - self._began)


TEACHER_PATHS: dict[str, dict[str, Any]] = {
    "ours": {"compile": False},
    "compiled": {"compile": True},
    "compiled, bf16": {"compile": True, "precision": "bf16"},
}


def fit_teacher(
    data: DistillationDataModule, callbacks: list[Callback], *, epochs: int, path: str = "ours", **network: int
) -> FlatTeacher:
    """Train a teacher through the Trainer, with nothing recorded and nothing validated."""
    gsam = {"lr": LR, "rho": RHO, "alpha": ALPHA}
    module = FlatTeacher(network_options=network, teachers=1, epochs=epochs, **gsam, **TEACHER_PATHS[path])
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        options: dict[str, Any] = {"num_sanity_val_steps": 0, "limit_val_batches": 0, "default_root_dir": folder}
        trainer = Trainer(accelerator=DEVICE, devices=1, max_epochs=-1, callbacks=callbacks, **silent, **options)
        trainer.fit(module, datamodule=data)
    return module


def plain_teacher(network: nn.Module, epoch_batches: Callable[[int], Iterable[Any]]) -> Callable[[int], object]:
    """Give a function that trains the network for one epoch of the plain loop, with DSA as FlatTeacher draws it."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def epoch(number: int) -> object:
        def augment(images: Tensor, step: int) -> Tensor:
            return dsa(images, make_generator(0, "dsa", number, step, 0))

        return gsam_epoch(network, epoch_batches(number), optimizer, rho=RHO, alpha=ALPHA, augment=augment)

    return epoch


def measure_teacher(sizes: Sequence[tuple[int, ...]], repeats: int, clock: Clock) -> list[Row]:
    """Time epochs in turns within one fit for each path."""
    torch.set_float32_matmul_precision("high")  # as `ftd fit` does; for both sides
    rows = []
    for images, width in sizes:
        data = noise(images)
        data.setup()
        loader = sample_loader(*data.part("train"), batch_size=BATCH)
        for path in TEACHER_PATHS:
            plain = ConvNet(3, 10, 32, width=width).to(DEVICE)
            turns = InTurns(plain_teacher(plain, lambda epoch, loader=loader: loader), clock)
            fit_teacher(data, [turns], epochs=repeats + 1, path=path, width=width)
            case = f"teacher, {images} images, width {width}"
            rows.append(Row(case, f"seconds of an epoch, {path}", turns.ours[1:], turns.reference[1:]))
    return rows


# Evaluation: five networks trained on a synthetic set, beside one after the other.


def draw(index: int, images: Tensor, epoch: int, step: int) -> Tensor:
    """Augment as ``train_fresh_networks`` does for a network, with seed 0."""
    return dsa(images, make_generator(derive_seed(0, "dsa", index, epoch, step)))


def one_after_the_other(networks: list[nn.Module], epoch_batches: Callable[[int], Batches], *, epochs: int) -> None:
    """Train the networks in place."""
    for index, network in enumerate(networks):
        train_network(network, epoch_batches, epochs=epochs, lr=LR, augment=partial(draw, index))


def measure_evaluation(sizes: Sequence[tuple[int, ...]], repeats: int, clock: Clock) -> list[Row]:
    """Time all paths in turns, each time from the same fresh networks."""
    rows = []
    for ipc, width, epochs in sizes:
        with seeded(0, "evaluation benchmark"):
            images = torch.randn(10 * ipc, 3, 32, 32)
            fresh = [ConvNet(3, 10, 32, width=width).to(DEVICE) for _ in range(5)]
        labels = torch.arange(10).repeat_interleave(ipc)
        loader = sample_loader(images, labels, batch_size=BATCH)
        protocol = partial(EvaluationProtocol, lr=LR, batch_size=BATCH)
        # One for all turns of a path: what it compiles is compiled once.
        losses = {path: IndependentLosses(path == "compiled", torch.device(DEVICE)) for path in ("ours", "compiled")}

        def work(path: str, epochs: int) -> float:
            students = copy.deepcopy(fresh)  # noqa: B023
            if path == "reference":
                return clock(lambda: one_after_the_other(students, lambda epoch: loader, epochs=epochs))  # noqa: B023
            data = images.to(DEVICE), labels.to(DEVICE)  # noqa: B023
            settings = {"protocol": protocol(epochs=epochs), "losses": losses[path]}  # noqa: B023
            return clock(lambda: train_fresh_networks(students, *data, **settings))

        paths = (*losses, "reference")
        in_turns({path: partial(work, path, 1) for path in paths}, 1)
        found = in_turns({path: partial(work, path, epochs) for path in paths}, repeats)
        case = f"evaluation, 5 networks, ipc {ipc}, width {width}"
        rows += [Row(case, f"seconds of {epochs} epochs, {path}", found[path], found["reference"]) for path in losses]
    return rows


def measure_host(sizes: Sequence[tuple[int, ...]], repeats: int, clock: Clock) -> list[Row]:
    """Measure CPU seconds, whatever the clock: the host's share of a step is what counts."""
    rows = []
    for (steps,) in sizes:
        host_pairs(10, 1)  # what is done once in a process
        for path, pairs in host_pairs(steps, repeats).items():
            empty, ours = zip(*pairs, strict=True)
            rows.append(Row(f"host, {steps} steps of a teacher beside empty ones", path, list(ours), list(empty)))
    return rows


PARTS = {
    "teacher": measure_teacher,
    "matching": measure_matching,
    "evaluation": measure_evaluation,
    "host": measure_host,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it with all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all, if not given")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of every comparison")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the report")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds that the process computed")
    parser.add_argument("--allocator", choices=["ftd", "system"], default="ftd", help="of both sides: set as by `ftd`?")
    options = parser.parse_args(arguments)
    if options.allocator == "ftd":
        keep_freed_memory()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    head = f"On {device}, {torch.get_num_threads()} threads; {versions}; {options.clock} clock; "
    head += f"allocator of {options.allocator}; medians.\n\n"
    head += "| case | quantity | ours | plain loop | ours / plain loop |\n|---|---|---|---|---|\n"
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in options.parts:
        began = time.perf_counter()
        sizes = SIZES[part]["quick" if options.quick else DEVICE]
        rows += PARTS[part](sizes, options.repeats, Clock(options.clock))
        print(f"{part}: measured in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        table = head + "\n".join(row.line() for row in rows) + "\n"
        (options.output / "benchmark.md").write_text(table)
        (options.output / "benchmark.json").write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
    print(table)


if __name__ == "__main__":
    main()
