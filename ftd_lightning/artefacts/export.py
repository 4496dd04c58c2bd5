"""``ftd export``: a synthetic set as PNGs in class folders, with metadata and a card, or as plain tensors."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path  # noqa: TC003 -- the command line reads signatures when it runs
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from PIL import Image

from ftd_lightning.artefacts.export_tensors import FILES, export_tensors
from ftd_lightning.artefacts.info import Description, describe_set
from ftd_lightning.artefacts.new_folder import new_folder
from ftd_lightning.callbacks.tensorboard import picture_grid
from ftd_lightning.command_line import parse_command
from ftd_lightning.data import SyntheticSet
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

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
