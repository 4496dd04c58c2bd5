"""``ftd import``: a synthetic set from a file of images and one of labels, as this field's public code writes them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ftd_lightning.data import DistillationDataModule, SyntheticSet
from ftd_lightning.data.datasets import unit_range
from ftd_lightning.data.files import versions
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _read_safetensors(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise InputError(f"{path}: holds {len(names)} tensors, a file of one is needed")
            tensor: Tensor = file.get_tensor(names[0])
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from error
    return tensor


def _read_numpy(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several arrays")
        # torch has no arrays of the other byte order.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise InputError(f"{path}: not one plain array of numbers that numpy.save wrote") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A foreign file can make the reader stumble in any way. Its own advice, to load with code allowed, is left out.
    except Exception as error:
        raise InputError(
            f"{path}: not a plain tensor that torch.save wrote: it is broken or would run code when read, and was not "
            "read; save the tensor alone"
        ) from error


def read_tensor(path: Path) -> Tensor:
    """Read a file of one tensor; no code that it may carry runs.

    Args:
        path: ``.npy``, ``.safetensors``, or anything else for what ``torch.save`` wrote.

    Returns:
        A dense tensor on the CPU, of integers or real numbers.

    Raises:
        InputError: for a file that is missing, broken, pickled code, or anything but one such tensor.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    read = {".npy": _read_numpy, ".safetensors": _read_safetensors}.get(path.suffix.lower(), _read_torch)
    found = read(path)
    if not isinstance(found, torch.Tensor):
        raise InputError(f"{path}: holds a {type(found).__name__}, a file of one tensor is needed")
    plain = found.layout == torch.strided and found.device.type == "cpu"
    if not plain or found.dtype not in (*INTEGERS, *FLOATS):
        raise InputError(f"{path}: holds a {found.layout} tensor of {found.dtype}, dense numbers are needed")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{path}: holds values that are not finite")
    return found.detach().contiguous()


def read_images(path: Path, shape: tuple[int, int, int], *, pictures: bool) -> Tensor:
    """Read images.

    Args:
        path: see :func:`read_tensor`.
        shape: (C, H, W) that they must have.
        pictures: they are in [0, 1], or uint8; else what networks see, floats of any range.

    Returns:
        (N, C, H, W) float32.

    Raises:
        InputError: for another shape, type or range.
    """
    images = read_tensor(path)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        raise InputError(f"{path}: has shape {tuple(images.shape)}, (N, {', '.join(map(str, shape))}) is needed")
    if images.dtype not in FLOATS and not (pictures and images.dtype == torch.uint8):
        raise InputError(f"{path}: holds {images.dtype}, images are floats, or uint8 with --pictures")
    images = unit_range(images).float()
    low, high = (float(value) for value in torch.aminmax(images))
    if pictures and not 0 <= low <= high <= 1:
        raise InputError(
            f"{path}: values run from {low:.4g} to {high:.4g}, so these are no pictures in [0, 1]; "
            "were they --standardized or --whitened?"
        )
    return images


def read_labels(path: Path, count: int, num_classes: int, *, logits: bool) -> Tensor:
    """Read labels.

    Args:
        path: see :func:`read_tensor`.
        count: N, the number of images.
        num_classes: K.
        logits: soft labels are scores before the softmax, as learned labels are kept by some code.

    Returns:
        (N,) int64, or (N, K) float32 probabilities.

    Raises:
        InputError: for another number, shape, type or range.
    """
    labels = read_tensor(path)
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise InputError(f"{path}: has shape {tuple(labels.shape)}, labels of {count} images are needed")
    if labels.ndim == 1:
        if labels.dtype not in INTEGERS:
            raise InputError(
                f"{path}: holds {labels.dtype}, classes are integers and soft labels have {num_classes} columns"
            )
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            raise InputError(f"{path}: labels run from {low} to {high}, classes from 0 to {num_classes - 1}")
        if logits:
            raise InputError(f"{path}: holds classes, --logits is for soft labels")
        return labels.long()
    if labels.shape[1] != num_classes or labels.dtype not in FLOATS:
        raise InputError(
            f"{path}: soft labels are floats of shape ({count}, {num_classes}), these are {labels.dtype} of "
            f"{tuple(labels.shape)}"
        )
    labels = labels.float().softmax(1) if logits else labels.float()
    if float(labels.min()) < 0 or not torch.allclose(labels.sum(1), torch.ones(count), atol=1e-3):
        raise InputError(
            f"{path}: rows are no probabilities (>= 0, sum 1); if they are scores before softmax: --logits"
        )
    return labels


