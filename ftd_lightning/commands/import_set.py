"""``ftd import``: a set from files of other programs, read without running code that such a file may contain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ftd_lightning.command_line import parse_command
from ftd_lightning.commands.parameters import import_parameters
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.sources import unit_range
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import TensorFile, versions
from ftd_lightning.files.synthetic_set import PARAMETERS
from ftd_lightning.sizes import sides

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Soft = Literal["probabilities", "logits", "targets"]


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:  # np.load leaves a broken file open
            array = np.load(file, allow_pickle=False)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))  # torch has one byte order
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            (name,) = file.keys()
            return file.get_tensor(name)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_tensor(path: Path) -> Tensor:
    """Read one dense, finite tensor (.npy, .safetensors or torch.save) to the CPU; no code in the file is run."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tensor = _read(path)
    except Exception as error:  # a foreign file can make readers raise anything; torch advises to allow code
        raise InputError(
            f"{path}: not one plain tensor of torch.save, numpy.save or safetensors: it is broken, holds several, or "
            "would run code when read, and was not read; save the tensor alone"
        ) from error
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path}: holds a {type(tensor).__name__}, a file of one tensor is needed")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in (*INTEGERS, *FLOATS):
        raise InputError(f"{path}: holds a {tensor.layout} tensor of {tensor.dtype}, dense numbers are needed")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: holds values that are not finite")
    return tensor.detach().contiguous()


def read_images(path: Path, shape: tuple[int, int, int], *, pictures: bool) -> Tensor:
    """Read images of a shape (C, H, W) as (N, C, H, W) float32: pictures in [0, 1], or floats as networks see them."""
    images = read_tensor(path)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        raise InputError(f"{path}: has shape {tuple(images.shape)}, (N, {', '.join(map(str, shape))}) is needed")
    if images.dtype not in FLOATS and not (pictures and images.dtype == torch.uint8):
        raise InputError(f"{path}: holds {images.dtype}, images are floats, or uint8 with --pictures")
    images = unit_range(images).float()
    low, high = (float(value) for value in torch.aminmax(images))
    if pictures and not 0 <= low <= high <= 1:
        raise InputError(
            f"{path}: runs from {low:.4g} to {high:.4g}, pictures are in [0, 1]; --standardized, --whitened?"
        )
    return images


def read_labels(path: Path, count: int, num_classes: int, *, soft: Soft = "probabilities") -> Tensor:
    """Read labels: classes (N,) int64, or (N, K) float32, targets of a regression or else probabilities."""
    labels = read_tensor(path)
    if labels.ndim == 1 and len(labels) == count and labels.dtype in INTEGERS:
        if soft != "probabilities":
            raise InputError(f"{path}: holds classes, --{soft} is for soft labels")
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            raise InputError(f"{path}: labels run from {low} to {high}, classes from 0 to {num_classes - 1}")
        return labels.long()
    if labels.shape != (count, num_classes) or labels.dtype not in FLOATS:
        raise InputError(
            f"{path}: holds {labels.dtype} {tuple(labels.shape)}; labels of {count} images are classes, integers "
            f"({count},), or soft labels, floats ({count}, {num_classes})"
        )
    labels = labels.float().softmax(1) if soft == "logits" else labels.float()
    if soft == "targets":
        return labels
    if float(labels.min()) < 0 or not torch.allclose(labels.sum(1), torch.ones(count), atol=1e-3):
        raise InputError(
            f"{path}: rows are not probabilities (>= 0, sum 1); pass --logits for scores before a softmax, or "
            "--targets for regression targets (KIP, FRePo, RFAD)"
        )
    return labels


