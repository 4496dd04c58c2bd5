"""``ftd export``: a set as pictures in class folders with a card, or as the tensors that ``ddranking`` reads."""

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
from ftd_lightning.commands.info import describe_set
from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import new_folder
from ftd_lightning.files.schema import label_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def as_logits(probabilities: Tensor) -> Tensor:
    """Take the logarithm of probabilities, which a softmax at temperature 1 undoes.

    A probability of 0 becomes the smallest normal float's logarithm, -87.3: readers need finite values.
    """
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).double().log().float()


def class_major_order(synthetic: SyntheticSet, where: object) -> tuple[Tensor, int]:
    """Find the order in which the images of class 0 come first, then those of class 1, and so on.

    An image's class is its label, or the most probable one. Where the most probable ones are not equally many, images
    keep their order if the set was made class by class: by a distillation, or by a selection of real images.

    Returns:
        Indices (N,) int64, and the number of images of each class.
    """
    labels, metadata = synthetic.labels, synthetic.metadata
    soft = labels.ndim == 2
    classes = labels.argmax(1) if soft else labels
    count = labels.shape[1] if soft else max(len(synthetic.class_names), int(labels.max()) + 1)
    counts = classes.bincount(minlength=count)
    if bool((counts == counts[0]).all()):
        return classes.argsort(stable=True), int(counts[0])
    ipc = len(labels) // count
    by_class = metadata.get("settings", {}).get("ipc") == ipc or metadata.get("method") in BASELINES[:-1]
    if soft and by_class and len(labels) == ipc * count:
        return torch.arange(len(labels)), ipc
    raise InputError(
        f"{where}: has {int(counts.min())} to {int(counts.max())} images per class; readers of these tensors count on "
        "equally many of each"
    )


TENSORS_README = """\
Synthetic images distilled from {name}: {classes} classes, {ipc} of each, in the order of the classes.

images.pt  {shape} float32, as networks see them: {normalised}.
           Normalise them no further; test images have to be normalised in the same way.
labels.pt  {labels}
lr.pt      float32 scalar: the learning rate to train with, {rate:.6g}{mean}.

For ddranking:
- ipc {ipc}; image_tensor: images.pt; {kind}_labels: labels.pt; syn_lr: lr.pt
- use_zca {zca}{soft}

For ftd_lightning:
ftd import images.pt labels.pt set.safetensors --dataset {name} {option} --step-size lr.pt
"""


def readme(synthetic: SyntheticSet, ipc: int) -> str:
    """Write the README.txt of the three tensors: what they are, and what their reader has to set."""
    described, count = synthetic.transform.describe(), len(synthetic.images)
    zca, soft = described.get("kind") == "zca", synthetic.labels.ndim == 2
    normalised, option = f"standardised (mean {described.get('mean')}, std {described.get('std')})", "--standardized"
    if zca:
        normalised, option = f"whitened (ZCA, eps {described['eps']})", f"--whitened --zca-eps {described['eps']}"
    dataset = synthetic.metadata.get("dataset", "DATASET")
    several = synthetic.step_size is not None and synthetic.step_size.numel() > 1
    logits = f"({count}, {count // ipc}) float32: logits, whose softmax at temperature 1 is the labels."
    return TENSORS_README.format(
        name=dataset.get("name", "DATASET") if isinstance(dataset, dict) else dataset,
        classes=count // ipc,
        ipc=ipc,
        shape=tuple(synthetic.images.shape),
        normalised=normalised,
        labels=logits if soft else f"({count},) int64: classes.",
        rate=synthetic.learning_rate,
        mean=", the mean of several" if several else "",
        kind="soft" if soft else "hard",
        zca="true: it fits a whitening of the test images anew" if zca else "false",
        soft="\n- soft_label_mode S, soft_label_criterion sce, temperature 1 (its default is another)" if soft else "",
        option=option + (" --logits" if soft else ""),
    )


def export_tensors(path: Path, folder: Path, *, ema: bool = False) -> int:
    """Write a set as ``images.pt``, ``labels.pt`` and ``lr.pt``, each one tensor, with a README.txt.

    Images (N, C, H, W) float32 are as networks see them, class by class, equally many of each. Labels are logits (N, K)
    float32, see :func:`as_logits`, or classes (N,) int64. The step size is a float32 scalar; of several, their mean,
    as evaluations take it. Arguments and result are those of :func:`export`.
    """
    synthetic = SyntheticSet.load(path)
    images, labels, step_size = synthetic.chosen(ema=ema), synthetic.labels, synthetic.learning_rate
    if step_size is None:
        raise InputError(f"{path}: has no step size, which lr.pt holds; export it as pictures")
    if label_kind(labels, synthetic.metadata) == "target":
        raise InputError(f"{path}: its labels are targets of a regression, not probabilities, which labels.pt holds")
    order, ipc = class_major_order(synthetic, path)
    with new_folder(folder) as part:
        torch.save(images[order].contiguous(), part / "images.pt")
        torch.save((labels if labels.ndim == 1 else as_logits(labels))[order].contiguous(), part / "labels.pt")
        torch.save(torch.tensor(step_size), part / "lr.pt")
        (part / "README.txt").write_text(readme(synthetic, ipc), encoding="utf-8")
    return len(images)


