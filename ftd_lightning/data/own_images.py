"""Images that are given as objects: torch datasets, or pairs of tensors."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from tqdm.auto import tqdm

from ftd_lightning.data.census import resizing
from ftd_lightning.data.decoding import is_grey, pixels
from ftd_lightning.data.images import ImageDataset, Parts, Pictures, fingerprints, resized, unit_range
from ftd_lightning.data.pixel_statistics import measure
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ftd_lightning.contracts import ImageTransform

READ_TWICE = 4  # items that are read a second time, to notice random augmentation
EXPECTED = "pass pictures as uint8, uint16 or floats in [0, 1], or transform= for images that are normalised already"

Batch = tuple[Tensor, Tensor]  # pictures (B, C, H, W) and labels (B,), as given


def read_images(data: Any, part: str, *, image_size: int | None = None, transform: ImageTransform | None) -> Pictures:
    """Read a torch dataset of (image, label) or a pair of tensors into memory.

    Args:
        data: a Dataset whose images are Pillow images, tensors (C, H, W) or (H, W), or arrays (H, W, C) or (H, W); or a
            pair of tensors, images (N, C, H, W) or (N, H, W) and labels (N,).
        part: "train", "val" or "test", for messages.
        image_size: height and width to resize to; None: all images must have one size.
        transform: what the images have gone through already; None: they are pictures.

    Raises:
        InputError: for anything else, for images that are no pictures, and for wrong labels.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return joined([as_batch(data[0], data[1], part)], part, image_size=image_size, transform=transform)
    if isinstance(data, IterableDataset):
        return joined((_as_item(item, part) for item in data), part, image_size=image_size, transform=transform)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise InputError(
            f"{part}: a Dataset of (image, label) or a pair of tensors is needed, not {type(data).__name__}"
        )
    first = [_as_item(data[i], part) for i in range(min(READ_TWICE, len(data)))]
    warn_of_random(first, (_as_item(data[i], part) for i in range(len(first))), part)
    rest = tqdm(range(len(first), len(data)), desc=f"reading {part} images", unit="image", leave=False, delay=1)
    items = (_as_item(data[i], part) for i in rest)
    return joined([*first, *items], part, image_size=image_size, transform=transform)


def read_datasets(
    train: Any,
    test: Any,
    val: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    transform: ImageTransform | None = None,
) -> ImageDataset:
    """Read all parts and describe them; see :func:`read_images` and :func:`describe_images`."""
    parts = {
        part: read_images(data, part, image_size=image_size, transform=transform)
        for part, data in (("train", train), ("test", test), ("val", val))
        if data is not None
    }
    names = class_names or classes_of(train, parts["train"].labels)
    return describe_images(parts["train"], parts["test"], parts.get("val"), class_names=names, transform=transform)


def classes_of(dataset: Any, labels: Tensor) -> Sequence[str] | None:
    """Return the ``classes`` of a dataset, or of those that a Subset or ConcatDataset is made of; None without."""
    if isinstance(dataset, Subset):
        names = classes_of(dataset.dataset, labels)
        return names and names[: int(labels.max()) + 1]  # it may leave out the last classes
    if isinstance(dataset, ConcatDataset):
        first, *others = [classes_of(part, labels) for part in dataset.datasets]
        return first if all(other == first for other in others) else None
    return getattr(dataset, "classes", None)


def warn_of_random(first: Iterable[Batch], again: Iterable[Batch], part: str) -> None:
    """Warn where the same items differ when they are read a second time."""
    if any(not torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True)):
        rank_zero_warn(
            f"{part}: the same images differ when they are read twice. They are read once, so random augmentation in "
            "the dataset is applied once; leave it out, because modules augment every batch themselves (augment=)"
        )


