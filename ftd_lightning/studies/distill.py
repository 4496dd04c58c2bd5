"""What a step of each phase costs on this device, measured in a few seconds on random images."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from ftd_lightning.bounds import check_bounds
from ftd_lightning.command_line import parse_command
from ftd_lightning.core.evaluation import REAL_STEPS
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import replacing, write_json
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.matching import trajectory_matching_loss
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.models.registry import build_network
from ftd_lightning.optim import GSAM
from ftd_lightning.shipped_configs import find_config, read_config
from ftd_lightning.studies.compare import advance, report, threads_of
from ftd_lightning.studies.comparison import belonging, of, published
from ftd_lightning.studies.fits import WHERE, TimeSlice, arguments_by_phase, data_options, device_name
from ftd_lightning.studies.plots import set_picture
from ftd_lightning.studies.reproduce import averages_images
from ftd_lightning.studies.tables import keep_set, short_table, verdict, write_summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftd_lightning.studies.comparison import Comparison, Published


LOOP = 0.003  # seconds that a trainer takes for a step beside its arithmetic
START = 8.0  # seconds that a fit takes to start, read its images and end
LEAST = 0.3  # seconds that one measurement takes at least


class Sizes(NamedTuple):
    """What a step's cost depends on.

    Attributes:
        channels: of the images.
        size: their height and width in pixels.
        classes: how many.
        width: of the ConvNet.
        depth: of the ConvNet.
        batch: real images per step.
        inner_batch: synthetic images per step.
    """

    channels: int
    size: int
    classes: int
    width: int
    depth: int
    batch: int
    inner_batch: int


class Costs(NamedTuple):
    """Seconds per step.

    Attributes:
        teacher: a step of a flat teacher, on a batch of real images.
        plain: a step of plain SGD on such a batch.
        inner: an inner step of a matching iteration, its share of the backward pass included.
        evaluation: a step of one fresh network on a batch of the set.
        forward: the forward pass of a batch of real images.
    """

    teacher: float
    plain: float
    inner: float
    evaluation: float
    forward: float


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time a call, the first one aside."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    finish()
    began, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < LEAST:
        run()
        count += 1
        finish()
    return (time.perf_counter() - began) / count


def measure(sizes: Sizes, augment: Augmentation, rho: float, device: torch.device) -> Costs:
    """Time one step of each phase.

    Args:
        sizes: of images, network and batches.
        augment: of every batch.
        rho: of the teachers; 0 is plain SGD.
        device: where the fits will run.
    """
    options = {"width": sizes.width, "depth": sizes.depth}
    network = build_network("convnet", sizes.channels, sizes.classes, sizes.size, **options).to(device)
    generator = make_generator("costs")
    real = torch.randn(sizes.batch, sizes.channels, sizes.size, sizes.size, device=device)
    labels = torch.arange(sizes.batch, device=device) % sizes.classes
    images = torch.randn(sizes.inner_batch, *real.shape[1:], device=device, requires_grad=True)
    classes = torch.arange(sizes.inner_batch, device=device) % sizes.classes

    def teacher(optimizer: GSAM) -> None:
        batch = augment(real, generator) if augment else real

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(network(batch), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)

    def forward() -> None:
        with torch.no_grad():
            network(real)

    flat, plain = (GSAM(network.parameters(), partial(torch.optim.SGD, lr=1e-6), rho=value) for value in (rho, 0.0))
    start = parameters_to_vector(network.parameters()).detach()
    step_size = torch.tensor(1e-3, device=device, requires_grad=True)
    steps = 5
    batches = [torch.arange(sizes.inner_batch, device=device)] * steps
    target = start + 1e-2 * torch.randn(start.shape, device=device)

    def matching() -> None:
        loss = trajectory_matching_loss(
            network, start, target, images, classes, step_size, batches=batches, augment=augment or None, compile="auto"
        )
        loss.backward()  # type: ignore[no-untyped-call]

    losses = IndependentLosses("auto", device)

    def evaluation() -> None:
        losses([network], images.detach(), classes, seeds=[0], augment=augment).sum().backward()  # type: ignore[no-untyped-call]

    return Costs(
        teacher=_seconds(partial(teacher, flat), device) + LOOP,
        plain=_seconds(partial(teacher, plain), device) + LOOP,
        inner=_seconds(matching, device) / steps,
        evaluation=_seconds(evaluation, device),
        forward=_seconds(forward, device),
    )


FITS = 5  # teachers, distillation, three evaluations
USED = 0.85  # of the budget: a machine is not always as fast as when it was measured
TEACHERS = 0.42  # of what the evaluations leave
ITERATION = 0.015  # seconds that a matching iteration takes beside its inner steps: a segment is read, images updated
# Networks, epochs on a set and on real images, the share of these; the first that takes a quarter of the time at most.
# Training on real images takes REAL_STEPS at least, unless there is no time for that.
EVALUATIONS = (
    (5, 1000, 60, 1.0),
    (5, 500, 30, 1.0),
    (3, 500, 20, 1.0),
    (3, 300, 10, 1.0),
    (3, 300, 10, 0.2),
    (2, 300, 20, 0.02),
    (2, 100, 20, 0.01),
)
FEW = 300  # iterations
CHECKPOINTS = 10  # of a distillation
LEAST_BATCH = 20  # synthetic images in an inner step
METHODS = {"ftd": 0.01, "mtt": 0.0}  # rho of the teachers; FTD, Table 7


def depth_of(size: int) -> int:
    """Give the depth of the ConvNet for images of a size: it ends with 4 x 4 values, or 2 x 2.

    Example:
        >>> [depth_of(size) for size in (8, 16, 28, 32, 64, 128)]
        [2, 2, 3, 3, 4, 5]
    """
    return min(max(round(math.log2(size)) - 2, 2), 5)


def strategy(channels: int, size: int) -> str:
    """Choose an augmentation: without flips and colours for grey images, which are often characters.

    Example:
        >>> strategy(1, 8), strategy(3, 32)
        ('crop_scale_rotate', 'color_crop_cutout_flip_scale_rotate')
    """
    if channels == 1:
        return "crop_scale_rotate" if size < 16 else "crop_cutout_scale_rotate"
    return str(Augmentation().strategy)


@cache
def buildable_size(channels: int, size: int) -> int:
    """Give a size for which the ConvNet of a plan can be built: this one, or the nearest that can be halved.

    Example:
        >>> [buildable_size(3, size) for size in (8, 28, 32, 50, 60, 100)]
        [8, 32, 32, 48, 64, 96]
    """
    depth = depth_of(size)
    with torch.device("meta"), suppress(InputError):
        build_network("convnet", channels, 2, size, depth=depth, width=1)
        return size
    return 2**depth * max(round(size / 2**depth), 1)


def planned_sizes(found: Survey, device: torch.device) -> list[int]:
    """List image sizes to try, the largest first; the network of a plan can be built for each.

    Args:
        found: the images.
        device: where the fits will run.

    Raises:
        InputError: for a size that is asked for and cannot be halved, naming the nearest that can.
    """
    if found.size_asked:
        if (nearest := buildable_size(found.channels, found.size)) != found.size:
            depth = depth_of(found.size)
            raise InputError(
                f"--data.image_size {found.size}: the ConvNet of a plan halves its images {depth} times; give {nearest}"
            )
        return [found.size]
    most = 128 if device.type == "cuda" else 64
    sizes = [min(found.size, most)]
    while sizes[-1] > 32:
        sizes.append(sizes[-1] // 2)
    return list(dict.fromkeys(buildable_size(found.channels, size) for size in sizes))


def _evaluations(found: Survey, plan: dict[str, Any], costs: Costs, images: int, budget: float) -> float:
    """Plan the evaluations; add to the plan, and return their seconds."""
    steps = math.ceil(images / 256)
    seen = found.test + plan["val_fraction"] * found.train
    measuring = 2 * math.ceil(seen / plan["batch_size"]) * costs.forward  # at the end of training, and as its test
    per_epoch = math.ceil(found.train / plan["batch_size"]) * costs.plain
    seconds = math.inf
    for least, (networks, epochs, real, share) in itertools.product((REAL_STEPS, 1), EVALUATIONS):
        part = max(math.ceil(share * found.per_class), min(found.per_class, 20))
        used = (1 - plan["val_fraction"]) * found.train * part / found.per_class
        real = max(real, math.ceil(least / math.ceil(used / plan["batch_size"])))
        plan |= {"networks": networks, "evaluation_epochs": epochs, "real_epochs": real}
        plan["real_per_class"] = part if part < found.per_class else None
        on_sets = 2 * epochs * steps * (networks * costs.evaluation + LOOP)
        seconds = on_sets + networks * (real * per_epoch * part / found.per_class + 3 * measuring)
        if seconds <= 0.25 * budget:
            break
    return seconds


def _sizes_of(found: Survey, ipc: int, image_size: int, device: torch.device) -> Sizes:
    """Give the sizes that a plan with images of one size has."""
    width = 128 if device.type == "cuda" else 32
    batch = int(min(max(2 ** round(math.log2(max(found.train, 80) / 10)), 8), 256))
    inner = min(ipc * found.classes, 256)
    return Sizes(found.channels, image_size, found.classes, width, depth_of(image_size), batch, inner)


def _attempt(found: Survey, ipc: int, method: str, budget: float, sizes: Sizes, costs: Costs) -> tuple[Plan, Estimate]:
    """Plan with images of one size."""
    batch, inner = sizes.batch, sizes.inner_batch
    plan: dict[str, Any] = {
        "image_size": sizes.size,
        "val_fraction": found.val_fraction,
        "batch_size": batch,
        "width": sizes.width,
        "depth": sizes.depth,
        "augment": strategy(found.channels, sizes.size),
        "rho": METHODS[method],
    }
    evaluations = _evaluations(found, plan, costs, ipc * found.classes, budget)
    rest = max(budget - evaluations, 0.0)
    # Teachers: epochs that there is time for, over all of them.
    used = (1 - plan["val_fraction"]) * found.train
    measuring = math.ceil(plan["val_fraction"] * found.train / batch) * costs.forward
    per_epoch = math.ceil(used / batch) * costs.teacher + measuring
    epochs = TEACHERS * rest / per_epoch
    share = min(epochs / 24, 1.0)  # of the images: 3 teachers of 8 epochs at least
    least = max(20, math.ceil((ipc + 0.5) / (1 - plan["val_fraction"])))  # the initial images are not held out
    per_class = found.per_class if share == 1.0 else max(int(share * found.per_class), min(found.per_class, least))
    share, epochs = per_class / found.per_class, epochs * found.per_class / per_class
    each = int(min(30, max(8, epochs // 6)))
    teachers = int(min(50, max(2, epochs // each)))
    steps = math.ceil(share * used / batch) * each
    expert = 2 if each >= 8 else 1
    # Distillation: iterations that there is time for.
    syn_steps = 15
    while True:
        per_iteration = 1.2 * syn_steps * costs.inner * inner / sizes.inner_batch + ITERATION
        iterations = int(min((1 - TEACHERS) * rest / per_iteration, 5000))
        if iterations >= FEW or inner < 2 * LEAST_BATCH:
            break
        inner //= 2  # rather more iterations than more images in each
    lr = 0.05 if steps <= 2000 else 0.02 if steps <= 5000 else 0.01
    plan |= {
        "max_per_class": None if share == 1.0 else per_class,
        "teachers": teachers,
        "epochs": each,
        "lr": lr,
        "expert_epochs": expert,
        "max_start_epoch": max(1, min(each // 2, each - expert)),
        "syn_steps": syn_steps,
        "syn_batch": inner if inner < ipc * found.classes else None,
        "lr_images": float(f"{30 * sizes.size / 8 * math.sqrt(ipc):.2g}"),
        "iterations": max(iterations, 1),
        "iterations_per_epoch": max(iterations // CHECKPOINTS, 1),
        "decay": float(f"{min(max(1 - 5 / max(iterations, 1), 0.9), 0.999):.4g}"),
    }
    estimate = Estimate(
        teachers=START + share * teachers * each * per_epoch,
        distillation=START + plan["iterations"] * per_iteration,
        evaluations=3 * START + evaluations,
    )
    return Plan(**plan), estimate


def _is_ample(plan: Plan) -> bool:
    """Whether teachers see enough images; else smaller ones are tried."""
    return plan.max_per_class is None or plan.max_per_class >= 100


def _best(
    found: Survey, ipc: int, method: str, minutes: float, measured: Mapping[Sizes, Costs]
) -> tuple[Plan, Estimate] | None:
    """Plan with the largest images that leave teachers enough of them; None where nothing fits."""
    budget = 60 * minutes * USED - FITS * START
    best: tuple[Plan, Estimate] | None = None
    for sizes, costs in measured.items():
        plan, estimate = _attempt(found, ipc, method, budget, sizes, costs)
        fits = plan.iterations >= 50 and estimate.total <= 60 * minutes
        if fits and (best is None or _is_ample(plan)):
            best = plan, estimate
    return best


def make_plan(found: Survey, ipc: int, method: str, minutes: float, device: torch.device) -> tuple[Plan, Estimate]:
    """Plan a distillation that ends within so many minutes.

    Args:
        found: the images.
        ipc: images per class.
        method: "ftd" or "mtt".
        minutes: the budget.
        device: where it will run.

    Raises:
        InputError: for a method that is not planned here, or a budget that holds no plan.
    """
    if method not in METHODS:
        raise InputError(f"--method {method}: plans are made for {' and '.join(METHODS)}; --config takes any other")
    measured: dict[Sizes, Costs] = {}
    for image_size in planned_sizes(found, device):
        sizes = _sizes_of(found, ipc, image_size, device)
        augment = Augmentation(strategy(found.channels, image_size))
        measured[sizes] = measure(sizes, augment, METHODS[method], device)
        best = _best(found, ipc, method, minutes, measured)
        if best is not None and _is_ample(best[0]):
            break
    if best is None:
        longer = (math.ceil(math.ceil(minutes) * 1.25**power) for power in range(1, 60))
        enough = next((more for more in longer if _best(found, ipc, method, more, measured)), math.inf)
        raise InputError(f"--minutes {minutes:g}: too few for these images on this device; try {enough}")
    return best


FEW_TESTS = 20  # images of a class


class Survey(NamedTuple):
    """What is planned for.

    Attributes:
        names: of the classes.
        channels: of the images.
        size: their own height and width in pixels, or those that are asked for.
        counts: training images of each class, those to be held out included.
        tests: test images of each class.
        val_fraction: share of the training images that is held out.
        size_asked: whether no other size will do.
    """

    names: tuple[str, ...]
    channels: int
    size: int
    counts: tuple[int, ...]
    tests: tuple[int, ...]
    val_fraction: float
    size_asked: bool = False

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def per_class(self) -> int:
        """Training images of the largest class."""
        return max(self.counts)

    @property
    def train(self) -> int:
        """Number of training images."""
        return sum(self.counts)

    @property
    def test(self) -> int:
        """Number of test images."""
        return sum(self.tests)

    def check_ipc(self, ipc: int) -> None:
        """Refuse more images per class than the smallest class has to begin with.

        Raises:
            InputError: naming that class.
        """
        left = [count - round(self.val_fraction * count) for count in self.counts]
        if ipc > min(left):
            raise InputError(
                f"--ipc {ipc}: class {self.names[left.index(min(left))]} has {min(left)} training images that are not "
                f"held out; give --ipc {min(left)} at most, or more images"
            )


def survey(data: DistillationDataModule, val_fraction: float | None, *, size_asked: bool) -> Survey:
    """Count images and classes; those of a folder by the headers of its files.

    Args:
        data: the images, none held out yet.
        val_fraction: share that will be; None: by their number.
        size_asked: whether their size was asked for.
    """
    census = data.census
    counts, given = tuple(data.count("train")), sum(data.count("val"))
    if val_fraction is None:
        val_fraction = 0.1 if sum(counts) < 10_000 else 0.02
    return Survey(
        names=tuple(census.classes if census else data.class_names),
        channels=census.channels if census else data.in_channels,
        size=data.hparams["image_size"] or (census.size if census else data.image_size),
        counts=counts,
        tests=tuple(data.count("test")),
        val_fraction=0.0 if given else val_fraction,
        size_asked=size_asked,
    )


def say(title: str, root: str | None, data: DistillationDataModule, found: Survey) -> list[str]:
    """Say which images there are.

    Args:
        title: of them.
        root: their folder.
        data: as for :func:`survey`, which returned ``found``.
        found: their counts.
    """
    counts = f"{found.train:,} training images, {found.test:,} test images"
    if (census := data.census) is None:
        colour = "grey" if found.channels == 1 else "colour"
        lines = [f"{title}: {counts}, {found.classes} classes, {found.size} px, {colour}"]
    else:
        first, *rest = census.lines()
        folder = Path(str(root))
        of = "val/" if (folder / "train").is_dir() and not (folder / "test").is_dir() else ""
        lines = [f"{title}: {first}", *rest, counts + (f" (those in {of})" if of else "")]
    if min(found.tests) < FEW_TESTS:
        uncertain = f"an accuracy is uncertain by {50 / found.test**0.5:.2g} points"
        lines.append(f"warning: few test images, {min(found.tests)} in the smallest class: {uncertain}; add some")
    return lines


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        image_size: height and width in pixels.
        max_per_class: real images of each class that teachers and distillation see; None: all.
        val_fraction: share of them that is held out.
        batch_size: of the real images.
        width: of the ConvNet.
        depth: of the ConvNet.
        augment: DSA's strategy.
        teachers: how many.
        epochs: of each.
        lr: of the teachers; the step size begins with it.
        rho: of the teachers.
        expert_epochs: M of a segment.
        max_start_epoch: T+ of a segment.
        syn_steps: N of a segment.
        syn_batch: synthetic images per step; None: all.
        lr_images: of the pixels.
        iterations: of the distillation.
        iterations_per_epoch: of them; a checkpoint is written after so many.
        decay: of the moving average.
        networks: of each evaluation.
        evaluation_epochs: on a set.
        real_epochs: on real images.
        real_per_class: real images of each class that networks are trained on beside those of the set; None: all.
    """

    image_size: int
    max_per_class: int | None
    val_fraction: float
    batch_size: int
    width: int
    depth: int
    augment: str
    teachers: int
    epochs: int
    lr: float
    rho: float
    expert_epochs: int
    max_start_epoch: int
    syn_steps: int
    syn_batch: int | None
    lr_images: float
    iterations: int
    iterations_per_epoch: int
    decay: float
    networks: int
    evaluation_epochs: int
    real_epochs: int
    real_per_class: int | None


