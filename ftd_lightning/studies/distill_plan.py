"""A plan for a budget: how many teachers, epochs and iterations fit into so many minutes on this device.

The evaluations are planned first, because a set that is not measured says nothing; what they leave goes to teachers and
distillation. Teachers get fewer images per class before they get too few epochs, and smaller images before that.
"""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.models.registry import build_network
from ftd_lightning.studies.plan import Estimate, Plan, Survey
from ftd_lightning.studies.step_costs import LOOP, START, Sizes, measure
from ftd_lightning.training.evaluation_protocol import REAL_STEPS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ftd_lightning.studies.step_costs import Costs

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
