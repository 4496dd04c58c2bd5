"""The protocol of evaluation as plain functions, shared by the module and by the callback that measures on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torchmetrics import MeanMetric
from tqdm.auto import tqdm

from ftd_lightning.data.loader import BatchOrder, TensorLoader
from ftd_lightning.functional.augment import STRATEGY, Mode
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.training.fresh_networks import right_answers
from ftd_lightning.training.ranks import all_ranks
from ftd_lightning.training.side_by_side import SideBySide

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ftd_lightning.functional.compiling import Compile


def evaluation_optimizer(
    networks: Iterable[nn.Module], *, lr: float, momentum: float, weight_decay: float, epochs: int
) -> tuple[torch.optim.SGD, MultiStepLR]:
    """Make the protocol's optimizer and its schedule, x0.1 at half way, over the weights of all networks.

    Convention: one optimizer for all epochs. The public code makes a new one at the drop, which forgets the momentum,
    runs one epoch more, and drops one later.
    """
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return optimizer, MultiStepLR(optimizer, [max(1, epochs // 2)], gamma=0.1)


@torch.no_grad()
def accuracies(networks: Iterable[nn.Module], images: Tensor, labels: Tensor, *, batch_size: int = 1024) -> list[float]:
    """Measure the share of images that each network classifies right, in [0, 1]; the host waits once, at the end."""
    counts = []
    for network in networks:
        network.eval()
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        counts.append(torch.stack([right_answers(network(x), y).sum() for x, y in batches]).sum())
    return [count / len(labels) for count in torch.stack(counts).tolist()]


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 1024) -> float:
    """Measure the share of images that a network classifies right, in [0, 1]."""
    return accuracies([network], images, labels, batch_size=batch_size)[0]


def from_all_ranks(own: list[float], total: int) -> list[float]:
    """Collect what ``own_share`` dealt out: a number of each of ``total`` networks, on every rank, in their order.

    Args:
        own: a number of each network of this rank, those included that fill up its share.
        total: how many networks count.
    """
    ranks = all_ranks(own)
    return [ranks[index % len(ranks)][index // len(ranks)] for index in range(total)]


def train_fresh_networks(
    networks: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    batch_size: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    strategy: str = STRATEGY,
    mode: Mode = "single",
    align_corners: bool = True,
    progress: str | None = None,
    compile: Compile = "auto",  # noqa: A002
    indices: Sequence[int] | None = None,
    losses: SideBySide | None = None,
) -> None:
    """Train networks on a synthetic set by the protocol of this line, in place.

    Args:
        networks: fresh ones, on the images' device.
        images: (N, C, H, W).
        labels: (N,) or (N, K).
        epochs: over the synthetic set.
        lr: learned step size, or another.
        seed: decides batches and augmentation.
        batch_size: images a step.
        momentum: of SGD.
        weight_decay: of SGD.
        strategy: DSA strategy.
        mode: DSA mode.
        align_corners: of its resampling.
        progress: what a progress bar says; None for no bar.
        compile: torch.compile for forward and backward passes: True, False, or "auto": on a GPU only.
        indices: numbers of the networks, by which their augmentation is drawn; None counts from 0.
        losses: what computes them, to share what it has compiled with other calls; None makes one.
    """
    loader = TensorLoader(images, labels, BatchOrder(len(labels), batch_size, shuffle=True, seed=seed))
    optimizer, schedule = evaluation_optimizer(
        networks, lr=lr, momentum=momentum, weight_decay=weight_decay, epochs=epochs
    )
    losses = losses or SideBySide(compile, images.device)
    indices = range(len(networks)) if indices is None else indices
    for network in networks:
        network.train()
    for epoch in tqdm(range(epochs), desc=progress, disable=progress is None, leave=False):
        loader.sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            seeds = [derive_seed(seed, "dsa", index, epoch, step) for index in indices]
            optimizer.zero_grad()
            settings = {"strategy": strategy, "mode": mode, "align_corners": align_corners}
            losses(networks, x, y, seeds=seeds, **settings).sum().backward()  # type: ignore[arg-type, no-untyped-call]
            optimizer.step()
        schedule.step()


def mean_and_std(values: Tensor) -> dict[str, float | int]:
    """Mean and population standard deviation (numpy's, as in this line's tables) of accuracies, as JSON holds them.

    Example:
        >>> mean_and_std(torch.tensor([0.5, 1.0]))
        {'mean': 0.75, 'std': 0.25, 'n': 2}
    """
    first, second = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")
    mean = first(values.double())
    second((values.double() - mean) ** 2)
    return {"mean": float(mean), "std": float(second.compute().sqrt()), "n": len(values)}


def choose_iterates(history: Sequence[dict[str, Any]], last: Tensor) -> dict[str, Any]:
    """Summarise the test accuracy of other iterates than the last: chosen on held-out images, and best on test.

    Args:
        history: measurements during training, each with accuracies "held_out" and "test" of every network.
        last: test accuracy of every network after the last epoch, (n,).

    Returns:
        "chosen_on_held_out", honest, and "best_on_test", which knows what it is measured on and is an upper bound only.
        Empty without a history.

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
    """Lay results out as a Markdown table, in per cent."""
    (method, last), *_ = results["accuracy"].items()
    columns = {
        "last iterate": last,
        "chosen on held-out images": results.get("chosen_on_held_out"),
        "best on test (an upper bound)": results.get("best_on_test"),
    }
    cells = [f"{100 * v['mean']:.1f} ± {100 * v['std']:.1f}" if v else "-" for v in columns.values()]
    lines = [["set", "network", "networks", *columns], ["---"] * 6]
    lines.append([method, str(results["settings"].get("network", "own")), str(last["n"]), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
