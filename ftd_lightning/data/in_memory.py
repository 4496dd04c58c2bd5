"""Images that are given as objects: tensors, datasets, a DataModule; and the file that keeps them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)
from tqdm.auto import tqdm

from ftd_lightning.data.decoding import is_grey, measure, pixels
from ftd_lightning.data.sources import ImageDataset, Parts, Pictures, fingerprints, resized, resizing, unit_range
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors
from ftd_lightning.files.schema import NAMES, check_metadata
from ftd_lightning.sizes import as_size, sides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from lightning.pytorch import LightningDataModule, Trainer

    from ftd_lightning.contracts import ImageTransform
    from ftd_lightning.data.sources import Request
    from ftd_lightning.sizes import ImageSize


KIND = "images"
FILE = "images.safetensors"


def write_images_file(dataset: ImageDataset, folder: Path) -> Path:
    """Write all parts of a data set to ``images.safetensors`` of a folder; docs/formats.md says what it holds."""
    tensors: dict[str, Tensor] = {}
    for name, (pictures, labels) in dataset.load().items():
        tensors |= {f"{name}_images": pictures, f"{name}_labels": labels}
    path = folder / FILE
    maximum = {key: value for key, value in dataset.contents().items() if key == "maximum"}
    write_tensors(path, tensors, kind=KIND, metadata={"class_names": list(dataset.class_names), **maximum})
    return path


def find_images_file(request: Request) -> ImageDataset:
    """Describe the data set in ``images.safetensors`` under root; its contents identify it."""
    path = request.root / FILE
    file = TensorFile(path, kind=KIND)
    check_metadata(file.metadata, {"class_names": NAMES}, path, required=("class_names",))
    parts = {
        name: read_images((file[f"{name}_images"], file[f"{name}_labels"]), f"{path}: {name}", transform=None)
        for name in ("train", "test", "val")
        if name != "val" or "val_images" in file.names
    }
    maximum = file.metadata.get("maximum")
    names = file.metadata["class_names"]
    return describe_images(parts, class_names=names, transform=None, maximum=maximum).at(request.image_size)


READ_TWICE = 4  # items that are read a second time, to notice random augmentation
EXPECTED = "pass pictures as uint8, uint16 or floats in [0, 1], or transform= for images that are normalised already"

Batch = tuple[Tensor, Tensor]  # pictures (B, C, H, W) and labels (B,), as given


def read_images(
    data: Any, part: str, *, image_size: ImageSize | None = None, transform: ImageTransform | None
) -> Pictures:
    """Read a torch dataset of (image, label) or a pair of tensors into memory, resized to ``image_size``.

    Images are Pillow images, tensors (C, H, W) or (H, W), arrays (H, W, C) or (H, W); or all of them, (N, C, H, W) or
    (N, H, W). They are pictures, or with a ``transform`` normalised already. ``part`` is named in messages.
    """
    batches: Iterable[Batch]
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        batches = [as_batch(data[0], data[1], part)]
    elif isinstance(data, IterableDataset):
        batches = (_as_item(item, part) for item in data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        first = [_as_item(data[i], part) for i in range(min(READ_TWICE, len(data)))]
        warn_of_random(first, (_as_item(data[i], part) for i in range(len(first))), part)
        rest = tqdm(range(len(first), len(data)), desc=f"reading {part} images", unit="image", leave=False, delay=1)
        batches = chain(first, (_as_item(data[i], part) for i in rest))  # each is resized when it is read
    else:
        raise InputError(f"{part}: must be a Dataset of (image, label) or a pair of tensors, not {type(data).__name__}")
    return joined(batches, part, image_size=image_size, transform=transform)


def read_datasets(
    train: Any,
    test: Any,
    val: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: ImageSize | None = None,
    transform: ImageTransform | None = None,
) -> ImageDataset:
    """Read all parts and describe them; see :func:`read_images` and :func:`describe_images`."""
    given = {"train": train, "test": test, **({} if val is None else {"val": val})}
    parts = {name: read_images(data, name, image_size=image_size, transform=transform) for name, data in given.items()}
    names = class_names or classes_of(train, parts["train"].labels)
    return describe_images(parts, class_names=names, transform=transform)


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
    """Check a batch of images (B, C, H, W) or (B, H, W) with labels (B,)."""
    if not isinstance(images, Tensor | np.ndarray) or images.ndim not in (3, 4):
        found = getattr(images, "shape", type(images).__name__)
        raise InputError(f"{part}: images must be Pillow images or tensors (C, H, W), this is {found}")
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
    """Turn an item of a dataset into a batch of one."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"{part}: items must be pairs (image, label), not {type(item).__name__}")
    image, label = item
    if isinstance(image, Image.Image):
        try:
            image = torch.from_numpy(pixels(image, channels=1 if is_grey(image) else 3).copy())  # uint16 of 16 bits
        except ValueError as error:
            raise InputError(f"{part}: {error}") from error
    elif isinstance(image, np.ndarray):
        image = image.transpose(2, 0, 1) if image.ndim == 3 else image
    images = image[None] if isinstance(image, Tensor | np.ndarray) else image
    return as_batch(images, _as_labels(label, part).reshape(-1), part)


