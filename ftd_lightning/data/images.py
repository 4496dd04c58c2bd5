"""Labelled pictures, and the description of a data set: what every source of images returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ftd_lightning.data.files import fingerprint
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ftd_lightning.contracts import ImageTransform
    from ftd_lightning.data.census import Census

CHUNK = 5000  # images resized at a time: bounds the memory that it takes

# ImageNet's constants, of pictures in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pictures(NamedTuple):
    """Labelled pictures, as a data set contains them.

    Attributes:
        pictures: (N, C, H, W), uint8 or float32 in [0, 1].
        labels: (N,) int64.
    """

    pictures: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Pictures:
        """Select some of them by index, (n,) int64."""
        return Pictures(self.pictures[index], self.labels[index])


Parts = tuple[Pictures, Pictures]  # training part, test part


@dataclass(frozen=True)
class Request:
    """Where a data set's files are, and in what form its pictures are wanted.

    Attributes:
        root: folder of its files.
        download: fetch what is missing.
        image_size: height and width in pixels, >= 1; None: the data set's own.
        test_fraction: share of every class that becomes the test part, in (0, 1), where the files name no such part.
        cache_dir: folder of decoded images; None: the user's cache folder.
    """

    root: Path = Path("data")
    download: bool = True
    image_size: int | None = None
    test_fraction: float = 0.2
    cache_dir: str | Path | None = None


@dataclass(frozen=True)
class ImageDataset:
    """The description of a data set, and the function that reads it.

    Attributes:
        class_names: K names, in label order.
        in_channels: C.
        image_size: height and width in pixels.
        mean: per channel, of pictures in [0, 1]; used where images are not whitened.
        std: likewise.
        load: ``load() -> (train, test)``. It can be pickled, for processes that are spawned.
        native_size: the size that it has if none is asked for; None: ``image_size``.
        identify: returns what tells the data from others of the same name; whatever JSON holds. It may have to decode
            the images.
        held_out: returns the pictures that are given as held out, and can be pickled; None: a share of the training
            part is held out.
        transform: where the "pictures" have gone through a transform already, that transform; else None.
        census: counts over the files of a "folder"; None for other data sets.
    """

    class_names: tuple[str, ...]
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[], Parts]
    native_size: int | None = None
    identify: Callable[[], Mapping[str, Any]] = dict
    held_out: Callable[[], Pictures] | None = None
    transform: ImageTransform | None = None
    census: Census | None = None

    def at(self, image_size: int | None) -> ImageDataset:
        """Return the same data set with its pictures resized; None or its own size changes nothing.

        Example:
            >>> from ftd_lightning.data.datasets import get_dataset
            >>> train, _ = get_dataset("digits").at(16).load()
            >>> train.pictures.shape
            torch.Size([1437, 1, 16, 16])
        """
        if image_size is None or image_size == self.image_size:
            return self
        return replace(
            self,
            image_size=image_size,
            native_size=self.native_size or self.image_size,
            load=partial(_load_resized, self.load, image_size),
            held_out=self.held_out and partial(_held_out_resized, self.held_out, image_size),
        )

    def describe(self) -> dict[str, Any]:
        """Describe what the name alone does not say: a size other than the data set's own, and its contents."""
        other = {} if self.native_size in (None, self.image_size) else {"image_size": self.image_size}
        return {**other, **self.identify()}


def _load_resized(load: Callable[[], Parts], size: int) -> Parts:
    train, test = load()
    return _resized(train, size), _resized(test, size)


def _held_out_resized(held_out: Callable[[], Pictures], size: int) -> Pictures:
    return _resized(held_out(), size)


def _resized(part: Pictures, size: int) -> Pictures:
    return Pictures(resized(part.pictures, size), part.labels)


def fingerprints(train: Pictures, test: Pictures, val: Pictures | None) -> dict[str, str]:
    """Hash the contents of a data set, wherever it comes from.

    Returns:
        "fingerprint" of the training and the test part and, where images are given as held out, their "held_out".
    """
    return {
        "fingerprint": fingerprint(*train, *test),
        **({} if val is None else {"held_out": fingerprint(*val)}),
    }


def resized(pictures: Tensor, size: int) -> Tensor:
    """Resize pictures (N, C, H, W) to (N, C, size, size), bilinear with antialiasing, the aspect ratio squashed.

    Image files are resized by Pillow instead while they are decoded, each from its own size; the results differ by at
    most 1/255. Both decide the pixels of published sets, so neither can replace the other.

    Example:
        >>> resized(torch.zeros(2, 1, 8, 6), 4).shape
        torch.Size([2, 1, 4, 4])
    """
    mode = InterpolationMode.BILINEAR
    return torch.cat([resize(chunk, [size, size], mode, antialias=True) for chunk in pictures.split(CHUNK)])


def unit_range(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures into float32 in [0, 1]; float ones are returned as they are.

    Example:
        >>> unit_range(torch.tensor([255], dtype=torch.uint8))
        tensor([1.])
    """
    return pictures.float().div(255) if pictures.dtype == torch.uint8 else pictures


def sample_per_class(labels: Tensor, count: int | float, generator: torch.Generator) -> Tensor:
    """Draw the same number of images, or the same share, of every class.

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
