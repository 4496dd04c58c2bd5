"""The table of data sets: what each is, and how its images are read."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from urllib.error import URLError

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Images(NamedTuple):
    """One part of a data set: pictures (N, C, H, W), uint8 or float32 in [0, 1], and labels (N,) int64."""

    pictures: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Images:
        """Keep some of them."""
        return Images(self.pictures[index], self.labels[index])


@dataclass(frozen=True)
class ImageDataset:
    """A row of the table.

    Attributes:
        class_names: K names, in label order.
        in_channels: C.
        image_size: height and width in pixels.
        mean: per channel, of pictures in [0, 1]; used where images are not whitened.
        std: likewise.
        load: ``load(root, download) -> (train, test)``.
    """

    class_names: tuple[str, ...]
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[Path, bool], tuple[Images, Images]]


def _digits(root: Path, download: bool) -> tuple[Images, Images]:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships (UCI, test part): 1,437 to train, 360 to test."""
    bunch = load_digits()
    images = Images(torch.from_numpy(bunch.images).float().div(16).unsqueeze(1), torch.from_numpy(bunch.target).long())
    # Every fifth image in the order of classes: stratified to within one image, and fixed for good.
    order = images.labels.argsort(stable=True)
    is_test = torch.zeros(len(order), dtype=torch.bool)
    is_test[order[::5]] = True
    return images.take((~is_test).nonzero().squeeze(1)), images.take(is_test.nonzero().squeeze(1))


def _cifar10(root: Path, download: bool) -> tuple[Images, Images]:
    def part(train: bool) -> Images:
        try:
            data = CIFAR10(root, train=train, download=download)
        except (RuntimeError, URLError, OSError) as error:
            where = f"put the folder cifar-10-batches-py into {str(root)!r} (data.root)"
            if download:
                raise InputError(f"CIFAR-10 cannot be downloaded ({error}): check the network, or {where}") from error
            raise InputError(f"CIFAR-10 is not there or broken: {where}, or set data.download to true") from error
        return Images(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))

    return part(True), part(False)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATASETS: dict[str, ImageDataset] = {
    # mean and std: measured on the training part.
    "digits": ImageDataset(tuple("0123456789"), 1, 8, (0.3058,), (0.3762,), _digits),
    # This line's constants: its std is the mean of each image's own, not that of all pixels (.2470 .2435 .2616).
    "cifar10": ImageDataset(CIFAR10_CLASSES, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _cifar10),
}


def get_dataset(name: str) -> ImageDataset:
    """Look a data set up.

    Raises:
        InputError: for an unknown name; the nearest ones are offered.

    Example:
        >>> get_dataset("cifar10").image_size
        32
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise InputError(f"unknown data set {name!r}: did you mean {' or '.join(map(repr, near))}?")
    return DATASETS[name]


def unit_range(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures into float32 in [0, 1]; float ones are given back.

    Example:
        >>> unit_range(torch.tensor([255], dtype=torch.uint8))
        tensor([1.])
    """
    return pictures.float().div(255) if pictures.dtype == torch.uint8 else pictures


def sample_per_class(labels: Tensor, count: int | float, generator: torch.Generator) -> Tensor:
    """Draw the same number, or the same share, of every class.

    Args:
        labels: (N,) int64.
        count: images of each class (int), or their share in [0, 1) (float).
        generator: decides which.

    Returns:
        Indices, class by class.

    Raises:
        InputError: if a class has fewer images.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1])
        >>> labels[sample_per_class(labels, 2, torch.Generator())]
        tensor([0, 0, 1, 1])
    """
    chosen = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        wanted = round(count * len(members)) if isinstance(count, float) else count
        if wanted > len(members):
            raise InputError(
                f"{wanted} images per class are asked for, but class {label} has {len(members)}: lower ipc"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    return torch.cat(chosen)