def joined(
    batches: Iterable[Batch], part: str, *, image_size: ImageSize | None = None, transform: ImageTransform | None
) -> Pictures:
    """Join batches into one tensor each of pictures and labels; see :func:`read_images`.

    Floats that are multiples of 1/255 become uint8, so that pictures are identified in the same way with or without
    ``ToTensor``. uint16 stays, to be scaled by :func:`describe_images`, which knows all parts.
    """
    given, pictures, labels = Counter[tuple[int, int]](), list[Tensor](), list[Tensor]()
    for images, some in batches:
        given[images.shape[3], images.shape[2]] += len(images)
        pictures.append(_resize(_checked(images, part, transform), image_size))
        labels.append(some)
    if not any(map(len, labels)):
        raise InputError(f"{part}: contains no images")
    sizes, channels = {images.shape[2:] for images in pictures}, {images.shape[1] for images in pictures}
    if len(sizes) > 1:
        some_sizes = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:3])
        raise InputError(f"{part}: images must be of one size, not {some_sizes}; image_size= resizes them")
    if len(channels) > 1 and channels != {1, 3}:
        raise InputError(f"{part}: images have {', '.join(map(str, sorted(channels)))} channels; all need the same")
    if len({images.dtype for images in pictures}) > 1:
        raise InputError(f"{part}: images are of several types, such as uint8 and floats; {EXPECTED}")
    if image_size is not None and (change := resizing(given, image_size)):
        rank_zero_info(f"{part}: {change}")
    out = torch.empty(sum(map(len, labels)), max(channels), *sizes.pop(), dtype=pictures[0].dtype)
    for to, images in zip(out.split([len(some) for some in labels]), pictures, strict=True):
        to.copy_(images)  # grey ones are repeated in every channel
    return Pictures(out if transform else _as_bytes(out), torch.cat(labels))


