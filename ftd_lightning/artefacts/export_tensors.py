"""``ftd export --format tensors``: the three files that ``ddranking`` and other public code read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.artefacts.new_folder import new_folder
from ftd_lightning.data import SyntheticSet
from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.data.schema import is_number, label_kind
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FILES = ("images.pt", "labels.pt", "lr.pt", "README.txt")
DEFAULT_EPS = 0.1  # of ``ftd import``


def as_logits(probabilities: Tensor) -> Tensor:
    """Take the logarithm of probabilities, which a softmax at temperature 1 undoes.

    A probability of 0 becomes the smallest normal float's logarithm, -87.3: readers need finite values.

    Args:
        probabilities: (N, K) float32, each row of sum 1.

    Returns:
        (N, K) float32, finite.

    Example:
        >>> logits = as_logits(torch.tensor([[0.25, 0.75, 0.0]]))
        >>> torch.allclose(logits.softmax(1), torch.tensor([[0.25, 0.75, 0.0]]), atol=1e-7)
        True
    """
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).double().log().float()


def class_major_order(synthetic: SyntheticSet, where: object) -> tuple[Tensor, int]:
    """Find the order in which the images of class 0 come first, then those of class 1, and so on.

    An image's class is its label, or the most probable one. Where the most probable ones are not equally many, images
    stay where they are if the set was made class by class: by a distillation of ipc images per class, or by a selection
    of real images.

    Args:
        synthetic: the set.
        where: names it in an error.

    Returns:
        Indices (N,) int64, and the number of images of each class.

    Raises:
        InputError: for classes of different size.
    """
    labels, metadata = synthetic.labels, synthetic.metadata
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    count = labels.shape[1] if labels.ndim == 2 else max(len(synthetic.class_names), int(labels.max()) + 1)
    counts = classes.bincount(minlength=count)
    if bool((counts == counts[0]).all()):
        return classes.argsort(stable=True), int(counts[0])
    ipc, rest = divmod(len(labels), count)
    settings = metadata.get("settings", {})
    by_class = settings.get("ipc") == ipc or metadata.get("method") in BASELINES[:-1]
    if labels.ndim == 2 and by_class and not rest:
        return torch.arange(len(labels)), ipc
    raise InputError(
        f"{where}: has {int(counts.min())} to {int(counts.max())} images per class; readers of these tensors count on "
        "equally many of each"
    )


def _normalisation(description: dict[str, Any]) -> tuple[str, str]:
    """Say how images were normalised, and the option of ``ftd import`` for it."""
    if description.get("kind") == "zca":
        eps = description["eps"]
        option = "--whitened" + (f" --zca-eps {eps}" if eps != DEFAULT_EPS else "")
        return f"whitened (ZCA, eps {eps})", option
    if description.get("kind") == "standardization":
        return f"standardised (mean {description['mean']}, std {description['std']})", "--standardized"
    return f"normalised by {description.get('kind')}", "--standardized"


def readme(synthetic: SyntheticSet, ipc: int) -> str:
    """Write what a reader of the three tensors has to set.

    Args:
        synthetic: the set that was written.
        ipc: images of each class.
    """
    description, count = synthetic.transform.describe(), len(synthetic.images)
    normalised, option = _normalisation(description)
    zca, soft = description.get("kind") == "zca", synthetic.labels.ndim == 2
    dataset = synthetic.metadata.get("dataset", {})
    name = dataset.get("name", "DATASET") if isinstance(dataset, dict) else str(dataset)
    several = synthetic.step_size is not None and synthetic.step_size.numel() > 1
    rate = f"{synthetic.learning_rate:.6g}{', the mean of several' if several else ''}"
    options = f"--dataset {name} {option}{' --logits' if soft else ''} --step-size lr.pt"
    shape = f"({', '.join(map(str, synthetic.images.shape))})"
    lines = [
        f"Synthetic images distilled from {name}: {count // ipc} classes, {ipc} of each, in the order of the classes.",
        "",
        f"images.pt  {shape} float32, as networks see them: {normalised}.",
        "           Normalise them no further; test images have to be normalised in the same way.",
    ]
    if soft:
        lines += [
            f"labels.pt  ({count}, {count // ipc}) float32: logits, the logarithms of probabilities.",
            "           Their softmax at temperature 1 is the labels; at any other it is not.",
        ]
    else:
        lines += [f"labels.pt  ({count},) int64: classes."]
    lines += [
        f"lr.pt      float32 scalar: the learning rate to train with, {rate}.",
        "",
        "For ddranking:",
        f"- ipc {ipc}; image_tensor: images.pt; {'soft' if soft else 'hard'}_labels: labels.pt; syn_lr: lr.pt",
        f"- use_zca {str(zca).lower()}"
        + (": it whitens the test images by a whitening of its own, fitted anew" if zca else ""),
    ]
    if soft:
        lines += ["- soft_label_mode S, soft_label_criterion sce, temperature 1 (its default is another)"]
    lines += ["", "For ftd_lightning:", f"ftd import images.pt labels.pt set.safetensors {options}"]
    return "\n".join(lines) + "\n"


def export_tensors(path: Path, folder: Path, *, ema: bool = False) -> int:
    """Write a set as ``images.pt``, ``labels.pt`` and ``lr.pt``, each one tensor, with a README.txt.

    Images (N, C, H, W) float32 are as networks see them, class by class, equally many of each. Labels are logits (N, K)
    float32, see :func:`as_logits`, or classes (N,) int64. The step size is a float32 scalar; of several, their mean,
    as evaluations take it.

    Args:
        path: a synthetic set, e.g. set.safetensors.
        folder: a new or empty folder; it appears whole or not at all.
        ema: the averaged images instead of the last ones.

    Returns:
        The number of images.

    Raises:
        InputError: for a broken set, one without averaged images if these are asked for, one without a step size, with
            labels that are no probabilities, or with classes of different size; or a folder that is not empty.
    """
    synthetic = SyntheticSet.load(path)
    images, labels, step_size = synthetic.chosen(ema=ema), synthetic.labels, synthetic.learning_rate
    if not is_number(step_size):
        raise InputError(f"{path}: has no step size, which lr.pt holds; export it as pictures")
    if label_kind(labels, synthetic.metadata) == "target":
        raise InputError(f"{path}: its labels are targets of a loss of their own, no probabilities to be written")
    order, ipc = class_major_order(synthetic, path)
    written = labels if labels.ndim == 1 else as_logits(labels)
    with new_folder(folder) as part:
        torch.save(images[order].contiguous(), part / "images.pt")
        torch.save(written[order].contiguous(), part / "labels.pt")
        torch.save(torch.tensor(step_size), part / "lr.pt")
        (part / "README.txt").write_text(readme(synthetic, ipc), encoding="utf-8")
    return len(images)