def in_order_of(labels: Tensor, names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Renumber labels, (N,) classes or (N, K) probabilities, from the order of K ``names`` to the ``wanted`` one."""
    if sorted(names) != sorted(wanted):
        odd = sorted({*names} - {*wanted}) or ["one that is missing or occurs twice"]
        raise InputError(f"--class-names: list the data set's {len(wanted)} names once each; check {odd[0]!r}")
    place = torch.tensor([list(wanted).index(name) for name in names])
    return place[labels] if labels.ndim == 1 else labels[:, place.argsort()]


def read_step_size(text: str) -> Tensor | None:
    """Read the step size from the command line: a number above 0, a file of one, or "none"."""
    if text.lower() == "none":
        return None
    try:
        value = float(read_tensor(Path(text)) if Path(text).is_file() else text)
    except (ValueError, RuntimeError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"--step-size {text}: is a finite number above 0, a file of one, or none")
    return torch.tensor(value)


def import_set(
    images: Path,
    labels: Path,
    out: Path,
    *,
    dataset: str,
    step_size: str | None = None,
    whitened: bool = False,
    standardized: bool = False,
    pictures: bool = False,
    soft: Soft = "probabilities",
    class_names: Sequence[str] = (),
    root: Path = Path("data"),
    zca_eps: float = 0.1,
) -> SyntheticSet:
    """Make a synthetic set of a file of images and one of labels (torch.save, .npy or .safetensors, one tensor each).

    No code in these files is run. They record neither step size nor preprocessing; pass both. A set of the parameters
    that ftd export --format parameters wrote needs neither: ftd import parameters.safetensors set.safetensors.

    Args:
        images: (N, C, H, W).
        labels: (N,) classes, or (N, K) soft labels.
        out: the set to write, e.g. set.safetensors.
        dataset: what it was distilled from, e.g. cifar10.
        step_size: the learned step size: a number, a file of one, or none.
        whitened: ZCA of the data set's training images was applied; it is fitted once and cached.
        standardized: the data set's mean was subtracted and its std divided by.
        pictures: the images are in [0, 1], or uint8; they are standardised here, because networks see such images.
        soft: the kind of soft labels; --logits (apply the softmax) and --targets (of a regression) are short for it.
        class_names: order of the labels, if not the data set's own.
        root: folder of the data set.
        zca_eps: of the whitening.
    """
    if step_size is None:
        raise InputError("such files do not record the step size: pass --step-size, a number, a file of one, or none")
    learned_step_size = read_step_size(step_size)
    flags = {"whitened": whitened, "standardized": standardized, "pictures": pictures}
    read_as = [name for name, given in flags.items() if given]
    if len(read_as) != 1:
        raise InputError(
            "such files do not record the preprocessing of their images: pass one of --whitened (by the data set's "
            "ZCA), --standardized (by its mean and std) and --pictures (in [0, 1])"
        )
    if out.exists():
        raise InputError(f"{out}: is there already; name another file")
    data = DistillationDataModule(dataset, root=str(root), val_fraction=0, zca=whitened, zca_eps=zca_eps)
    shape = (data.in_channels, *sides(data.image_size))
    values = read_images(images, shape, pictures=pictures)
    targets = read_labels(labels, len(values), data.num_classes, soft=soft)
    if class_names:
        targets = in_order_of(targets, class_names, data.class_names)
    if whitened:
        # Last, because it may take minutes. Public code fits it on the whole training set, so val_fraction is 0.
        data.setup()
    elif pictures:
        values = data.transform.apply(values)
    source = {"images": images.name, "labels": labels.name, "read_as": read_as[0]}
    synthetic = SyntheticSet(
        values,
        targets,
        step_size=learned_step_size,
        class_names=data.class_names,
        transform=data.transform,
        metadata={
            "method": "imported",
            "dataset": data.describe()["dataset"],
            "imported": source if soft == "probabilities" else {**source, soft: True},
            **({"label_kind": "target"} if soft == "targets" else {}),
            "versions": versions(),
        },
    )
    synthetic.save(out)
    return synthetic


def _are_parameters(arguments: Sequence[str]) -> bool:
    """Tell whether a file of parameters is given; of two files alone the first has to be one."""
    if len(arguments) == 2 and arguments[0].endswith(".safetensors"):
        return True

    def is_one(argument: str) -> bool:
        with suppress(InputError):
            return TensorFile(Path(argument)).kind == PARAMETERS
        return False

    return any(is_one(argument) for argument in arguments if not argument.startswith("-"))


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd import``."""
    if _are_parameters(arguments):
        given = parse_command(import_parameters, "import", arguments)
        synthetic, same = import_parameters(**given)
        how = "bit for bit" if same else "not bit for bit (another torch, processor or decoder decoded them)"
        print(f"{given['out']}: {len(synthetic.images)} images, {how} those that were exported")
        return
    short = {"--logits": "--soft=logits", "--targets": "--soft=targets"}
    parsed = parse_command(import_set, "import", [short.get(argument, argument) for argument in arguments])
    synthetic = import_set(**parsed)
    pictures = synthetic.transform.invert(synthetic.images)
    inside = ((pictures >= 0) & (pictures <= 1)).float().mean()
    # With the wrong preprocessing, most lie outside.
    print(f"{parsed['out']}: {len(pictures)} images; undone, {100 * float(inside):.0f} % of their values lie in [0, 1]")