def _resize(images: Tensor, size: ImageSize | None) -> Tensor:
    if size is None or tuple(images.shape[2:]) == sides(size):
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
    parts: Parts, *, class_names: Sequence[str] | None, transform: ImageTransform | None, maximum: int | None = None
) -> ImageDataset:
    """Describe images in memory; their contents, and the ``maximum`` that 16 bits were divided by, identify them."""
    deep = {name: part for name, part in parts.items() if part.pictures.dtype == torch.uint16}
    if deep:
        maximum = max(1, *(int(part.pictures.int().max()) for part in deep.values()))  # all of them may be black
        scaled = {
            name: Pictures(_as_bytes(part.pictures.float() / maximum), part.labels) for name, part in deep.items()
        }
        parts = {**parts, **scaled}
    train = parts["train"]
    names, shape = _class_names(train.labels, class_names), tuple(train.pictures.shape[1:])
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
    contents: dict[str, Any] = {**fingerprints(parts), **({"val_fraction": None} if "val" in parts else {})}
    contents |= {} if maximum is None else {"maximum": maximum}
    moments = {"mean": [0.0] * shape[0], "std": [1.0] * shape[0]} if transform else measure(train.pictures)
    return ImageDataset(
        class_names=names,
        in_channels=shape[0],
        image_size=as_size(shape[1:]),
        mean=tuple(moments["mean"]),
        std=tuple(moments["std"]),
        load=partial(dict, parts),
        contents=partial(dict, contents),
        transform=transform,
    )


def _class_names(labels: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(int(labels.max()) + 1)))
    # torchvision's ImageNet has several names per class.
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)


def read_datamodule(
    datamodule: LightningDataModule,
    trainer: Trainer | None,
    *,
    class_names: Sequence[str] | None = None,
    transform: ImageTransform | None = None,
) -> tuple[ImageDataset, int]:
    """Set another LightningDataModule up and read all its images; also return its batch size."""
    datamodule.trainer = trainer
    for stage in ("fit", "test"):
        datamodule.setup(stage)
    loaders = {part: _loader(datamodule, part) for part in ("train", "test", "val")}
    for part in ("train", "test"):
        if loaders[part] is None:
            raise InputError(f"{type(datamodule).__name__} has no {part}_dataloader, which is needed")
    read = {part: _read(loader, part, transform) for part, loader in loaders.items() if loader is not None}
    parts = {part: pictures for part, (pictures, _) in read.items()}
    names = class_names or classes_of(getattr(loaders["train"], "dataset", None), parts["train"].labels)
    return describe_images(parts, class_names=names, transform=transform), read["train"][1]


def _loader(datamodule: LightningDataModule, part: str) -> Any:
    if not is_overridden(f"{part}_dataloader", datamodule):
        return None
    found = getattr(datamodule, f"{part}_dataloader")()
    loaders = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else [found]
    if len(loaders) > 1:
        raise InputError(f"{type(datamodule).__name__}.{part}_dataloader returns {len(loaders)} loaders, not one")
    return loaders[0] if loaders else None


def _read(loader: Any, part: str, transform: ImageTransform | None) -> tuple[Pictures, int]:
    """Read all images of a loader; also return its batch size."""
    ordered = _in_order(loader, part)
    if ordered is not None:
        some = range(min(READ_TWICE, len(ordered.dataset)))  # type: ignore[arg-type]
        first, again = (_as_batches([ordered.collate_fn([ordered.dataset[i] for i in some])], part) for _ in "12")
        warn_of_random(first, again, part)
    bar = tqdm(ordered or loader, desc=f"reading {part} images", unit="batch", leave=False, delay=1)
    batches = list(_as_batches(bar, part))
    size = getattr(loader, "batch_size", None) or (len(batches[0][1]) if batches else 1)
    return joined(batches, part, transform=transform), size


def _as_batches(batches: Iterable[Any], part: str) -> Iterator[Batch]:
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"{part}: batches must be pairs (images, labels), not {type(batch).__name__}")
        yield as_batch(batch[0], batch[1], part)


def _in_order(loader: Any, part: str) -> DataLoader[Any] | None:
    """Return a loader of the same images in the dataset's order, each once; None without a map-style dataset."""
    # Without a batch_sampler the dataset's items are batches.
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_sampler:
        return None
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    order: Sequence[int] = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, SubsetRandomSampler):
        order = sorted(sampler.indices)
    elif not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        rank_zero_info(
            f"{part}: all {len(order):,} images of the dataset are read once; the order and weights of its "
            f"{type(sampler).__name__} are not used"
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 256,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # the global one is left alone
    )