def as_batch(images: Any, labels: Any, part: str) -> Batch:
    """Check a batch of images (B, C, H, W) or (B, H, W) with labels (B,).

    Raises:
        InputError: for other shapes.
    """
    if not isinstance(images, Tensor | np.ndarray) or images.ndim not in (3, 4):
        raise InputError(f"{part}: images must be a tensor (N, C, H, W) or (N, H, W), not {_shape(images)}")
    pictures, labels = torch.as_tensor(images).detach().cpu(), _as_labels(labels, part)
    pictures = pictures.unsqueeze(1) if pictures.ndim == 3 else pictures
    if labels.shape != pictures.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"{part}: labels must be {len(pictures)} integers, one per image, not {labels.dtype} {tuple(labels.shape)}"
        )
    return pictures, labels.long()


def _as_labels(labels: Any, part: str) -> Tensor:
    try:
        return torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        one = labels[0] if isinstance(labels, tuple | list | np.ndarray) and len(labels) else labels
        raise InputError(f"{part}: labels must be integers, not {one!r:.40}; number the classes from 0") from error


def _as_item(item: Any, part: str) -> Batch:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"{part}: items must be pairs (image, label), not {type(item).__name__}")
    image, label = item
    if isinstance(image, Image.Image):
        try:
            image = torch.from_numpy(pixels(image, channels=1 if is_grey(image) else 3).copy())  # uint16 of 16 bits
        except ValueError as error:
            raise InputError(f"{part}: {error}") from error
    elif isinstance(image, np.ndarray):
        image = torch.as_tensor(image)
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        raise InputError(f"{part}: an image must be a Pillow image or of shape (C, H, W), not {_shape(image)}")
    image = image if image.ndim == 3 else image.unsqueeze(0)
    return as_batch(image.unsqueeze(0), _as_labels(label, part).reshape(-1), part)


def _shape(value: Any) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def joined(
    batches: Iterable[Batch], part: str, *, image_size: int | None = None, transform: ImageTransform | None
) -> Pictures:
    """Join batches into one tensor each of pictures and labels.

    Grey pictures among coloured ones become coloured. Floats that are multiples of 1/255 become uint8, so that the same
    pictures are stored, and identified, in the same way with or without ``ToTensor``. uint16 stays, to be scaled by
    :func:`describe_images`, which knows all parts.

    Args:
        batches: as from :func:`as_batch`.
        part: for messages.
        image_size: height and width to resize to.
        transform: what the images have gone through already.

    Raises:
        InputError: for images of several sizes without ``image_size``, and for what are no pictures.
    """
    given, pictures = Counter[tuple[int, int]](), []
    for images, of in batches:
        given[images.shape[3], images.shape[2]] += len(images)
        pictures.append((_resize(_checked(images, part, transform), image_size), of))
    if not any(len(labels) for _, labels in pictures):
        raise InputError(f"{part}: contains no images")
    shapes = Counter(tuple(images.shape[1:]) for images, _ in pictures)
    sizes, channels = {shape[1:] for shape in shapes}, {shape[0] for shape in shapes}
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        some = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:3])
        raise InputError(f"{part}: images must be square and of one size, not {some}; image_size= resizes them")
    if len(channels) > 1 and channels != {1, 3}:
        raise InputError(f"{part}: images have {', '.join(map(str, sorted(channels)))} channels; all need the same")
    if len({images.dtype for images, _ in pictures}) > 1:
        raise InputError(f"{part}: images are of several types, such as uint8 and floats; {EXPECTED}")
    if image_size is not None and (told := resizing(given, image_size)):
        rank_zero_info(f"{part}: {told}")
    (size,), count = sizes, sum(len(labels) for _, labels in pictures)
    out, done = torch.empty(count, max(channels), *size, dtype=pictures[0][0].dtype), 0
    for images, _ in pictures:
        out[done : done + len(images)] = images  # grey ones are repeated in every channel
        done += len(images)
    return Pictures(out if transform else _as_bytes(out), torch.cat([labels for _, labels in pictures]))


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    if images.dtype == torch.uint16:
        return resized(images.float(), size).round().to(torch.uint16)
    return resized(images, size)


