"""``ftd export --format tensors``: the three files that ``ddranking`` and other public code read."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from PIL import Image

from ftd_lightning.callbacks.tensorboard import picture_grid
from ftd_lightning.command_line import parse_command
from ftd_lightning.commands.info import Description, describe_set
from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import new_folder
from ftd_lightning.files.schema import is_number, label_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

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


# Folder names that Hugging Face datasets would take for a split, alone or next to one of "-._ 0-9".
SPLITS = re.compile(
    r"(?<![a-z])(training|train|validation|valid|val|dev|testing|test|evaluation|eval)(?![a-z])", re.IGNORECASE
)
PREVIEW = (
    "The 8-bit PNGs are a preview, rounded and clipped to what a picture can hold; the tensors in `set.safetensors` "
    "are the truth: train and compare on those."
)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Turn class names into folder names that are valid on any file system and sort in label order.

    Letters lose their accents, and anything but an ASCII letter, digit, dot or dash becomes "_". Where the names would
    not be distinct or not sort in label order, all are prefixed with the label, so that ImageFolder numbers them by
    label.

    Args:
        class_names: K names, in label order.

    Example:
        >>> folder_names(["ant", "bee/wasp"]), folder_names(["wasp", "Käfer"])
        (['ant', 'bee_wasp'], ['0_wasp', '1_Kafer'])
        >>> folder_names(["test", "train"])  # would be taken for splits
        ['testclass', 'trainclass']
    """
    names = []
    for name in class_names:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._")[:80] or "class"
        names.append(SPLITS.sub(r"\1class", plain))
    distinct = len({name.lower() for name in names}) == len(names)
    if distinct and names == sorted(names):
        return names
    digits = len(str(len(names) - 1))
    return [f"{label:0{digits}d}_{name}" for label, name in enumerate(names)]


def write_png(picture: Tensor, path: Path) -> None:
    """Write a picture (C, H, W) uint8, C being 1 or 3."""
    array = picture.squeeze(0) if len(picture) == 1 else picture.permute(1, 2, 0)
    Image.fromarray(array.contiguous().numpy()).save(path, format="PNG")


