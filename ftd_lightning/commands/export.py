"""``ftd export``: a set as pictures in class folders with a card, as ``ddranking``'s tensors, or as parameters."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from torchvision.transforms.functional import to_pil_image

from ftd_lightning.callbacks.tensorboard import picture_grid, visible_channels
from ftd_lightning.command_line import parse_command
from ftd_lightning.commands.info import describe_set, format_transform
from ftd_lightning.commands.parameters import NAME as PARAMETERS
from ftd_lightning.commands.parameters import export_parameters
from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import new_folder
from ftd_lightning.files.schema import label_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def class_major_order(synthetic: SyntheticSet) -> tuple[Tensor, int | None]:
    """Order images by class; return indices (N,) int64, and the number of images of each class; None: of unequal ones.

    An image's class is its label, or the most probable one. Where the most probable ones are not equally many, images
    keep their order if the set was made class by class: by a distillation, or by a selection of real images.
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
    return classes.argsort(stable=True), None


TENSORS_README = """\
Synthetic images, {of_each}class by class. images.pt holds them as networks see them: {transform}.
labels.pt holds {labels}; lr.pt the learning rate to train with.

ddranking: {reader}
ftd import images.pt labels.pt set.safetensors --dataset {dataset} {options} --step-size lr.pt
"""
UNEQUAL = "cannot read them: it counts on equally many images of each class"


def readme(synthetic: SyntheticSet, ipc: int | None) -> str:
    """Write the README.txt of the three tensors: what they are, and what their reader has to set."""
    described, soft = synthetic.transform.describe(), synthetic.labels.ndim == 2
    zca = described.get("kind") == "zca"
    options = f"--whitened --zca-eps {described['eps']}" if zca else "--standardized"
    dataset = synthetic.metadata.get("dataset", "DATASET")
    reader = f"ipc {ipc}, image_tensor images.pt, {'soft' if soft else 'hard'}_labels labels.pt, syn_lr lr.pt, "
    reader += f"use_zca {str(zca).lower()}{', soft_label_mode S, soft_label_criterion sce, temperature 1' * soft}"
    return TENSORS_README.format(
        of_each="" if ipc is None else f"{ipc} of each class, ",
        reader=UNEQUAL if ipc is None else reader,
        transform=format_transform(described),
        labels="logits, whose softmax at temperature 1 is the labels" if soft else "classes",
        dataset=dataset.get("name", "DATASET") if isinstance(dataset, dict) else dataset,
        options=options + (" --logits" if soft else ""),
    )


def export_tensors(path: Path, folder: Path, *, ema: bool = False) -> int:
    """Write a set as ``images.pt``, ``labels.pt`` and ``lr.pt``, a tensor each, with a README.txt; see :func:`export`.

    Labels are logits (N, K) float32, logarithms of probabilities, or classes (N,) int64. Of several step sizes it is
    the mean, as evaluations take it.
    """
    synthetic = SyntheticSet.load(path)
    images, labels, step_size = synthetic.chosen(ema=ema), synthetic.labels, synthetic.learning_rate
    if step_size is None:
        raise InputError(f"{path}: has no step size, which lr.pt holds; export it as pictures")
    if label_kind(labels, synthetic.metadata) == "target":
        raise InputError(f"{path}: its labels are targets of a regression, not probabilities, which labels.pt holds")
    order, ipc = class_major_order(synthetic)
    if ipc is None:
        print(f"ddranking {UNEQUAL}")
    if labels.ndim == 2:  # readers need finite values: a probability of 0 becomes -87.3
        labels = labels.clamp_min(torch.finfo(torch.float32).tiny).double().log().float()
    with new_folder(folder) as part:
        torch.save(images[order].contiguous(), part / "images.pt")
        torch.save(labels[order].contiguous(), part / "labels.pt")
        torch.save(torch.tensor(step_size), part / "lr.pt")
        (part / "README.txt").write_text(readme(synthetic, ipc), encoding="utf-8")
    return len(images)


# Folder names that Hugging Face datasets takes for a split, alone or next to one of "-._ 0-9".
SPLITS = re.compile(
    r"(?<![a-z])(training|train|validation|valid|val|dev|testing|test|evaluation|eval)(?![a-z])", re.IGNORECASE
)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Turn class names into folder names that are valid on any file system and sort in label order.

    Where the names would not be distinct or not sort in label order, all are prefixed with the label.

    Example:
        >>> folder_names(["ant", "bee/wasp"]), folder_names(["wasp", "Käfer"]), folder_names(["test", "train"])
        (['ant', 'bee_wasp'], ['0_wasp', '1_Kafer'], ['testclass', 'trainclass'])
    """
    names = []
    for name in class_names:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._")[:80] or "class"
        names.append(SPLITS.sub(r"\1class", plain))
    if len({name.lower() for name in names}) == len(names) and names == sorted(names):
        return names
    digits = len(str(len(names) - 1))
    return [f"{label:0{digits}d}_{name}" for label, name in enumerate(names)]


CARD = """\
---
{header}---

# {count} synthetic images of {dataset}

