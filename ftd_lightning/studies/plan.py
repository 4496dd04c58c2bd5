"""What a plan of ``ftd distill`` consists of: what it is made for, its sizes, its cost, and all of it in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Survey(NamedTuple):
    """What is planned for.

    Attributes:
        classes: how many.
        channels: of the images.
        size: their own height and width in pixels.
        per_class: training images of the largest class.
        train: training images.
        test: test images.
    """

    classes: int
    channels: int
    size: int
    per_class: int
    train: int
    test: int


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