def _front_matter(synthetic: SyntheticSet, class_names: Sequence[str]) -> list[str]:
    """Return the card's header, as Hugging Face reads it: what the files are, and the columns of metadata.jsonl."""
    count = len(synthetic.images)
    size = "n<1K" if count < 1000 else "1K<n<10K" if count < 10_000 else "10K<n<100K"
    # ClassLabel refuses two classes of one name; their folders differ.
    names = class_names if len(set(class_names)) == len(class_names) else folder_names(class_names)
    features: list[dict[str, Any]] = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}},
        {"name": "class", "dtype": "string"},
        {"name": "index", "dtype": "int64"},
    ]
    if synthetic.labels.ndim == 2:
        features.append({"name": "probabilities", "sequence": "float64"})
    header = {
        "license": "unknown",
        "task_categories": ["image-classification"],
        "size_categories": [size],
        "tags": ["dataset-distillation", "synthetic"],
        "dataset_info": {"features": features},
        # Without this, only a class called "train" would be read, and the grid taken for an image without a label.
        # load_dataset takes the features of image folders from here alone.
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": ["metadata.jsonl", "*/*.png"]}],
                "features": features,
            }
        ],
    }
    return ["---", *yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000).splitlines(), "---", ""]


def card(synthetic: SyntheticSet, description: Description, class_names: Sequence[str], *, ema: bool) -> str:
    """Write the card: what the set is, a picture of it, its recorded scores, how to read it."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    def code(*lines: str) -> list[str]:
        return ["```python", *lines, "```", ""]

    rows = dict(description.rows)
    scores = [f"{name}: {cell(rows.pop(name))}" for name in ("scores", "chosen on") if name in rows]
    present = set((synthetic.labels if synthetic.labels.ndim == 1 else synthetic.labels.argmax(1)).tolist())
    lines = _front_matter(synthetic, class_names)
    lines += [f"# Synthetic images distilled from {cell(rows['data set'].split(' (')[0])}", ""]
    learned = ", moving averages of the learned ones" if ema else ""
    lines += [f"{len(synthetic.images)} images of {len(class_names)} classes{learned}. {PREVIEW}", ""]
    lines += ["![One column per class](grid.png)", "", "## Scores", ""]
    lines += [*(f"- {score}" for score in scores), ""] if scores else ["None are recorded in this set.", ""]
    lines += ["## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(text)} |" for name, text in rows.items()]
    lines += ["", "All settings: `ftd info --json set.safetensors`.", "", "## Reading it", "", "The tensors:", ""]
    lines += code(
        "from ftd_lightning import SyntheticSet",
        "",
        'synthetic = SyntheticSet.load("set.safetensors")',
        f"dataset = synthetic.dataset({'ema=True' if ema else ''})  # what networks see, and labels",
        "synthetic.step_size, synthetic.transform  # learning rate; transform for real images",
    )
    lines += ["The preview:", ""]
    lines += code(
        "from torchvision.datasets import ImageFolder",
        "",
        'ImageFolder(".")',
        "",
        "from datasets import load_dataset",
        "",
        'load_dataset(".", split="train")',
    )
    lines += ["`metadata.jsonl` lists each picture's label, class and index into the tensors."]
    if present != set(range(len(class_names))):
        lines += [
            "Some classes have no images. ImageFolder numbers folders, so only `metadata.jsonl` has the right labels."
        ]
    if synthetic.labels.ndim == 2:
        lines += [
            "Labels are soft: a picture is in the folder of its most probable class; `probabilities` lists them all."
        ]
    return "\n".join(lines) + "\n"


def export_pictures(path: Path, folder: Path, *, ema: bool = False) -> int:
    """Write a set's images as PNGs; see :func:`export`.

    Args:
        path: a synthetic set, e.g. set.safetensors.
        folder: a new or empty folder; it appears whole or not at all.
        ema: the averaged images instead of the last ones.

    Returns:
        The number of pictures.

    Raises:
        InputError: for a broken set, one without averaged images if these are asked for, images that a PNG cannot
            hold, or a folder that is not empty.
    """
    description, synthetic = describe_set(path), SyntheticSet.load(path)
    pictures, labels = synthetic.pictures(ema=ema), synthetic.training_labels()
    if pictures.shape[1] not in (1, 3):
        raise InputError(f"{path}: images have {pictures.shape[1]} channels, but a PNG holds 1 or 3")
    classes = (labels if labels.ndim == 1 else labels.argmax(1)).tolist()
    known = synthetic.class_names
    class_names = [*known, *map(str, range(len(known), max(classes) + 1))]
    folders = folder_names(class_names)
    digits = len(str(max(classes.count(label) for label in set(classes)) - 1))
    counts = dict.fromkeys(classes, 0)
    pixels = (pictures * 255).round().to(torch.uint8)
    with new_folder(folder) as part:
        lines = []
        for index, label in enumerate(classes):
            name = f"{folders[label]}/{counts[label]:0{digits}d}.png"
            counts[label] += 1
            (part / name).parent.mkdir(exist_ok=True)
            write_png(pixels[index], part / name)
            line: dict[str, Any] = {"file_name": name, "label": label, "class": class_names[label], "index": index}
            lines.append(line | ({"probabilities": labels[index].tolist()} if labels.ndim == 2 else {}))
        (part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        write_png(picture_grid(pictures, labels, class_names=class_names), part / "grid.png")
        (part / "README.md").write_text(card(synthetic, description, class_names, ema=ema), encoding="utf-8")
        shutil.copyfile(path, part / "set.safetensors")
    return len(classes)


def export(path: Path, folder: Path, *, ema: bool = False, format: Literal["png", "tensors"] = "png") -> int:  # noqa: A002
    """Write a set as PNGs in class folders, whitening or standardisation undone, or as tensors, as networks see them.

    Beside the PNGs are metadata.jsonl, grid.png, a card (README.md) and a copy of the set. The tensors are images.pt,
    labels.pt (logits, or classes) and lr.pt, class by class, with a README.txt: what ddranking reads.

    Args:
        path: a synthetic set, e.g. set.safetensors.
        folder: a new or empty folder; it appears whole or not at all.
        ema: the averaged images instead of the last ones.
        format: what to write, png or tensors.

    Returns:
        The number of images.

    Raises:
        InputError: for a set that cannot be written so, or a folder that is not empty.
    """
    return {"png": export_pictures, "tensors": export_tensors}[format](path, folder, ema=ema)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd export``."""
    parsed = parse_command(export, "export", arguments)
    count = export(**parsed)
    if parsed["format"] == "tensors":
        print(f"{parsed['folder']}: {count} images, {', '.join(FILES)}")
    else:
        print(f"{parsed['folder']}: {count} pictures, metadata.jsonl, grid.png, README.md, set.safetensors")