def _checked(images: Tensor, part: str, transform: ImageTransform | None) -> Tensor:
    if images.dtype in (torch.uint8, torch.uint16) and transform is None:
        return images
    if not images.is_floating_point():
        wrong = "transform= is for normalised images, which are floats" if transform else EXPECTED
        raise InputError(f"{part}: images are {images.dtype}; {wrong}")
    if transform is None and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise InputError(f"{part}: images have values from {low:.3g} to {high:.3g}; {EXPECTED}")
    return images.float()


def _as_bytes(pictures: Tensor) -> Tensor:
    if not pictures.is_floating_point():
        return pictures
    as_bytes = torch.empty(pictures.shape, dtype=torch.uint8)
    for to, chunk in zip(as_bytes.split(1000), pictures.split(1000), strict=True):
        to.copy_(chunk.mul(255).round())
        if not torch.equal(unit_range(to), chunk):
            return pictures
    return as_bytes


def describe_images(
    train: Pictures,
    test: Pictures,
    val: Pictures | None,
    *,
    class_names: Sequence[str] | None,
    transform: ImageTransform | None,
    maximum: int | None = None,
) -> ImageDataset:
    """Describe images in memory; their contents identify them.

    Those of uint16 are divided by their largest value, the "maximum" of the description.

    Args:
        train: as from :func:`read_images`.
        test: likewise.
        val: those that are held out; None: a share of the training images is.
        class_names: K names; None numbers the classes.
        transform: what the images have gone through already.
        maximum: divisor that has been applied to images of 16 bits; None: there was none.

    Raises:
        InputError: for labels other than 0 .. K-1, a class without a training image, or parts of different shapes.
    """
    parts = {"train": train, "test": test, **({} if val is None else {"val": val})}
    deep = [int(part.pictures.int().max()) for part in parts.values() if part.pictures.dtype == torch.uint16]
    if deep:
        maximum = max(1, *deep)  # all of them may be black
        parts = {name: _scaled(part, maximum) for name, part in parts.items()}
        train, test, val = parts["train"], parts["test"], parts.get("val")
    names = _class_names(train.labels, class_names)
    shape = tuple(train.pictures.shape[1:])
    for part, (pictures, labels) in parts.items():
        if tuple(pictures.shape[1:]) != shape:
            raise InputError(f"{part}: images are {tuple(pictures.shape[1:])}, those of train {shape}; see image_size=")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise InputError(
                f"{part}: labels go from {int(labels.min())} to {int(labels.max())}; {len(names)} classes need labels "
                f"from 0 to {len(names) - 1}"
            )
    for label, count in enumerate(train.labels.bincount(minlength=len(names)).tolist()):
        if not count:
            raise InputError(f"train: class {label} ({names[label]}) has no image; number the classes without gaps")
    identity: dict[str, Any] = {**fingerprints(train, test, val), **({} if val is None else {"val_fraction": None})}
    identity |= {} if maximum is None else {"maximum": maximum}
    moments = {"mean": [0.0] * shape[0], "std": [1.0] * shape[0]} if transform else measure(train.pictures)
    return ImageDataset(
        class_names=names,
        in_channels=shape[0],
        image_size=shape[1],
        mean=tuple(moments["mean"]),
        std=tuple(moments["std"]),
        load=partial(_both, train, test),
        identify=partial(dict, identity),
        held_out=None if val is None else partial(_given, val),
        transform=transform,
    )


def _scaled(part: Pictures, maximum: int) -> Pictures:
    deep = part.pictures.dtype == torch.uint16
    return Pictures(_as_bytes(part.pictures.float() / maximum), part.labels) if deep else part


def _given(val: Pictures) -> Pictures:
    return val


def _both(train: Pictures, test: Pictures) -> Parts:
    return train, test


def _class_names(labels: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(int(labels.max()) + 1)))
    # torchvision's ImageNet has several names per class.
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)