class Estimate(NamedTuple):
    """Seconds of each phase."""

    teachers: float
    distillation: float
    evaluations: float

    @property
    def total(self) -> float:
        """Of all of them."""
        return sum(self)


def describe(plan: Plan, estimate: Estimate, images: int) -> list[str]:
    """Say what a plan does and costs, a line for each phase."""
    flat = f", flat (rho {plan.rho:g})" if plan.rho else ""
    steps = f"{plan.syn_steps} steps on {'all of them' if plan.syn_batch is None else f'{plan.syn_batch} of them'}"
    part = "" if plan.max_per_class is None else f" on {plan.max_per_class} images per class"
    network = f"ConvNet of depth {plan.depth} and width {plan.width}"
    phases = {
        "teachers": f"{plan.teachers} of {plan.epochs} epochs{flat}{part}: {network}, {plan.image_size} px",
        "distillation": f"{plan.iterations} iterations, {images} images, {steps}",
        "evaluations": f"3 of {plan.networks} networks: {plan.evaluation_epochs} epochs on sets, {plan.real_epochs} on "
        + ("all real images" if plan.real_per_class is None else f"{plan.real_per_class} real images per class"),
    }
    lines = [f"  {name:<13} {getattr(estimate, name) / 60:>6.1f} min   {what}" for name, what in phases.items()]
    return [*lines, f"  {'in all':<13} {estimate.total / 60:>6.1f} min"]