The 8-bit PNGs are a preview, rounded and clipped to what a picture can hold; train on the tensors in `set.safetensors`.
`metadata.jsonl` lists each picture's label, class, index into the tensors, and the probabilities of a soft label.

    ftd_lightning.SyntheticSet.load("set.safetensors").dataset({ema})
    datasets.load_dataset(".", split="train")
    torchvision.datasets.ImageFolder(".")  # labels are right where every class has an image

| | |
|---|---|
{rows}
"""


def card(path: Path, synthetic: SyntheticSet, class_names: Sequence[str], shown: Sequence[int], *, ema: bool) -> str:
    """Write the card of a set of pictures: the header for Hugging Face, how to read it, metadata."""
    # ClassLabel refuses two classes of one name; their folders differ.
    names = class_names if len(set(class_names)) == len(class_names) else folder_names(class_names)
    features: list[dict[str, Any]] = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}},
        {"name": "class", "dtype": "string"},
        {"name": "index", "dtype": "int64"},
        *([{"name": "probabilities", "sequence": "float64"}] if synthetic.labels.ndim == 2 else []),
    ]
    # load_dataset takes the features of image folders from the config alone. Without its list of files, a class called
    # "train" would be read alone, and the grid taken for an image.
    files = [{"split": "train", "path": ["metadata.jsonl", "*/*.png"]}]
    header = {
        "license": "unknown",
        "task_categories": ["image-classification"],
        "configs": [{"config_name": "default", "data_files": files, "features": features}],
    }
    rows = {name: text.replace("|", "\\|").replace("<", "&lt;") for name, text in describe_set(path).rows}
    if (count := synthetic.images.shape[1]) != len(shown):
        rows["channels"] = f"{', '.join(map(str, shown))} of {count}, from 0, in the PNGs; all in the tensors"
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000),
        count=len(synthetic.images),
        dataset=rows["data set"].split(" (")[0],
        rows="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
        ema="ema=True" if ema else "",
    )


def export_pictures(path: Path, folder: Path, *, ema: bool = False, channels: int | list[int] | None = None) -> int:
    """Write a set's images as PNGs; arguments and result are those of :func:`export`."""
    synthetic = SyntheticSet.load(path)
    shown = visible_channels(synthetic.images.shape[1], channels)
    pictures, labels = synthetic.pictures(ema=ema, channels=shown), synthetic.training_labels()
    classes = (labels if labels.ndim == 1 else labels.argmax(1)).tolist()
    known = synthetic.class_names
    class_names = [*known, *map(str, range(len(known), max(classes) + 1))]
    folders = folder_names(class_names)
    digits = len(str(len(classes) - 1))
    pixels = (pictures * 255).round().to(torch.uint8)
    with new_folder(folder) as part:
        lines = []
        for index, label in enumerate(classes):
            name = f"{folders[label]}/{index:0{digits}d}.png"
            (part / name).parent.mkdir(exist_ok=True)
            to_pil_image(pixels[index]).save(part / name)
            line: dict[str, Any] = {"file_name": name, "label": label, "class": class_names[label], "index": index}
            lines.append(line | ({"probabilities": labels[index].tolist()} if labels.ndim == 2 else {}))
        (part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        to_pil_image(picture_grid(pictures, labels, class_names=class_names)).save(part / "grid.png")
        (part / "README.md").write_text(card(path, synthetic, class_names, shown, ema=ema), encoding="utf-8")
        shutil.copyfile(path, part / "set.safetensors")
    return len(classes)


def export(
    path: Path,
    folder: Path,
    *,
    ema: bool = False,
    format: Literal["png", "tensors", "parameters"] = "png",  # noqa: A002
    channels: int | list[int] | None = None,
) -> int:
    """Write a set as PNGs in class folders, whitening or standardisation undone, or as tensors, as networks see them.

    Beside the PNGs are metadata.jsonl, grid.png, a card (README.md) and a copy of the set. The tensors are images.pt,
    labels.pt (logits, or classes) and lr.pt, class by class, with a README.txt: what ddranking reads. The parameters,
    pixels or what a decoder makes images of, are one small file, parameters.safetensors, without a whitening that ftd
    import fits again when it turns the file into a set.

    Args:
        path: a synthetic set, e.g. set.safetensors.
        folder: a new or empty folder; it appears whole or not at all.
        ema: the averaged images instead of the last ones.
        format: what to write, png, tensors or parameters.
        channels: one or three that PNGs show, numbered from 0, e.g. 3,2,1; by default the first three, or first of two.

    Returns:
        The number of images.
    """
    if format == "tensors":
        return export_tensors(path, folder, ema=ema)
    if format == "parameters":
        return export_parameters(path, folder, ema=ema)
    return export_pictures(path, folder, ema=ema, channels=channels)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd export``."""
    parsed = parse_command(export, "export", arguments)
    count = export(**parsed)
    if parsed["format"] == "parameters":
        size = (parsed["folder"] / PARAMETERS).stat().st_size
        print(f"{parsed['folder']}: {PARAMETERS}, {size:,} bytes, of {count} images")
    elif parsed["format"] == "tensors":
        print(f"{parsed['folder']}: {count} images, images.pt, labels.pt, lr.pt, README.txt")
    else:
        print(f"{parsed['folder']}: {count} pictures, metadata.jsonl, grid.png, README.md, set.safetensors")
