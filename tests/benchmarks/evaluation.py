"""Evaluation: n fresh networks trained side by side on a synthetic set, beside one after the other.

The same networks, images, optimizer and schedule, and the same operation of DSA for each network at each step; the
plain loop reads the set through a DataLoader. Testing the networks costs both sides the same, and is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import DEVICE, Result, Row, in_turns, timed
from benchmarks.reference import Batches, sample_loader, train_network
from ftd_lightning.functional import derive_seed, dsa, make_generator, seeded
from ftd_lightning.models import ConvNet
from ftd_lightning.training.evaluation_protocol import EvaluationProtocol, train_fresh_networks
from ftd_lightning.training.side_by_side import SideBySide

LR, BATCH = 0.01, 256
# (images per class, epochs): the protocol's 1,000 epochs are as many times the same.
SIZES = {
    "quick": {"cases": [(1, 3)], "width": 16},
    "cpu": {"cases": [(1, 20), (10, 4)], "width": 128},
    "cuda": {"cases": [(1, 300), (10, 300)], "width": 128},
}


def draw(index: int, images: Tensor, epoch: int, step: int) -> Tensor:
    """DSA as ``train_fresh_networks`` draws it for a network, with seed 0."""
    return dsa(images, make_generator(derive_seed(0, "dsa", index, epoch, step)))


def one_after_the_other(networks: list[nn.Module], epoch_batches: Callable[[int], Batches], *, epochs: int) -> None:
    """Train the networks in place."""
    for index, network in enumerate(networks):
        train_network(network, epoch_batches, epochs=epochs, lr=LR, augment=partial(draw, index))


def compare(ipc: int, epochs: int, repeats: int, *, networks: int = 5, image_size: int = 32, **options: int) -> Row:
    """Time both in turns, each time from the same fresh networks."""
    with seeded(0, "evaluation benchmark"):
        images = torch.randn(10 * ipc, 3, image_size, image_size)
        fresh = [ConvNet(3, 10, image_size, **options).to(DEVICE) for _ in range(networks)]
    labels = torch.arange(10).repeat_interleave(ipc)
    loader = sample_loader(images, labels, batch_size=BATCH)
    losses = SideBySide("auto", torch.device(DEVICE))  # one for all turns: what it compiles is compiled once
    on_device = images.to(DEVICE), labels.to(DEVICE)

    def ours(epochs: int) -> float:
        students = copy.deepcopy(fresh)
        protocol = EvaluationProtocol(epochs=epochs, lr=LR, batch_size=BATCH)
        return timed(lambda: train_fresh_networks(students, *on_device, protocol, losses=losses))

    def reference(epochs: int) -> float:
        students = copy.deepcopy(fresh)
        return timed(lambda: one_after_the_other(students, lambda epoch: loader, epochs=epochs))

    in_turns({"ours": lambda: ours(2), "reference": lambda: reference(2)}, 1)  # what libraries set up once
    found = in_turns({"ours": lambda: ours(epochs), "reference": lambda: reference(epochs)}, repeats)
    case = f"{networks} networks, ipc {ipc}, width {options.get('width', 128)}"
    each = {name: [seconds / epochs for seconds in times] for name, times in found.items()}
    return Row("evaluation", case, "time of an epoch of all", "s", each["ours"], each["reference"])


def run(scale: str, repeats: int, **_: object) -> Result:
    """Measure at a scale."""
    size = SIZES["quick" if scale == "quick" else DEVICE]
    return Result([compare(ipc, epochs, repeats, width=size["width"]) for ipc, epochs in size["cases"]])