NOTES = {
    "teacher": "Teachers of a plan of ftd distill: ftd fit --config {file}",
    "distill": "Distillation of a plan of ftd distill, after its teachers: ftd fit --config {file}",
    "evaluate": "Evaluation of a plan of ftd distill, after its distillation: ftd fit --config {file}",
}


class Source(NamedTuple):
    """Images to distil.

    Attributes:
        name: of the data set, in ``data.datasets.DATASETS``.
        root: folder of its files; None: where data sets lie by default.
        title: for people.
    """

    name: str
    root: str | None
    title: str


def _write(folder: Path, phase: str, content: Mapping[str, Any]) -> str:
    file = folder / f"{phase}.yaml"
    text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None)
    with replacing(file) as part:
        part.write_text(f"# {NOTES[phase].format(file=file)}\n{text}", encoding="utf-8")
    return str(file)


def _comparison(
    source: Source, out: Path, ipc: int, method: str, rows: Mapping[str, Mapping[str, Any]], **rest: Any
) -> dict[str, Any]:
    count = "1 image per class" if ipc == 1 else f"{ipc} images per class"
    random = {"label": f"random real images, {ipc} per class", "synthetic": "random", **rows["random"]}
    learned = {"label": f"{method.upper()}, {ipc} per class", **rows["method"]}
    real = {"label": "all real images", "synthetic": "real", **rows["real"]}
    return {
        "title": f"{source.title}, {count}",
        "dataset": source.name,
        "ipc": ipc,
        "run": str(out),
        "fits": str(out / "fits"),
        "rows": {"random": random, method: learned, "real": real},
        "paired_with": "random",
        **rest,
    }


