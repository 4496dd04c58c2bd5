"""Print how many times as fast this library is as plain loops in eager float32: the seconds of theirs over its own.

    make bench
    PYTHONPATH=tests python -m benchmarks.run [--parts teacher matching decoders memory evaluation host] [--quick]

Both sides take turns, because what else the machine does then meets both alike. They see the same weights, images,
mini-batches and augmentations, in one process with the allocator as ``ftd`` sets it. "As it is run": the plain loop has
a process of its own, with the C library's defaults. Seconds are those that a process computed; with a GPU, those of the
clock. The first run of each, in which a compiler compiles, is not counted.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning.pytorch import Callback
from processes import FORKED
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.host import host_pairs
from benchmarks.reference import Batches, gsam_epoch, matching_loss, sample_loader, train_network
from ftd_lightning import DistillationDataModule, FlatTeacher
from ftd_lightning.cli import keep_freed_memory
from ftd_lightning.contracts import ImageShape
from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.core.module import computes_bf16
from ftd_lightning.decoders import Bases, Decoder, Flip, Frequencies, Gaussians, MultiFormation
from ftd_lightning.functional import (
    chunked_permutations,
    derive_seed,
    dsa,
    flatten_parameters,
    make_generator,
    seeded,
    trajectory_matching_loss,
)
from ftd_lightning.lightning_cli import run as lightning_cli
from ftd_lightning.models import ConvNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("float32", "bf16") if computes_bf16(torch.device(DEVICE)) else ("float32",)
LR, RHO, ALPHA, BATCH = 0.01, 0.01, 1.0, 256  # of the config cifar10/teacher_ftd

Pair = tuple[float, float]  # what the plain loop and this library take


class Row(NamedTuple):
    """A line of the table: pairs by this library's precision, and the seconds of its longest first run."""

    case: str
    pairs: dict[str, list[Pair]]
    first: float

    def line(self) -> str:
        """Format it."""
        plain = median(plain for pairs in self.pairs.values() for plain, _ in pairs)
        ratios = [[plain / ours for plain, ours in self.pairs.get(precision, [])] for precision in PRECISIONS]
        cells = [f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})" if r else "-" for r in ratios]
        return " | ".join([f"| {self.case}", f"{plain:.3g}", *cells, f"{self.first:.0f}"]) + " |"


def now() -> float:
    """Return the seconds that this process has computed; with a GPU those of the clock, when the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work: Callable[[], Any]) -> float:
    """Measure a call."""
    began = now()
    work()
    return now() - began


def in_turns(case: str, plain: Callable[[], Any], ours: dict[str, Callable[[], Any]], repeats: int) -> Row:
    """Call all once, and then time them round by round.

    Every other round is in reverse, because the first after a pause finds another clock frequency and other caches.
    """
    works, pairs, first = {"plain": plain, **ours}, {name: list[Pair]() for name in ours}, 0.0
    for work in works.values():
        began = time.perf_counter()
        work()
        first = max(first, time.perf_counter() - began)
    for turn in range(repeats):
        took = {name: seconds(works[name]) for name in list(works)[:: -1 if turn % 2 else 1]}
        for name in ours:
            pairs[name].append((took["plain"], took[name]))
    return Row(case, pairs, first)


def other_process() -> ProcessPoolExecutor:
    """Start a process with the C library's allocator as it is."""
    process = ProcessPoolExecutor(1, mp_context=FORKED)
    with mock.patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}):  # which it would run again
        process.submit(int).result()
    return process


def result_of(process: ProcessPoolExecutor, function: Callable[..., float], *arguments: Any) -> float:
    """Call a function in another process."""
    return process.submit(function, *arguments).result()


# Teachers: the steps of an epoch of a shipped config, beside the plain loop.


def noise(images: int, *, image_size: int = 32) -> DistillationDataModule:
    """Make a data set of random pictures in [0, 1] in 10 classes, equally many of each."""
    pictures = torch.rand(images, 3, image_size, image_size, generator=make_generator("noise"))
    train = TensorDataset(pictures, torch.arange(images) % 10)
    test = TensorDataset(pictures[:10], torch.arange(10))
    data = DistillationDataModule.from_datasets(train, test, batch_size=BATCH, val_fraction=0.0)
    data.setup()
    return data


def fit_teacher(data: DistillationDataModule, callbacks: Sequence[Callback], *arguments: str) -> FlatTeacher:
    """Fit a teacher of the shipped config, with further arguments of ``ftd fit``."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--model.teachers=1", "--trainer.enable_progress_bar=false"]
        settings += [f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.accelerator={DEVICE}", *arguments]
        cli = lightning_cli(["--config", "cifar10/teacher_ftd", *settings], start=False)
        cli.trainer.callbacks[:0] = callbacks
        cli.trainer.fit(cli.model, datamodule=data)
    return cli.model


def plain_teacher(network: nn.Module, epoch_batches: Callable[[int], Iterable[Any]]) -> Callable[[int], object]:
    """Give a function that trains the network for one epoch of the plain loop, with DSA as FlatTeacher draws it."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)

    def epoch(number: int) -> object:
        def augment(images: Tensor, step: int) -> Tensor:
            return dsa(images, make_generator(0, "dsa", number, step, 0))

        return gsam_epoch(network, epoch_batches(number), optimizer, rho=RHO, alpha=ALPHA, augment=augment)

    return epoch


