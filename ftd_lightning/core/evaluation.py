"""Real images to measure on, copied to the device once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import Images
from ftd_lightning.core.losses import SideBySide
from ftd_lightning.core.networks import right_answers
from ftd_lightning.core.ranks import from_all_ranks
from ftd_lightning.core.results import summary
from ftd_lightning.data.loaders import BatchOrder, TensorLoader, fits_on
from ftd_lightning.files.safetensors_io import replacing, write_json
from ftd_lightning.files.schema import per_cent
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed, to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from ftd_lightning.contracts import DataSource, Part, TrainingSet
    from ftd_lightning.functional.compiling import Compile


class PartsOnDevice:
    """Gives the parts of a data source on a device. A part that does not fit there stays in host memory.

    Args:
        source: of real images.
        device: where networks are measured.
    """

    def __init__(self, source: DataSource, device: torch.device) -> None:
        self.source = source
        self.device = device
        self._parts: dict[Part, Images] = {}

    def __call__(self, name: Part) -> Images:
        """Return a part, (N, C, H, W) images and (N,) labels."""
        if name not in self._parts:
            part = self.source.part(name)
            place = self.device if fits_on(self.device, part.images) else part.images.device
            self._parts[name] = Images(part.images.to(place), part.labels.to(place))
        return self._parts[name]

    def accuracies(self, networks: Sequence[nn.Module], count: int) -> dict[Part, Tensor]:
        """Measure networks on held-out and on test images; a part without images is left out.

        Args:
            networks: of this rank, as ``ranks.own_share`` deals them out; their modes (training, evaluation) stay.
            count: how many there are on all ranks.

        Returns:
            The share of correct classifications of each of all networks, (count,) float32 on the CPU.
        """
        modes = [(module, module.training) for network in networks for module in network.modules()]
        parts: tuple[Part, ...] = ("val", "test")
        real = {part: self(part) for part in parts}
        measured = {
            part: torch.tensor(from_all_ranks(accuracies(networks, *images), count))
            for part, images in real.items()
            if len(images.labels)
        }
        for module, training in modes:
            module.training = training
        return measured


REAL_STEPS = 360  # fewer SGD steps on real images leave networks short of their accuracy; 60 epochs of the digits
DEFAULT_LR = 0.01  # of this line's code, for sets without a learned step size


@dataclass(frozen=True)
class EvaluationProtocol:
    """How a fresh network is trained on a synthetic set; the defaults are those behind the published numbers.

    Attributes:
        epochs: over the set.
        lr: learning rate; x0.1 from half of the epochs on.
        batch_size: images per step.
        momentum: of SGD.
        weight_decay: of SGD.
        augment: of every batch, drawn for each network.

    Raises:
        InputError: for numbers out of range.
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
        """Make one optimizer over the weights of all networks."""
        parameters = [p for network in networks for p in network.parameters()]
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
    """Return the mean step size that a set was learned with; where there is none, say so and return 0.01."""
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

    Args:
        networks: put into evaluation mode; images are cast to the type of their weights.
        images: (N, C, H, W), on the networks' device, or in host memory, from where they go there batch by batch.
        labels: (N,) int64.
        batch_size: images per forward pass.
    """
    networks = [network.eval() for network in networks]
    device = next((weight.device for network in networks for weight in network.parameters()), images.device)
    counts = []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        on_device, answers = to_device(x, device), to_device(y, device)
        right = []
        for network in networks:
            weight = next(network.parameters(), on_device)
            right.append(right_answers(network(on_device.to(weight.dtype)), answers).sum())
        counts.append(torch.stack(right))
    return [count / len(labels) for count in torch.stack(counts).sum(dim=0).tolist()]


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 1024) -> float:
    """Measure the share of images that a network classifies correctly, in [0, 1]."""
    return accuracies([network], images, labels, batch_size=batch_size)[0]


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
    losses: SideBySide | None = None,
) -> None:
    """Train networks on a synthetic set, in place.

    Args:
        networks: fresh ones, on the images' device.
        images: (N, C, H, W).
        labels: (N,) classes or (N, K) probabilities.
        protocol: epochs, learning rate, batches, augmentation.
        seed: decides batches and augmentation.
        progress: label of a progress bar; None shows no bar.
        compile: torch.compile for forward and backward passes; see ``functional.compiling``.
        indices: numbers of the networks, by which their augmentation is drawn; None counts from 0.
        losses: computes the losses, to share what it has compiled with other calls; None makes one.
    """
    order = BatchOrder(len(labels), protocol.batch_size, shuffle=True, seed=seed)
    loader = TensorLoader(images, labels, order)
    optimizer = protocol.optimizer(networks)
    losses = losses or SideBySide(compile, images.device)
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
    """Mean and population standard deviation (numpy's, as in this line's tables) of accuracies, as JSON holds them.

    Example:
        >>> mean_and_std(torch.tensor([0.5, 1.0]))
        {'mean': 0.75, 'std': 0.25, 'n': 2}
    """
    values = values.double()
    return {"mean": float(values.mean()), "std": float(values.std(correction=0)), "n": len(values)}


def choose_iterates(history: Sequence[dict[str, Any]], last: Tensor) -> dict[str, Any]:
    """Summarise the test accuracy of other iterates than the last: chosen on held-out images, and best on test.

    Args:
        history: measurements during training, each with accuracies "held_out" and "test" of every network.
        last: test accuracy of every network after the last epoch, (n,).

    Returns:
        "chosen_on_held_out", which is honest, and "best_on_test", which is chosen on what it is measured on and thus
        only an upper bound. Empty without a history.

    Example:
        >>> history = [{"held_out": [0.9], "test": [0.6]}, {"held_out": [0.8], "test": [0.7]}]
        >>> chosen = choose_iterates(history, torch.tensor([0.5]))
        >>> round(chosen["chosen_on_held_out"]["mean"], 3), round(chosen["best_on_test"]["mean"], 3)
        (0.6, 0.7)
    """
    if not history:
        return {}
    held_out, test = (torch.tensor([entry[part] for entry in history]) for part in ("held_out", "test"))
    chosen = test.gather(0, held_out.argmax(0, keepdim=True))[0]
    best = torch.maximum(test.max(0).values, last.cpu())
    return {"chosen_on_held_out": mean_and_std(chosen), "best_on_test": mean_and_std(best)}


def markdown_table(results: dict[str, Any]) -> str:
    """Format the results of an evaluation as a Markdown table, in per cent."""
    (method, last), *_ = results["accuracy"].items()
    chosen = "chosen on held-out images" + (" (seen by the set)" if results.get("held_out_seen") else "")
    columns = {
        "last iterate": last,
        chosen: results.get("chosen_on_held_out"),
        "best on test (an upper bound)": results.get("best_on_test"),
    }
    cells = [per_cent(value) for value in columns.values()]
    lines = [["set", "network", "networks", *columns], ["---"] * 6]
    lines.append([method, str(results["settings"].get("network", "own")), str(last["n"]), *cells])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + (f"\n{summary(results['failed'], last['n'])}\n" if results.get("failed") else "")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write the results of an evaluation as ``evaluation.json`` and as a table, ``evaluation.md``, and say so."""
    write_json(folder / "evaluation.json", results)
    with replacing(folder / "evaluation.md") as part:
        part.write_text(markdown_table(results), encoding="utf-8")
    accuracy = per_cent(next(iter(results["accuracy"].values())))
    rank_zero_info(f"wrote {folder / 'evaluation.json'}: test accuracy {accuracy} %")