def planned_configs(plan: Plan, source: Source, out: Path, *, ipc: int, method: str, seed: int) -> dict[str, Any]:
    """Write the configs of a plan into ``out/configs``; return the comparison of them.

    Args:
        plan: what is run.
        source: the images.
        out: the folder of the job.
        ipc: images per class.
        method: "ftd" or "mtt".
        seed: of everything that is drawn.
    """
    data: dict[str, Any] = {"dataset": source.name, **({"root": source.root} if source.root else {})}
    data |= {"image_size": plan.image_size, "val_fraction": plan.val_fraction, "batch_size": plan.batch_size}
    data |= {"seed": seed}
    part = {} if plan.max_per_class is None else {"max_per_class": plan.max_per_class}
    options, augment = {"width": plan.width, "depth": plan.depth}, {"strategy": plan.augment}

    def config(model: str, settings: dict[str, Any], images: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
        return {
            "seed_everything": seed % 2**32,
            "model": {"class_path": f"ftd_lightning.{model}", "init_args": {**settings, "seed": seed}},
            "data": {"class_path": "ftd_lightning.DistillationDataModule", "init_args": images},
            "trainer": trainer,
        }

    teacher = {"network_options": options, "teachers": plan.teachers, "epochs": plan.epochs, "lr": plan.lr}
    matching = {
        "trajectories": "runs/teacher/trajectories",
        "ipc": ipc,
        "syn_steps": plan.syn_steps,
        "expert_epochs": plan.expert_epochs,
        "max_start_epoch": plan.max_start_epoch,
        "syn_batch": plan.syn_batch,
        "lr_images": plan.lr_images,
        "lr_step_size": 1e-4 if plan.lr > 0.01 else 1e-5,
        "step_size_init": plan.lr,
        "augment": augment,
        "iterations_per_epoch": plan.iterations_per_epoch,
    }
    average = {"class_path": "ftd_lightning.callbacks.SyntheticEMA", "init_args": {"decay": plan.decay}}
    learning: dict[str, Any] = {"max_steps": plan.iterations, **({"callbacks": [average]} if method == "ftd" else {})}
    epochs = plan.evaluation_epochs
    evaluation = {"network_options": options, "networks": plan.networks, "augment": augment, "measure_every": epochs}
    folder = out / "configs"
    files = {
        "teacher": config(
            "FlatTeacher", {**teacher, "rho": plan.rho, "augment": augment}, {**data, **part}, {"max_epochs": -1}
        ),
        "distill": config("TrajectoryMatching", matching, {**data, **part}, learning),
        "evaluate": config(
            "SyntheticEvaluation",
            evaluation,
            {**data, "synthetic": "runs/distill/set.safetensors"},
            {"max_epochs": epochs},
        ),
    }
    written = {phase: _write(folder, phase, content) for phase, content in files.items()}
    on_real = ["--trainer.max_epochs", plan.real_epochs, "--model.measure_every", plan.real_epochs]
    real: dict[str, Any] = {"evaluate_arguments": on_real}
    if plan.real_per_class is not None:
        on_real += ["--data.max_per_class", plan.real_per_class]
        real["label"] = f"real images, {plan.real_per_class} per class"
    rows: dict[str, dict[str, Any]] = {
        "random": {},
        "method": {"distill": written["distill"], "teachers": method, "ema": method == "ftd"},
        "real": real,
    }
    return _comparison(
        source, out, ipc, method, rows, teachers={method: written["teacher"]}, evaluate=written["evaluate"]
    )


def published_configs(configs: Published, source: Source, out: Path, *, ipc: int, method: str) -> dict[str, Any]:
    """Make a comparison of published configs.

    Args:
        configs: those that belong together.
        source: the images.
        out: the folder of the job.
        ipc: images per class.
        method: its name.
    """
    zca = read_config(configs.distill)["data"]["init_args"].get("zca", False)
    real = ["--data.zca", zca]
    learned: dict[str, Any] = {
        "distill": str(configs.distill),
        "distill_arguments": list(configs.ipc),
        "ema": averages_images(configs.distill),
    }
    teachers = {"teachers": {method: str(configs.teacher)}} if configs.teacher else {}
    rows = {
        "random": {"evaluate_arguments": real},
        "method": {**learned, **({"teachers": method} if teachers else {})},
        "real": {"evaluate_arguments": [*real, "--trainer.max_epochs", 60, "--model.measure_every", 10]},
    }
    arguments = [*configs.arguments, *(["--data.root", source.root] if source.root else [])]
    evaluate = str(configs.evaluate)
    return _comparison(source, out, ipc, method, rows, evaluate=evaluate, arguments=arguments, **teachers)


MINUTES = 30.0  # of a plan for a folder, if none are given
PLAN = "plan.json"
IN_FOLDERS = {"folder", "images"}  # data sets that are nothing without a folder
# Nothing is chosen by what would be measured while distilling, and it takes time.
UNMEASURED = (
    "--distill.trainer.callbacks+=ftd_lightning.callbacks.EvaluateSynthetic",
    "--distill.trainer.callbacks.init_args.every_n_epochs=0",
)


def find_source(source: str) -> Source:
    """Find images: a folder of classes, which wins, or a data set by its name.

    Raises:
        InputError: for what is neither.

    Example:
        >>> find_source("digits")
        Source(name='digits', root=None, title='digits')
    """
    path = Path(source)
    if path.is_dir():
        return Source("folder", str(path), path.resolve().name)
    if path.exists():
        raise InputError(f"{source}: is a file; give a folder with a folder of images for each class")
    if source in IN_FOLDERS or any(sign in source for sign in "/\\"):
        names = ", ".join(sorted(DATASETS.keys() - IN_FOLDERS))
        raise InputError(f"{source}: no such folder; give a folder of classes, or one of {names}")
    if source not in DATASETS:
        near = difflib.get_close_matches(source.lower(), DATASETS.keys() - IN_FOLDERS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"{source}: no such folder, and no data set of that name{hint}")
    return Source(source, None, source)


def _begin(out: Path, command: dict[str, Any]) -> dict[str, Any] | None:
    """Read the plan that lies in a folder; None where there is none yet.

    Raises:
        InputError: for the plan of another command, or a folder with other things in it.
    """
    file = out / PLAN
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(entry.name != "data" for entry in out.iterdir())):
            raise InputError(f"{out}: is not empty and holds no {PLAN}; name another folder")
        return None
    with suppress(json.JSONDecodeError, AttributeError):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        before = found.get("command")
        if before == command:
            return found
        if isinstance(before, dict):
            other = [f"{key} {before.get(key)}" for key, value in command.items() if before.get(key) != value]
            raise InputError(f"{out}: was begun with another {', another '.join(other)}; name another folder")
    raise InputError(f"{file}: is not a plan; name another folder")


