"""Data sets: their images, names and statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ftd_lightning.contracts import ImageTransform


def is_cut(mode: str) -> bool:
    """Tell whether Pillow reads 8 of 16 bits, by a mode of a :class:`Census`."""
    return mode.endswith(";16") and mode != "I;16"


@dataclass(frozen=True)
class Census:
    """Counts over all image files of a folder.

    Attributes:
        files: number of files, unreadable ones included.
        sizes: files by (width, height) in pixels, as they are shown: after turning.
        modes: files by Pillow mode, such as "RGB", "L" or "I;16"; "RGB;16" and the like where 8 of 16 bits are read.
        turned: files whose EXIF orientation is applied.
        transparent: files with an alpha channel or a transparent colour, which are composited on white.
        bits: bits per value of the deepest file, 8 or 16.
        classes: files of each class, by name, in label order.
        unreadable: files that are not readable images.
        channels: 1 if all training images are grey, else 3.
        size: height and width in pixels that they get if none is asked for: the shorter side of the most common size of
            the training images, so that no detail is made up.
    """

    files: int
    sizes: Mapping[tuple[int, int], int]
    modes: Mapping[str, int]
    turned: int
    transparent: int
    bits: int
    classes: Mapping[str, int]
    unreadable: int
    channels: int
    size: int

    def lines(self) -> list[str]:
        """Describe the files in one line, and in a second one how they are changed, if they are.

        Example:
            >>> sizes, classes = {(64, 48): 3, (32, 32): 2}, {"cat": 4, "dog": 1}
            >>> first, second = Census(5, sizes, {"RGB": 4, "L": 1}, 2, 1, 8, classes, 0, 3, 48).lines()
            >>> first
            '5 images of 32 x 32 to 64 x 48 px in colour; 2 classes of 1 (dog) to 4 (cat)'
            >>> second
            '2 are turned upright by EXIF orientation; 1 is transparent, composited on white'
        """
        ends = [f"{width} x {height}" for width, height in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        size = " to ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else "unknown size"
        few, many = (pick(self.classes, key=lambda name: self.classes[name]) for pick in (min, max))
        least, most = self.classes[few], self.classes[many]
        each = f"{most} each" if least == most else f"{least} ({few}) to {most} ({many})"
        depth = "" if self.bits <= 8 else f", up to {self.bits} bits per value"
        colour = "in grey" if self.channels == 1 else "in colour"
        first = f"{self.files:,} images of {size} px {colour}{depth}; {len(self.classes)} classes of {each}"
        done = {
            "turned upright by EXIF orientation": self.turned,
            "transparent, composited on white": self.transparent,
            "read with 8 of their 16 bits": sum(self.modes[mode] for mode in self.modes if is_cut(mode)),
            "unreadable": self.unreadable,
        }
        told = [f"{count:,} {'is' if count == 1 else 'are'} {what}" for what, count in done.items() if count]
        return [first, "; ".join(told)] if told else [first]

    def resizing(self, size: int) -> str | None:
        """Say how resizing to squares changes the images; None where all have that size.

        Args:
            size: height and width in pixels that the images are resized to.
        """
        return resizing(self.sizes, size)

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON holds them."""
        return {**vars(self), "sizes": [[*size, count] for size, count in sorted(self.sizes.items())]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Census:
        """Build it again from what :meth:`as_json` returned."""
        sizes = Counter({(width, height): count for width, height, count in fields["sizes"]})
        return cls(**{**fields, "sizes": sizes})


def resizing(sizes: Mapping[tuple[int, int], int], size: int) -> str | None:
    """Say how many images are enlarged to squares, and how much their aspect ratio changes.

    Args:
        sizes: images by (width, height) in pixels.
        size: height and width in pixels that they are resized to.

    Returns:
        The line; None where no image is enlarged or squashed.

    Example:
        >>> resizing({(16, 16): 60, (64, 48): 45}, 48)
        'images become 48 x 48 px: 60 of 105 are enlarged; 45 of 105 are squashed, aspect ratio changed by up to 1.33'
    """
    count = sum(sizes.values())
    enlarged = sum(times for sides, times in sizes.items() if min(sides) < size)
    squashed = sum(times for sides, times in sizes.items() if sides[0] != sides[1])
    told = [f"{enlarged:,} of {count:,} are enlarged"] if enlarged else []
    if squashed:
        most = max(max(sides) / min(sides) for sides in sizes)
        told.append(f"{squashed:,} of {count:,} are squashed, aspect ratio changed by up to {most:.2f}")
    return f"images become {size} x {size} px: {'; '.join(told)}" if told else None


OWN_IMAGES = "own images"  # the name of data that is given as objects, in descriptions
CHUNK = 5000  # images resized at a time: bounds the memory that it takes

# ImageNet's constants, of pictures in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Part(NamedTuple):
    """The files of one part of a data set and their labels, in order."""

    files: list[Path]
    labels: list[int]


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
