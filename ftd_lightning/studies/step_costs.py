"""What a step of each phase costs on this device, measured in a few seconds on random images."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from ftd_lightning.functional.matching import trajectory_matching_loss
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.models.registry import build_network
from ftd_lightning.optim import GSAM
from ftd_lightning.training.side_by_side import SideBySide

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftd_lightning.functional.augment import Augmentation

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

    losses = SideBySide("auto", device)

    def evaluation() -> None:
        losses([network], images.detach(), classes, seeds=[0], augment=augment).sum().backward()  # type: ignore[no-untyped-call]

    return Costs(
        teacher=_seconds(partial(teacher, flat), device) + LOOP,
        plain=_seconds(partial(teacher, plain), device) + LOOP,
        inner=_seconds(matching, device) / steps,
        evaluation=_seconds(evaluation, device),
        forward=_seconds(forward, device),
    )