def plan_job(source: Source, out: Path, command: Mapping[str, Any], overrides: Sequence[str]) -> Comparison:
    """Make a plan, or find the one of the same command; print it, and return what it runs.

    Args:
        source: the images.
        out: the folder of the job.
        command: "ipc", "method", "minutes", "config" and "seed", as :func:`distill_source` takes them.
        overrides: options for the fits.

    Raises:
        InputError: for a budget, a method or a config that does not do, a folder of another command, or images that
            have changed since the plan was made.
    """
    asked = {"source": source.name, "root": source.root, **command, "overrides": list(overrides)}
    content = _begin(out, asked)
    configs = _published(source, command)
    if content is None:
        plan, read, lines = _plan(source, command, configs, data_options(arguments_by_phase(overrides)["teacher"]))
        numbers = None if plan is None else asdict(plan)
        content = {"command": asked, "read": read, "data": _described(read), "plan": numbers, "text": lines}
        write_json(out / PLAN, content)
    else:
        recorded = content.get("read")
        if not isinstance(recorded, dict):
            raise InputError(f"{out / PLAN}: is not a plan of this version; name another folder")
        read = recorded
        if content.get("data") != _described(read):
            raise InputError(
                f"{out}: the images of {source.title} have changed since it was begun; name another folder"
            )
        print("\n".join(content["text"]), flush=True)
    # A config is a program: it is not taken from the folder, but written again from the plan's numbers.
    options = {"ipc": command["ipc"], "method": command["method"]}
    if configs is not None:
        given = published_configs(configs, source, out, **options)
    else:
        given = planned_configs(_numbers(content, out / PLAN), source, out, **options, seed=command["seed"])
    return of(given, out / PLAN, [*UNMEASURED, *overrides], name="ftd distill")