def in_order_of(labels: Tensor, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Renumber labels whose classes stand in another order.

    Args:
        labels: (N,) classes or (N, K) probabilities, in the order of ``given``.
        given: K names.
        wanted: the same names in the order that is needed.

    Raises:
        InputError: if these are not the same names.

    Example:
        >>> in_order_of(torch.tensor([0, 1, 1]), ["b", "a"], ["a", "b"])
        tensor([1, 0, 0])
    """
    if sorted(given) != sorted(wanted):
        odd = sorted({*given} - {*wanted}) or sorted({*wanted} - {*given}) or ["one that is there twice"]
        raise InputError(f"--class-names has to hold the data set's {len(wanted)} names once each; check {odd[0]!r}")
    place = torch.tensor([list(wanted).index(name) for name in given])
    return place[labels] if labels.ndim == 1 else labels[:, place.argsort()]


def read_step_size(text: str | None) -> Tensor | None:
    """Take the step size from the command line: a number, a file of one number, or "none".

    Raises:
        InputError: where it is missing, or no number above 0.
    """
    if text is None:
        raise InputError(
            "such sets do not carry the learning rate that their images were learned with: give it with --step-size "
            "(a number, or a file of one), or leave it out on purpose with --step-size none"
        )
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        if not Path(text).is_file():
            raise InputError(f"--step-size {text}: neither a number, nor a file, nor none") from None
        tensor = read_tensor(Path(text))
        if tensor.numel() != 1:
            raise InputError(f"{text}: has shape {tuple(tensor.shape)}, a step size is one number") from None
        value = float(tensor)
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"--step-size {text}: has to be a finite number above 0")
    return torch.tensor(value)


def import_set(given: argparse.Namespace) -> SyntheticSet:
    """Read and check everything, then build the set; see :func:`main` for the arguments.

    Raises:
        InputError: for anything that does not fit; nothing is written then.
    """
    step_size = read_step_size(given.step_size)
    if given.read_as is None:
        raise InputError(
            "say what the images are: --whitened (by the data set's ZCA), --standardized (by its mean and std) or "
            "--pictures (in [0, 1])"
        )
    if not given.zca_eps > 0:
        raise InputError(f"--zca-eps {given.zca_eps}: has to be above 0")
    if given.out.exists():
        raise InputError(f"{given.out}: is there already; name another file")
    data = DistillationDataModule(
        given.dataset, root=str(given.root), val_fraction=0, zca=given.read_as == "whitened", zca_eps=given.zca_eps
    )
    shape = (data.in_channels, data.image_size, data.image_size)
    images = read_images(given.images, shape, pictures=given.read_as == "pictures")
    labels = read_labels(given.labels, len(images), data.num_classes, logits=given.logits)
    if given.class_names:
        labels = in_order_of(labels, given.class_names, data.class_names)
    if given.read_as == "whitened":
        # Last, for it may take minutes: the public code fits it on the whole training set, so val_fraction is 0.
        data.prepare_data()
        data.setup()
    elif given.read_as == "pictures":
        images = data.transform.apply(images)
    source = {"images": given.images.name, "labels": given.labels.name, "read_as": given.read_as}
    return SyntheticSet(
        images,
        labels,
        step_size=step_size,
        class_names=data.class_names,
        transform=data.transform,
        metadata={
            "method": "imported",
            "dataset": data.describe()["dataset"],
            "imported": {**source, "logits": True} if given.logits else source,
            "versions": versions(),
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ftd import",
        description="Make a synthetic set of a file of images and one of labels (torch.save, .npy or .safetensors, one "
        "tensor each). No code in them is run.",
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="(N, C, H, W)")
    parser.add_argument("labels", type=Path, metavar="LABELS", help="(N,) classes, or (N, K) probabilities")
    parser.add_argument("out", type=Path, metavar="OUT", help="the set to write, e.g. set.safetensors")
    parser.add_argument("--dataset", required=True, help="what it was distilled from, e.g. cifar10")
    parser.add_argument("--step-size", metavar="LR", help="the learned step size: a number, a file of one, or none")
    kinds = parser.add_mutually_exclusive_group()
    for kind, what in (
        ("whitened", "ZCA of the data set's training images was applied; it is fitted once and cached under --root"),
        ("standardized", "the data set's mean was subtracted and its std divided by"),
        ("pictures", "pictures in [0, 1], or uint8; they are standardised here, for networks see such images"),
    ):
        kinds.add_argument(f"--{kind}", dest="read_as", action="store_const", const=kind, help=what)
    parser.add_argument("--logits", action="store_true", help="soft labels are scores: apply the softmax")
    parser.add_argument("--class-names", nargs="+", metavar="NAME", help="order of LABELS, if not the data set's own")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set (default: data)")
    parser.add_argument("--zca-eps", type=float, default=0.1, help="of the whitening (default: 0.1)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd import``."""
    given = _parser().parse_args(arguments)
    synthetic = import_set(given)
    synthetic.save(given.out)
    pictures = synthetic.transform.invert(synthetic.images)
    inside = ((pictures >= 0) & (pictures <= 1)).float().mean()
    # Images read the wrong way lie mostly outside.
    print(f"{given.out}: {len(pictures)} images; undone, {100 * float(inside):.0f} % of their values lie in [0, 1]")