@cache  # a teacher is trained by one call after the other, here or in another process
def plain_teacher_of_noise(images: int, width: int) -> Callable[[int], object]:
    """Begin a teacher of the plain loop."""
    loader = sample_loader(*noise(images).part("train"), batch_size=BATCH)
    return plain_teacher(ConvNet(3, 10, 32, width=width).to(DEVICE), lambda epoch: loader)


def plain_epoch(images: int, width: int, epoch: int) -> float:
    """Train it for an epoch, and give the seconds."""
    return seconds(partial(plain_teacher_of_noise(images, width), epoch))


class InTurns(Callback):
    """Has an epoch of the plain loop run before each of ours, and times the steps of ours."""

    def __init__(self, plain: Callable[[int], float]) -> None:
        self.plain, self.pairs, self.first = plain, list[Pair](), 0.0

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.took = self.plain(trainer.current_epoch)
        self.began, self.clock = now(), time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.pairs.append((self.took, now() - self.began))
        self.first = self.first or time.perf_counter() - self.clock


def measure_teacher(quick: bool, repeats: int) -> Iterator[Row]:
    """Compare epochs within one fit for each precision."""
    images = 300 if quick else 50_000 if DEVICE == "cuda" else 512
    with other_process() as other:
        for width, as_run in [(4, True)] if quick else [(128, False), (128, True), (32, True)]:
            plain = partial(plain_epoch, images, width)
            fits = {
                precision: InTurns(partial(result_of, other, plain) if as_run else plain) for precision in PRECISIONS
            }
            for precision, turns in fits.items():
                settings = [f"--model.epochs={repeats + 1}", f"--model.precision={precision}"]
                settings += [f"--model.network_options.width={width}", f"--model.compile={not quick}"]
                fit_teacher(noise(images), [turns], *settings)
            case = f"flat teacher, width {width}, {'each as it is run' if as_run else 'compiled'}"
            pairs = {precision: turns.pairs[1:] for precision, turns in fits.items()}
            yield Row(case, pairs, max(turns.first for turns in fits.values()))


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


def matching_step(case: Problem, steps: int, **ours: Any) -> Tensor:
    """Run forward and backward, with options of ``trajectory_matching_loss`` or, without any, by the plain loop."""
    case.images.grad = case.step_size.grad = None
    batches = [torch.arange(len(case.images), device=DEVICE)] * steps
    if ours:
        loss = trajectory_matching_loss(*case, batches=batches, augment=dsa, **ours)
    else:
        loss = matching_loss(*case, batches=batches, augment=lambda x, i: dsa(x, make_generator(0, "inner", i)))
    loss.backward()
    return loss.detach()


def measure_matching(quick: bool, repeats: int) -> Iterator[Row]:
    """Compare steps."""
    for width, steps, precisions in [(4, 2, PRECISIONS)] if quick else [(128, 15, PRECISIONS), (32, 10, ["float32"])]:
        step = partial(matching_step, problem(1, width=width), steps)
        ours = {precision: partial(step, compile=not quick, precision=precision) for precision in precisions}
        yield in_turns(f"matching step, width {width}, ipc 1, {steps} inner steps, compiled", step, ours, repeats)


# Decoders: a step of matching from their parameters, beside one from as many images.

DECODERS = [Flip(), MultiFormation(2), Frequencies(64), Gaussians(22, fit_steps=1), Bases(16, 2)]


def decoded_problem(decoder: Decoder, width: int) -> Problem:
    """Make a problem of the images that the numbers of one image for each class are decoded to."""
    case = problem(decoder.images_per_class(1, ImageShape(3, 10, 32)), width=width)
    decoder.fit(case.images.detach(), case.labels)
    return case._replace(network=student_of(width))


@cache  # it compiles once for each size of a mini-batch
def student_of(width: int) -> nn.Module:
    """Build the student of all decoders."""
    return problem(1, width=width).network


def decoded_step(case: Problem, decoder: Decoder | None, steps: int, *, compile: bool) -> None:  # noqa: A002
    """Match with 40 images in each inner step: the parameters' gradient, or without a decoder the images'."""
    learned = [case.images]
    if decoder is not None:
        codes = {name: value.clone() for name, value in decoder.parameters().items()}
        learned = [value.requires_grad_() for value in codes.values() if value.is_floating_point()]
        case = case._replace(images=decoder.decode(codes))
    batches = chunked_permutations(len(case.labels), steps, make_generator("batches"), batch_size=40)
    loss = trajectory_matching_loss(*case, batches=batches, augment=dsa, compile=compile)
    torch.autograd.grad(loss, learned)


