"""Evaluation of a synthetic set: fresh networks trained on it, and their accuracy on real images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import Images
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.core.networks import right_answers
from ftd_lightning.core.ranks import from_all_ranks
from ftd_lightning.data.loaders import BatchOrder, TensorLoader, fits_on
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed, to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from ftd_lightning.contracts import DataSource, Part, TrainingSet
    from ftd_lightning.functional.compiling import Compile


def on_device(images: Images, device: torch.device) -> Images:
    """Copy images to a device, or leave them in host memory where they do not fit there."""
    place = device if fits_on(device, images.images) else torch.device("cpu")
    return Images(images.images.to(place), images.labels.to(place))


class PartsOnDevice:
    """The parts of a data source, copied to a device when they are first asked for."""

    def __init__(self, source: DataSource, device: torch.device) -> None:
        self.source = source
        self.device = device
        self._parts: dict[Part, Images] = {}

    def __call__(self, name: Part) -> Images:
        """Return a part, (N, C, H, W) images and (N,) labels."""
        if name not in self._parts:
            self._parts[name] = on_device(self.source.part(name), self.device)
        return self._parts[name]

    def accuracies(self, networks: Sequence[nn.Module], count: int) -> dict[Part, Tensor]:
        """Measure ``count`` networks on held-out and on test images: (count,) float32; empty parts are left out.

        ``networks`` are those that ``ranks_share`` deals out to this rank; their modes (training, evaluation) stay.
        """
        modes = [(module, module.training) for network in networks for module in network.modules()]
        parts: tuple[Part, ...] = ("val", "test")
        measured = {
            part: torch.tensor(from_all_ranks(accuracies(networks, *self(part)), count))
            for part in parts
            if len(self(part).labels)
        }
        for module, training in modes:
            module.training = training
        return measured


REAL_STEPS = 360  # fewer SGD steps on real images leave networks short of their accuracy; 60 epochs of the digits
DEFAULT_LR = 0.01  # of this line's code, for sets without a learned step size


@dataclass(frozen=True)
class EvaluationProtocol:
    """Training of a fresh network by SGD on a synthetic set; the published numbers were made with the defaults.

    Attributes:
        lr: learning rate; x0.1 from half of the epochs on.
        augment: of every batch, drawn for each network.
    """

    epochs: int = 1000
    lr: float = DEFAULT_LR
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        check_bounds(EvaluationProtocol, vars(self))

    def optimizer(self, networks: Iterable[nn.Module]) -> torch.optim.SGD:
        """Make one optimizer over the weights of all networks, but frozen ones."""
        parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, from 0.

        Convention: one optimizer for all epochs. The public code makes a new one at the drop, which forgets the
        momentum, runs one epoch more, and drops one later.

        Example:
            >>> [round(EvaluationProtocol(epochs=4, lr=0.5).lr_at(epoch), 3) for epoch in range(4)]
            [0.5, 0.5, 0.05, 0.05]
        """
        return self.lr * 0.1 if epoch >= max(1, self.epochs // 2) else self.lr


def learned_lr(training: TrainingSet | None) -> float:
    """Return the mean learned step size of a set; where it has none, say so and return 0.01."""
    if training is None or training.step_size is None:
        rank_zero_info(f"the training images have no learned step size: using lr={DEFAULT_LR}")
        return DEFAULT_LR
    return float(training.step_size.mean())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def accuracies(networks: Iterable[nn.Module], images: Tensor, labels: Tensor, *, batch_size: int = 1024) -> list[float]:
    """Measure the share of images that each network classifies correctly, in [0, 1]; the host waits once, at the end.

    Networks are put into evaluation mode. Images (N, C, H, W) may lie in host memory and have another type.
    """
    networks = [network.eval() for network in networks]
    weights = [next(network.parameters()) for network in networks]
    counts = []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        x, y = (to_device(values, weights[0].device) for values in (x, y))
        answers = [network(x.to(weight.dtype)) for network, weight in zip(networks, weights, strict=True)]
        counts.append(torch.stack([right_answers(logits, y).sum() for logits in answers]))
    return [count / len(labels) for count in torch.stack(counts).sum(dim=0).tolist()]


def train_fresh_networks(
    networks: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    protocol: EvaluationProtocol,
    *,
    seed: int = 0,
    progress: str | None = None,
    compile: Compile = "auto",  # noqa: A002
    indices: Sequence[int] | None = None,
    losses: IndependentLosses | None = None,
) -> None:
    """Train networks on a synthetic set, in place.

    Args:
        networks: fresh ones, on the images' device.
        images: (N, C, H, W).
        labels: (N,) classes or (N, K) probabilities.
        protocol: epochs, learning rate, batches, augmentation.
        seed: decides batches and augmentation.
        progress: label of a progress bar; None for no bar.
        compile: torch.compile for forward and backward passes; see ``functional.compiling``.
        indices: numbers of the networks, which decide their augmentation; None counts from 0.
        losses: of the networks, shared with other calls because it holds compiled functions; None makes one.
    """
    order = BatchOrder(len(labels), protocol.batch_size, shuffle=True, seed=seed)
    loader = TensorLoader(images, labels, order)
    optimizer = protocol.optimizer(networks)
    losses = losses or IndependentLosses(compile, images.device)
    indices = range(len(networks)) if indices is None else indices
    for network in networks:
        network.train()
    for epoch in tqdm(range(protocol.epochs), desc=progress, disable=progress is None, leave=False):
        set_lr(optimizer, protocol.lr_at(epoch))
        loader.sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            seeds = [derive_seed(seed, "dsa", index, epoch, step) for index in indices]
            optimizer.zero_grad()
            losses(networks, x, y, seeds=seeds, augment=protocol.augment).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def mean_and_std(values: Tensor) -> dict[str, float | int]:
    """Give "mean", population standard deviation "std" (numpy's, as in this line's tables) and "n" of accuracies."""
    values = values.double()
    return {"mean": float(values.mean()), "std": float(values.std(correction=0)), "n": len(values)}
