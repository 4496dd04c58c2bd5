"""CIFAR-10 and CIFAR-100, as torchvision reads and downloads them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from ftd_lightning.data.images import ImageDataset, Parts, Pictures, Request
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

# The constants that this field uses: std is the mean of each image's own, not that of all pixels (.2470 .2435 .2616).
# CIFAR-100 uses those of CIFAR-10, too.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

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


def _part(title: str, source: type[CIFAR10], root: Path, download: bool, *, train: bool) -> Pictures:
    try:
        data = source(root, train=train, download=download)
    except (RuntimeError, URLError, OSError) as error:
        where = f"put the folder {source.base_folder} into {str(root)!r} (data.root)"
        if download:
            raise InputError(f"{title} cannot be downloaded ({error}): check the network, or {where}") from error
        raise InputError(f"{title} is missing or broken: {where}, or set data.download to true") from error
    return Pictures(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))


def _load(title: str, source: type[CIFAR10], root: Path, download: bool) -> Parts:
    return _part(title, source, root, download, train=True), _part(title, source, root, download, train=False)


def find_cifar10(request: Request) -> ImageDataset:
    """Describe CIFAR-10 without looking at files; ``load`` downloads it where it is missing."""
    load = partial(_load, "CIFAR-10", CIFAR10, request.root, request.download)
    return ImageDataset(CIFAR10_CLASSES, 3, 32, MEAN, STD, load).at(request.image_size)


def find_cifar100(request: Request) -> ImageDataset:
    """Describe CIFAR-100 with its fine labels, as :func:`find_cifar10` does CIFAR-10."""
    load = partial(_load, "CIFAR-100", CIFAR100, request.root, request.download)
    return ImageDataset(CIFAR100_CLASSES, 3, 32, MEAN, STD, load).at(request.image_size)
