"""The table of data sets: a function for each name, which finds and describes it."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from ftd_lightning.data.folder import find_folder
from ftd_lightning.data.imagenet import SUBSETS, find_subset, find_tiny_imagenet
from ftd_lightning.data.in_memory import find_images_file
from ftd_lightning.data.sources import OWN_IMAGES, ImageDataset, Parts, Pictures, Request
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable


def _load_digits() -> Parts:
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    digits = Pictures(images.float().div(16).unsqueeze(1), labels.long())
    # Every fifth image in the order of classes: stratified to within one image, and the same in all versions.
    is_test = torch.zeros(len(digits.labels), dtype=torch.bool)
    is_test[digits.labels.argsort(stable=True)[::5]] = True
    return {"train": digits.take((~is_test).nonzero().squeeze(1)), "test": digits.take(is_test.nonzero().squeeze(1))}


def find_digits(request: Request) -> ImageDataset:
    """Describe 1,797 handwritten digits of 8 x 8 px, 16 levels of grey: 1,437 to train, 360 to test.

    The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning
    Repository, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0, in the order of scikit-learn.
    """
    # mean and std: measured on the training part.
    return ImageDataset(tuple("0123456789"), 1, 8, (0.3058,), (0.3762,), _load_digits).at(request.image_size)


# The constants that this field uses: std is the mean of each image's own, not that of all pixels (.2470 .2435 .2616).
# CIFAR-100 uses those of CIFAR-10, too.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The fine labels.
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905  a hundred quoted names are harder to read
)


def _load_cifar(title: str, source: type[CIFAR10], root: Path, download: bool) -> Parts:
    try:
        parts = {name: source(root, train=name == "train", download=download) for name in ("train", "test")}
    except (RuntimeError, URLError, OSError) as error:
        where = f"put the folder {source.base_folder} into {str(root)!r} (data.root)"
        if download:
            raise InputError(f"{title} cannot be downloaded ({error}): check the network, or {where}") from error
        raise InputError(f"{title} is missing or broken: {where}, or set data.download to true") from error
    return {
        name: Pictures(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for name, part in parts.items()
    }


def find_cifar(title: str, source: type[CIFAR10], names: tuple[str, ...], request: Request) -> ImageDataset:
    """Describe CIFAR-10, or CIFAR-100 with its fine labels, without looking at files; ``load`` downloads them."""
    load = partial(_load_cifar, title, source, request.root, request.download)
    return ImageDataset(names, 3, 32, CIFAR_MEAN, CIFAR_STD, load).at(request.image_size)


DATASETS: dict[str, Callable[[Request], ImageDataset]] = {
    "digits": find_digits,
    "cifar10": partial(find_cifar, "CIFAR-10", CIFAR10, CIFAR10_CLASSES),
    "cifar100": partial(find_cifar, "CIFAR-100", CIFAR100, CIFAR100_CLASSES),
    "tiny-imagenet": find_tiny_imagenet,
    **{name: partial(find_subset, name) for name in SUBSETS},
    "folder": find_folder,
    "images": find_images_file,
}


def check_name(name: str) -> None:
    """Refuse the name of a data set that is not in the table; the nearest ones are offered."""
    if name in ("own", OWN_IMAGES):
        raise InputError(
            f"dataset={name!r} needs the images themselves: DistillationDataModule.from_datasets(train, test) or "
            "from_datamodule(datamodule) takes them"
        )
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.6) or sorted(DATASETS)
        raise InputError(f"unknown data set {name!r}: did you mean {' or '.join(map(repr, near))}?")


def get_dataset(name: str, request: Request | None = None) -> ImageDataset:
    """Find a data set by its name in the table; an InputError refuses an unknown name, and files that are missing.

    Example:
        >>> get_dataset("imagewoof", Request(image_size=64)).image_size
        64
    """
    check_name(name)
    return DATASETS[name](request or Request())
