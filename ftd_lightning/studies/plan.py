"""What a plan of ``ftd distill`` consists of: what it is made for, its sizes, its cost, and all of it in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from ftd_lightning.data import DistillationDataModule

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