# Folder names that Hugging Face datasets would take for a split, alone or next to one of "-._ 0-9".
SPLITS = re.compile(
    r"(?<![a-z])(training|train|validation|valid|val|dev|testing|test|evaluation|eval)(?![a-z])", re.IGNORECASE
)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Turn class names into folder names that are valid on any file system and sort in label order.

    Letters lose their accents, and anything but an ASCII letter, digit, dot or dash becomes "_". Where the names would
    not be distinct or not sort in label order, all are prefixed with the label, so that ImageFolder numbers them by
    label.

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


CARD = """\
---
{header}---

# Synthetic images distilled from {dataset}

{count} images of {classes} classes{averaged}.
The 8-bit PNGs are a preview, rounded and clipped to what a picture can hold;
the tensors in `set.safetensors` are the truth: train and compare on those.

![One column per class](grid.png)

## Scores

{scores}

## Settings

| | |
|---|---|
{rows}

All settings: `ftd info --json set.safetensors`.

## Reading it

The tensors: `ftd_lightning.SyntheticSet.load("set.safetensors")`, with `.dataset({ema})`, `.step_size` and `.transform`
for real images. The preview: `torchvision.datasets.ImageFolder(".")` or `datasets.load_dataset(".", split="train")`.
`metadata.jsonl` lists each picture's label, class and index into the tensors.
"""


def card(path: Path, synthetic: SyntheticSet, class_names: Sequence[str], present: set[int], *, ema: bool) -> str:
    """Write the card of a set of pictures: header for Hugging Face, scores, settings, how to read it."""
    count, soft = len(synthetic.images), synthetic.labels.ndim == 2
    # ClassLabel refuses two classes of one name; their folders differ.
    names = class_names if len(set(class_names)) == len(class_names) else folder_names(class_names)
    features: list[dict[str, Any]] = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}},
        {"name": "class", "dtype": "string"},
        {"name": "index", "dtype": "int64"},
        *([{"name": "probabilities", "sequence": "float64"}] if soft else []),
    ]
    # load_dataset takes the features of image folders from the config alone. Without its list of files, a class called
    # "train" would be read alone, and the grid taken for an image.
    files = [{"split": "train", "path": ["metadata.jsonl", "*/*.png"]}]
    header = {
        "license": "unknown",
        "task_categories": ["image-classification"],
        "size_categories": ["n<1K" if count < 1000 else "1K<n<10K" if count < 10_000 else "10K<n<100K"],
        "tags": ["dataset-distillation", "synthetic"],
        "dataset_info": {"features": features},
        "configs": [{"config_name": "default", "data_files": files, "features": features}],
    }
    rows = {name: text.replace("|", "\\|").replace("<", "&lt;") for name, text in describe_set(path).rows}
    scores = [f"- {name}: {rows.pop(name)}" for name in ("scores", "chosen on") if name in rows]
    text = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000),
        dataset=rows["data set"].split(" (")[0],
        count=count,
        classes=len(class_names),
        averaged=", moving averages of the learned ones" if ema else "",
        scores="\n".join(scores) or "None are recorded in this set.",
        rows="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
        ema="ema=True" if ema else "",
    )
    if present != set(range(len(class_names))):
        text += (
            "Some classes have no images. ImageFolder numbers folders, so only `metadata.jsonl` has the right labels.\n"
        )
    if soft:
        text += "A picture is in the folder of its most probable class; `probabilities` lists its soft label.\n"
    return text


def export_pictures(path: Path, folder: Path, *, ema: bool = False) -> int:
    """Write a set's images as PNGs; arguments and result are those of :func:`export`."""
    synthetic = SyntheticSet.load(path)
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
        text = card(path, synthetic, class_names, set(classes), ema=ema)
        (part / "README.md").write_text(text, encoding="utf-8")
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
    """
    return {"png": export_pictures, "tensors": export_tensors}[format](path, folder, ema=ema)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd export``."""
    parsed = parse_command(export, "export", arguments)
    count = export(**parsed)
    if parsed["format"] == "tensors":
        print(f"{parsed['folder']}: {count} images, images.pt, labels.pt, lr.pt, README.txt")
    else:
        print(f"{parsed['folder']}: {count} pictures, metadata.jsonl, grid.png, README.md, set.safetensors")
