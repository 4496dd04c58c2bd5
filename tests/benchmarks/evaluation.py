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
from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.functional import derive_seed, dsa, make_generator, seeded
from ftd_lightning.models import ConvNet

LR, BATCH = 0.01, 256
EPOCHS = 1000  # of an evaluation of full length, for which "auto" decides
# (images per class, width, epochs of a turn)
SIZES = {
    "quick": [(1, 16, 3)],
    "cpu": [(1, 32, 20), (1, 128, 6), (10, 32, 6), (10, 128, 2)],
    "cuda": [(1, 32, 300), (1, 128, 300), (10, 32, 300), (10, 128, 300)],
}


def draw(index: int, images: Tensor, epoch: int, step: int) -> Tensor:
    """DSA as ``train_fresh_networks`` draws it for a network, with seed 0."""
    return dsa(images, make_generator(derive_seed(0, "dsa", index, epoch, step)))


def one_after_the_other(networks: list[nn.Module], epoch_batches: Callable[[int], Batches], *, epochs: int) -> None:
    """Train the networks in place."""
    for index, network in enumerate(networks):
        train_network(network, epoch_batches, epochs=epochs, lr=LR, augment=partial(draw, index))


def compare(
    ipc: int, width: int, epochs: int, repeats: int, *, compiled: bool, networks: int = 5, image_size: int = 32
) -> Result:
    """Time all paths in turns, each time from the same fresh networks."""
    with seeded(0, "evaluation benchmark"):
        images = torch.randn(10 * ipc, 3, image_size, image_size)
        fresh = [ConvNet(3, 10, image_size, width=width).to(DEVICE) for _ in range(networks)]
    labels = torch.arange(10).repeat_interleave(ipc)
    loader = sample_loader(images, labels, batch_size=BATCH)
    # One for all turns of a path: what it compiles is compiled once.
    paths = {"ours": False, "compiled": True} if compiled else {"ours": False}
    losses = {name: IndependentLosses(compiles, torch.device(DEVICE)) for name, compiles in paths.items()}
    on_device = images.to(DEVICE), labels.to(DEVICE)

    def ours(path: str, epochs: int) -> float:
        students = copy.deepcopy(fresh)
        protocol = EvaluationProtocol(epochs=epochs, lr=LR, batch_size=BATCH)
        return timed(lambda: train_fresh_networks(students, *on_device, protocol, losses=losses[path]))

    def reference(epochs: int) -> float:
        students = copy.deepcopy(fresh)
        return timed(lambda: one_after_the_other(students, lambda epoch: loader, epochs=epochs))

    def works(epochs: int) -> dict[str, Callable[[], float]]:
        return {**{path: partial(ours, path, epochs) for path in losses}, "reference": partial(reference, epochs)}

    in_turns(works(1), 1)  # what libraries set up once, and compilation
    found = in_turns(works(epochs), repeats)
    case = f"{networks} networks, ipc {ipc}, width {width}"
    each = {name: [seconds / epochs for seconds in times] for name, times in found.items()}
    result = Result([])
    for path in losses:
        quantity = "time of an epoch of all" + (", compiled" if path == "compiled" else "")
        result.rows.append(Row("evaluation", case, quantity, "s", each[path], each["reference"]))
    return result


def run(scale: str, repeats: int, *, compiled: bool = False) -> Result:
    """Measure at a scale."""
    result = Result([])
    for ipc, width, epochs in SIZES["quick" if scale == "quick" else DEVICE]:
        result.add(compare(ipc, width, epochs, repeats, compiled=compiled))
    return result
