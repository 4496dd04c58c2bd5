"""The table of data sets: a function for each name, which finds and describes it."""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING

import torch

from ftd_lightning.data.folder import find_folder
from ftd_lightning.data.imagenet import SUBSETS, find_subset, find_tiny_imagenet
from ftd_lightning.data.in_memory import find_images_file
from ftd_lightning.data.sources import OWN_IMAGES, ImageDataset, Parts, Pictures, Request, find_cifar10, find_cifar100
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable


def _load_digits() -> Parts:
    from sklearn.datasets import load_digits  # takes a second to import, which only the digits need

    bunch = load_digits()
    digits = Pictures(
        torch.from_numpy(bunch.images).float().div(16).unsqueeze(1), torch.from_numpy(bunch.target).long()
    )
    # Every fifth image in the order of classes: stratified to within one image, and the same in all versions.
    order = digits.labels.argsort(stable=True)
    is_test = torch.zeros(len(order), dtype=torch.bool)
    is_test[order[::5]] = True
    return digits.take((~is_test).nonzero().squeeze(1)), digits.take(is_test.nonzero().squeeze(1))


def find_digits(request: Request) -> ImageDataset:
    """Describe the 1,797 handwritten 8x8 digits that scikit-learn ships: 1,437 to train, 360 to test."""
    # mean and std: measured on the training part.
    return ImageDataset(tuple("0123456789"), 1, 8, (0.3058,), (0.3762,), _load_digits).at(request.image_size)


DATASETS: dict[str, Callable[[Request], ImageDataset]] = {
    "digits": find_digits,
    "cifar10": find_cifar10,
    "cifar100": find_cifar100,
    "tiny-imagenet": find_tiny_imagenet,
    **{name: partial(find_subset, name) for name in SUBSETS},
    "folder": find_folder,
    "images": find_images_file,
}


def check_name(name: str) -> None:
    """Refuse the name of a data set that is not in the table.

    Raises:
        InputError: for an unknown name; the nearest ones are offered.
    """
    if name in ("own", OWN_IMAGES):
        raise InputError(
            f"dataset={name!r} needs the images themselves: DistillationDataModule.from_datasets(train, test) or "
            "from_datamodule(datamodule) takes them"
        )
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.6) or sorted(DATASETS)
        raise InputError(f"unknown data set {name!r}: did you mean {' or '.join(map(repr, near))}?")


def get_dataset(name: str, request: Request | None = None) -> ImageDataset:
    """Find a data set by name.

    Args:
        name: a name of the table.
        request: where its files are, and the size of its images. "tiny-imagenet" and "folder" are described by their
            files, which are listed ("tiny-imagenet" is downloaded if missing, "folder" is decoded).

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
    return DATASETS[name](request or Request())