def measure_decoders(quick: bool, repeats: int) -> Iterator[Row]:
    """Compare steps; ``tests/test_stand_in.py`` compares their memory."""
    width, steps = (4, 2) if quick else (32, 30)
    for decoder in DECODERS:
        case, name = decoded_problem(decoder, width), f"{steps} inner steps, width {width}, with {decoder.name}"
        plain, ours = (partial(decoded_step, case, part, steps, compile=not quick) for part in (None, decoder))
        yield in_turns(f"matching step of {name} beside without, compiled", plain, {"float32": ours}, repeats)


def added_memory(width: int, steps: int, **ours: Any) -> float:
    """Return the MiB that a step adds at its peak to those held before: resident on a CPU, allocated on CUDA."""
    case = problem(1, width=width)
    matching_step(case, 1, **ours)  # what libraries allocate once is no part of a step
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        matching_step(case, steps, **ours)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    matching_step(case, steps, **ours)
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024


def measure_memory(quick: bool, repeats: int) -> Iterator[Row]:
    """Compare eager steps, each in a process of its own."""
    for width, steps in [(4, 2)] if quick else [(128, 5), (128, 30)]:
        added = []
        for ours in {}, {"compile": False}:
            with other_process() as other:
                added.append(other.submit(added_memory, width, steps, **ours).result())
        case = f"MiB of an eager matching step, width {width}, ipc 1, {steps} inner steps"
        yield Row(case, {"float32": [(added[0], added[1])]}, 0.0)


# Evaluation: five networks trained on a synthetic set, beside one after the other.


def one_after_the_other(networks: list[nn.Module], epoch_batches: Callable[[int], Batches], *, epochs: int) -> None:
    """Train networks in place, each augmented as ``train_fresh_networks`` does with seed 0."""

    def draw(index: int, images: Tensor, epoch: int, step: int) -> Tensor:
        return dsa(images, make_generator(derive_seed(0, "dsa", index, epoch, step)))

    for index, network in enumerate(networks):
        train_network(network, epoch_batches, epochs=epochs, lr=LR, augment=partial(draw, index))


def measure_evaluation(quick: bool, repeats: int) -> Iterator[Row]:
    """Compare a few epochs of training, each time from the same fresh networks."""
    width, ipc, epochs = (4, 1, 1) if quick else (128, 10, 300 if DEVICE == "cuda" else 2)
    with seeded(0, "evaluation benchmark"):
        images, labels = torch.randn(10 * ipc, 3, 32, 32), torch.arange(10).repeat_interleave(ipc)
        fresh = [ConvNet(3, 10, 32, width=width).to(DEVICE) for _ in range(5)]
    loader, data = sample_loader(images, labels, batch_size=BATCH), (images.to(DEVICE), labels.to(DEVICE))
    protocol = EvaluationProtocol(epochs=epochs, lr=LR, batch_size=BATCH)
    losses = IndependentLosses(not quick, torch.device(DEVICE))  # one for all rounds: it compiles once

    def plain() -> None:
        one_after_the_other(copy.deepcopy(fresh), lambda epoch: loader, epochs=epochs)

    def ours() -> None:
        train_fresh_networks(copy.deepcopy(fresh), *data, protocol, losses=losses)

    case = f"evaluation of 5 networks, width {width}, ipc {ipc}, compiled"
    yield in_turns(case, plain, {"float32": ours}, repeats)


def measure_host(quick: bool, repeats: int) -> Iterator[Row]:
    """Compare steps that compute next to nothing: an empty one of manual optimization, and a teacher's."""
    steps = 10 if quick else 150
    host_pairs(10, 1)  # what is done once in a process
    for path, pairs in host_pairs(steps, repeats).items():
        yield Row(f"host, {steps} steps of a teacher beside empty ones, {path}", {"float32": pairs}, 0.0)


PARTS: dict[str, Callable[[bool, int], Iterator[Row]]] = {
    "teacher": measure_teacher,
    "matching": measure_matching,
    "decoders": measure_decoders,
    "memory": measure_memory,
    "evaluation": measure_evaluation,
    "host": measure_host,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all, if not given")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs, eagerly")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of every comparison")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # as `ftd fit`
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}")
    if "bf16" not in PRECISIONS:
        print("This device has no instructions for bf16, whose column is left out.")
    print(f"\n| case | plain loop, s | {' | '.join(PRECISIONS)} | first run, s |\n|{'---|' * (3 + len(PRECISIONS))}")
    for part in options.parts:
        for row in PARTS[part](options.quick, options.repeats):
            print(row.line(), flush=True)


if __name__ == "__main__":
    from benchmarks import run  # whose functions other processes find by name

    run.main()
