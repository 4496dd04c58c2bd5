"""The table of data sets: what each is, and how its images are read."""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING

import torch

from ftd_lightning.data.cifar import CIFAR10_ROW, CIFAR100_ROW
from ftd_lightning.data.folder import find_folder
from ftd_lightning.data.imagenet import SUBSETS, describe_subset
from ftd_lightning.data.images import ImageDataset, Images, Request, sample_per_class, unit_range
from ftd_lightning.data.tiny_imagenet import find_tiny_imagenet
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["DATASETS", "ImageDataset", "Images", "Request", "get_dataset", "sample_per_class", "unit_range"]


def _digits(root: Path, download: bool) -> tuple[Images, Images]:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships (UCI, test part): 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits  # not at the top: a second that only the digits are worth

    bunch = load_digits()
    images = Images(torch.from_numpy(bunch.images).float().div(16).unsqueeze(1), torch.from_numpy(bunch.target).long())
    # Every fifth image in the order of classes: stratified to within one image, and fixed for good.
    order = images.labels.argsort(stable=True)
    is_test = torch.zeros(len(order), dtype=torch.bool)
    is_test[order[::5]] = True
    return images.take((~is_test).nonzero().squeeze(1)), images.take(is_test.nonzero().squeeze(1))


# A row is a description, or a function that finds it for a request.
DATASETS: dict[str, ImageDataset | Callable[[Request], ImageDataset]] = {
    # mean and std: measured on the training part.
    "digits": ImageDataset(tuple("0123456789"), 1, 8, (0.3058,), (0.3762,), _digits),
    "cifar10": CIFAR10_ROW,
    "cifar100": CIFAR100_ROW,
    "tiny-imagenet": find_tiny_imagenet,
    **{name: partial(describe_subset, name) for name in SUBSETS},
    "folder": find_folder,
}


def check_name(name: str) -> None:
    """Refuse the name of a data set that is not in the table.

    Raises:
        InputError: for an unknown name; the nearest ones are offered.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.6) or sorted(DATASETS)
        raise InputError(f"unknown data set {name!r}: did you mean {' or '.join(map(repr, near))}?")


def get_dataset(name: str, request: Request | None = None) -> ImageDataset:
    """Look a data set up.

    Args:
        name: a name of the table.
        request: where its files are, and the size of its images. "tiny-imagenet" and "folder" are described by their
            files, which are looked at (and for "tiny-imagenet" downloaded if missing, for "folder" decoded).

    Raises:
        InputError: for an unknown name; the nearest ones are offered. For files that are missing or in the wrong
            layout.

    Example:
        >>> get_dataset("cifar10").image_size
        32
        >>> get_dataset("imagewoof", Request(image_size=64)).image_size
        64
    """
    check_name(name)
    row, request = DATASETS[name], request or Request()
    return row.at(request.image_size) if isinstance(row, ImageDataset) else row(request)
