"""Descriptions of data sets: their images, names and statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ftd_lightning.files.safetensors_io import fingerprint
from ftd_lightning.sizes import ImageSize, plain, sides, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ftd_lightning.contracts import ImageTransform


OWN_IMAGES = "own images"  # the name of data that is given as objects, in descriptions
CHUNK = 5000  # images resized at a time: bounds the memory that it takes


class Pictures(NamedTuple):
    """Labelled pictures of a data set: (N, C, H, W), uint8 or float32 in [0, 1], and labels (N,) int64."""

    pictures: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Pictures:
        """Select some of them by index, (n,) int64."""
        return Pictures(self.pictures[index], self.labels[index])


Parts = dict[str, Pictures]  # "train", "test" and, where images are given as held out, "val"


@dataclass(frozen=True)
class Request:
    """The place of a data set's files, and the form in which its pictures are wanted.

    Attributes:
        root: folder of its files.
        download: fetch missing files.
        image_size: pixels, or (height, width); None: the data set's own.
        test_fraction: share of every class that becomes the test part, in (0, 1), where the files name no such part.
        cache_dir: folder of decoded images; None: the user's cache folder.
        skip_broken: leave unreadable images out.
    """

    root: Path = Path("data")
    download: bool = True
    image_size: ImageSize | None = None
    test_fraction: float = 0.2
    cache_dir: str | Path | None = None
    skip_broken: bool = False


@dataclass(frozen=True)
class ImageDataset:
    """The description of a data set, and the function that reads it.

    Attributes:
        class_names: K names, in label order.
        in_channels: C.
        image_size: pixels, or (height, width) of rectangles.
        mean: per channel, of pictures in [0, 1]; used where images are not whitened.
        std: standard deviation per channel.
        load: returns "train", "test" and, where images are given as held out, "val"; processes that are spawned pickle
            it.
        native_size: the data set's own size; None: ``image_size``.
        contents: returns values that JSON holds, to tell the data from others of the same name; it may decode the
            images.
        transform: of images that are normalised already; None: they are pictures.
    """

    class_names: tuple[str, ...]
    in_channels: int
    image_size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[], Parts]
    native_size: ImageSize | None = None
    contents: Callable[[], Mapping[str, Any]] = dict
    transform: ImageTransform | None = None

    def at(self, image_size: ImageSize | None) -> ImageDataset:
        """Return the same data set with its pictures resized; None or its own size changes nothing."""
        if image_size is None or image_size == self.image_size:
            return self
        load, native_size = partial(_load_resized, self.load, image_size), self.native_size or self.image_size
        return replace(self, image_size=image_size, native_size=native_size, load=load)

    def fingerprint(self) -> dict[str, Any]:
        """Identify the pictures among those of the same name: by a size other than their own, and by their contents."""
        other = {} if self.native_size in (None, self.image_size) else {"image_size": plain(self.image_size)}
        return {**other, **self.contents()}


def _load_resized(load: Callable[[], Parts], size: ImageSize) -> Parts:
    return {name: Pictures(resized(pictures, size), labels) for name, (pictures, labels) in load().items()}


def fingerprints(parts: Mapping[str, Pictures]) -> dict[str, str]:
    """Hash the training and the test part, "fingerprint", and the given held-out images, if any, "held_out"."""
    held_out = {"held_out": fingerprint(*parts["val"])} if "val" in parts else {}
    return {"fingerprint": fingerprint(*parts["train"], *parts["test"]), **held_out}


def resized(pictures: Tensor, size: ImageSize) -> Tensor:
    """Resize pictures (N, C, H, W) to a size, bilinear with antialiasing, the aspect ratio squashed.

    Pillow resizes image files instead. Both decide the pixels of published sets, so neither can replace the other.
    """
    mode = InterpolationMode.BILINEAR
    return torch.cat([resize(chunk, [*sides(size)], mode, antialias=True) for chunk in pictures.split(CHUNK)])


def resizing(sizes: Mapping[tuple[int, int], int], size: ImageSize) -> str | None:
    """Say how many images, counted by (width, height), become larger or squashed at a size; None: none."""
    count, (height, width) = sum(sizes.values()), sides(size)
    ratios = {(own_width, own_height): own_width * height / (own_height * width) for own_width, own_height in sizes}
    enlarged = sum(times for own, times in sizes.items() if own[0] < width or own[1] < height)
    squashed = sum(times for own, times in sizes.items() if ratios[own] != 1)
    changes = [f"{enlarged:,} of {count:,} are enlarged"] if enlarged else []
    if squashed:
        most = max(max(ratio, 1 / ratio) for ratio in ratios.values())
        changes.append(f"{squashed:,} of {count:,} are squashed, aspect ratio changed by up to {most:.2f}")
    return f"images become {size_text(size)}: {'; '.join(changes)}" if changes else None


def unit_range(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures into float32 in [0, 1]; float ones are returned as they are."""
    return pictures.float().div(255) if pictures.dtype == torch.uint8 else pictures
