"""Results of an evaluation: failed networks, held-out images that the set has seen, chosen iterates, files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.functional import cross_entropy

from ftd_lightning.contracts import data_source
from ftd_lightning.core.evaluation import mean_and_std
from ftd_lightning.core.ranks import from_all_ranks
from ftd_lightning.files.safetensors_io import replacing, write_json
from ftd_lightning.files.schema import markdown_table, per_cent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lightning.pytorch import Trainer
    from torch import Tensor, nn


class Fit(NamedTuple):
    """How well a network fits its training images: mean cross entropy and share of correct answers in [0, 1]."""

    loss: float
    accuracy: float
    guessing: float  # accuracy of always naming the most frequent class
    images: int


def failure(fit: Fit) -> str | None:
    """Say why a network failed: its loss is not finite, or its accuracy within two standard errors of guessing."""
    if not math.isfinite(fit.loss):
        return "its loss is not finite"
    # With few images two standard errors may reach 1, which is not guessing.
    most = min(fit.guessing + 2 * math.sqrt(fit.guessing * (1 - fit.guessing) / fit.images), math.nextafter(1, 0))
    if fit.guessing < 1 and fit.accuracy <= most:
        return f"its training accuracy, {100 * fit.accuracy:.1f} %, is no better than guessing"
    return None


@torch.no_grad()
def fits(networks: Sequence[nn.Module], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> list[Fit]:
    """Measure how well networks on a device, put into evaluation mode, fit their training batches.

    A batch has images (N, C, H, W), and classes (N,) or probabilities (N, K).
    """
    losses, right = (torch.zeros(len(networks), dtype=torch.float64, device=device) for _ in range(2))
    seen = []
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        classes, targets = (labels.argmax(1), labels.float()) if labels.ndim == 2 else (labels, labels)
        seen.append(classes)
        for index, network in enumerate(networks):
            weight = next(network.eval().parameters())
            logits = network(images.to(weight.dtype)).float()
            losses[index] += cross_entropy(logits, targets, reduction="sum")
            right[index] += (logits.argmax(1) == classes).sum()
    if not seen:
        return []
    frequencies = torch.cat(seen).bincount()
    count = int(frequencies.sum())
    guessing = int(frequencies.max()) / count
    each = zip(losses.tolist(), right.tolist(), strict=True)
    return [Fit(loss / count, correct / count, guessing, count) for loss, correct in each]


def summary(failed: Mapping[str, str], total: int) -> str:
    """Sum up the failures of so many networks in one line."""
    each = "; ".join(f"network {index}: {why}" for index, why in failed.items())
    return f"{len(failed)} of {total} networks did not learn the set, so their accuracy says nothing: {each}"


def check_learning(trainer: Trainer, networks: Iterable[nn.Module], device: torch.device, total: int) -> dict[str, str]:
    """Warn of networks of all ranks that did not learn their training images, and give the reasons by their numbers.

    ``networks`` are those that ``ranks_share`` deals out to this rank, of ``total``. Without training batches or a
    datamodule of the trainer nothing is found.
    """
    batches, data = trainer.train_dataloader, trainer.datamodule  # type: ignore[attr-defined]
    if batches is None and data_source(data) is not None:  # others may need a setup for training
        batches = data.train_dataloader()
    own = [] if batches is None else [failure(fit) for fit in fits(list(networks), batches, device)]
    if not own:
        return {}
    failed = {str(index): why for index, why in enumerate(from_all_ranks(own, total)) if why}
    if failed:
        rank_zero_warn(summary(failed, total))
    return failed


def held_out_seen(of_set: Any, here: Any) -> bool:
    """Tell by both descriptions whether a set was distilled from images that this data source holds out."""
    if not isinstance(of_set, dict) or not isinstance(here, dict) or not here.get("val_fraction"):
        return False
    if any(of_set.get(key) != here.get(key) for key in ("name", "fingerprint") if key in of_set and key in here):
        return False
    return any(of_set.get(key) != here.get(key) for key in ("val_fraction", "seed", "max_per_class"))


def stalls(accuracies: Sequence[float], patience: int) -> int:
    """Count how often a series has not risen above its maximum for ``patience`` values in a row.

    Example:
        >>> stalls([0.1, 0.3, 0.2, 0.3, 0.4, 0.4], patience=2)
        1
    """
    count, best, since = 0, -math.inf, 0
    for index, value in enumerate(accuracies):
        if value > best:
            best, since = value, index
        elif index - since >= patience:
            count, since = count + 1, index
    return count


def choose_iterates(history: Sequence[dict[str, Any]], last: Tensor) -> dict[str, Any]:
    """Summarise the test accuracy of other iterates than the last, (n,); empty without a history.

    The history lists measurements with accuracies "held_out" and "test" of every network. Returned are
    "chosen_on_held_out", and "best_on_test", which is chosen on the images that measure it: an upper bound.
    """
    if not history:
        return {}
    held_out, test = (torch.tensor([entry[part] for entry in history]) for part in ("held_out", "test"))
    chosen = test.gather(0, held_out.argmax(0, keepdim=True))[0]
    best = torch.maximum(test.max(0).values, last.cpu())
    return {"chosen_on_held_out": mean_and_std(chosen), "best_on_test": mean_and_std(best)}


def as_markdown(results: dict[str, Any]) -> str:
    """Format the results of an evaluation as a Markdown table, in per cent."""
    (method, last), *_ = results["accuracy"].items()
    chosen = "chosen on held-out images" + (" (seen by the set)" if results.get("held_out_seen") else "")
    columns = {
        "last iterate": last,
        **({"balanced": results["balanced_accuracy"]} if "balanced_accuracy" in results else {}),
        chosen: results.get("chosen_on_held_out"),
        "best on test (an upper bound)": results.get("best_on_test"),
    }
    cells = [per_cent(value) for value in columns.values()]
    network = str(results["settings"].get("network", "own"))
    table = markdown_table([["set", "network", "networks", *columns], [method, network, str(last["n"]), *cells]])
    return table + (f"\n\n{summary(results['failed'], last['n'])}\n" if results.get("failed") else "\n")


def result_summary(results: Mapping[str, Any]) -> str:
    """Sum up the results of an evaluation in words."""
    balanced = f", balanced {per_cent(results['balanced_accuracy'])} %" if "balanced_accuracy" in results else ""
    return f"test accuracy {per_cent(next(iter(results['accuracy'].values())))} %{balanced}"


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write the results of an evaluation as ``evaluation.json`` and as a table, ``evaluation.md``, and say so."""
    write_json(folder / "evaluation.json", results)
    with replacing(folder / "evaluation.md") as part:
        part.write_text(as_markdown(results), encoding="utf-8")
    rank_zero_info(f"wrote {folder / 'evaluation.json'}: {result_summary(results)}")