def _described(read: Mapping[str, Any]) -> dict[str, Any]:
    """Describe images by their contents, as JSON holds it; they are decoded into the cache that the fits read."""
    options = {key: value for key, value in read.items() if key in WHERE}
    found: dict[str, Any] = json.loads(json.dumps(DistillationDataModule(**options).describe()))
    return found


def _numbers(content: Mapping[str, Any], file: Path) -> Plan:
    """Return the plan that a file holds: numbers, and a strategy of augmentation.

    Raises:
        InputError: for anything else.
    """
    try:
        plan = Plan(**content["plan"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: is not a plan; name another folder") from error
    for name, value in asdict(plan).items():
        if value is not None and not isinstance(value, str if name == "augment" else (int, float)):
            raise InputError(f"{file}: is not a plan, its {name} is {value!r:.60}; name another folder")
    return plan


def _published(source: Source, command: Mapping[str, Any]) -> Published | None:
    """Return the configs that a job takes its settings from; None where it is planned."""
    ipc, method, minutes, config = (command[key] for key in ("ipc", "method", "minutes", "config"))
    if config is not None and minutes is not None:
        raise InputError("--config names all settings; leave out --minutes, or --config")
    if config is not None:
        return belonging(find_config(config), ipc)
    return published(source.name, ipc, method) if minutes is None and source.root is None else None


def _plan(
    source: Source, command: Mapping[str, Any], configs: Published | None, options: dict[str, Any]
) -> tuple[Plan | None, dict[str, Any], list[str]]:
    """Plan a job, unless it takes its settings from configs.

    Args:
        source: the images.
        command: as for :func:`plan_job`.
        configs: from which the settings are taken.
        options: of the images, that are given.

    Returns:
        The plan, the options that read its images, and the lines that were printed.
    """
    options = {"dataset": source.name, **({"root": source.root} if source.root else {}), **options}
    val_fraction, asked = options.pop("val_fraction", None), options.get("image_size")
    if configs is not None:
        own = read_config(configs.distill).get("data", {}).get("init_args", {})
        options = {"image_size": own.get("image_size"), "max_per_class": own.get("max_per_class"), **options}
        val_fraction = own.get("val_fraction", 0.1) if val_fraction is None else val_fraction
    data = DistillationDataModule(**{**options, "val_fraction": 0.0})
    found = survey(data, val_fraction, size_asked=asked is not None)
    found.check_ipc(command["ipc"])
    lines = say(source.title, source.root, data, found)
    print("\n".join(lines), flush=True)  # measuring takes a while
    read = {key: options[key] for key in WHERE if key in options}
    if configs is not None:
        settings = f"plan: the settings of {', '.join(path.stem for path in configs[:3] if path)}, as published"
        print(settings, flush=True)
        return None, read, [*lines, settings]
    budget = MINUTES if command["minutes"] is None else command["minutes"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, estimate = make_plan(found, command["ipc"], command["method"], budget, device)
    size = plan.image_size
    told, planned = data.census and data.census.resizing(size), list[str]()
    if told or size != found.size:
        change = f"images are {'reduced' if size < found.size else 'enlarged'} to {size} x {size} px"
        planned.append(f"{told or change}; --data.image_size asks for another size")
    text = describe(plan, estimate, command["ipc"] * found.classes)
    planned += [f"plan for {budget:g} minutes on {device_name()}:", *text]
    print("\n".join(planned), flush=True)
    return plan, {**read, "image_size": size}, [*lines, *planned]


def run_job(job: Comparison, out: Path, time_slice: TimeSlice) -> bool:
    """Do what there is time for; write the set, ``results.json`` and ``images.png`` when all is done.

    Raises:
        InputError: if a fit fails.
    """
    rows = list(job.rows.values())
    with threads_of(job):
        failures, in_time = advance(job, rows, time_slice, quiet=True)
        if failures:
            raise InputError("; ".join(dict.fromkeys(failures.values())))
        if not in_time:
            return False
        results = report(job, failures)
    (method,) = (row for row in rows if "distill" in row.given)
    file = keep_set(job, method, out / "set.safetensors")
    assert file is not None
    if results["ipc"] > 1:  # one row of every method has no place for more
        with replacing(out / "images.png") as part:
            set_picture(SyntheticSet.load(file), ema=bool(method.given.get("ema"))).save(part, format="PNG")
    write_summary(results, out / "results.json")
    print(f"\n{short_table(results)}\n")
    print(f"set       {file}\nresults   {out / 'results.json'}\nimages    {out / 'images.png'}")
    if said := verdict(results):
        print(f"\n{said}")
    return True


def distill_source(
    source: str,
    *,
    ipc: int,
    out: Path,
    method: str = "ftd",
    minutes: float | None = None,
    config: str | None = None,
    stop_after: float | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> None:
    """Distil images into a set, and measure it beside random and all real images.

    Looks at the images, measures what a step costs on this device, plans teachers, distillation and evaluations, prints
    the plan with its cost, and runs it. OUT holds set.safetensors, results.json, images.png, and the plan as configs
    for a longer, careful run. The same command resumes where it stopped. Further options (--data.root DIR) go to every
    fit; those with --teacher., --distill. or --evaluate. in front go to the fits of that phase.

    Args:
        source: a folder with a folder of images for each class, or a data set's name.
        ipc: images per class.
        out: the folder to write to.
        method: ftd, mtt, or any whose settings ship.
        minutes: budget of the whole job; by default a data set takes its published settings, a folder 30 minutes.
        config: take the settings of this distillation's config, and of what belongs to it.
        stop_after: minutes; the same command continues.
        seed: of everything that is drawn.
        overrides: further options, for the fits.

    Raises:
        InputError: for images that cannot be read, a budget that is too small, or a folder of another command.
    """
    check_bounds(distill_source, locals())
    command = {"ipc": ipc, "method": method, "minutes": minutes, "config": config, "seed": seed}
    job = plan_job(find_source(source), out, command, overrides)
    if not run_job(job, out, TimeSlice(stop_after)):
        print("not done: run the same command again")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd distill``."""
    distill_source(**parse_command(distill_source, "distill", arguments))
