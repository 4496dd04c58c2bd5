"""Images that are given as objects: tensors, datasets, a DataModule; and the file that keeps them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler
from torchvision.transforms import Normalize as NormalizeV1
from torchvision.transforms.v2 import Normalize
from tqdm.auto import tqdm

from ftd_lightning.data.decoding import is_grey, measure, pixels
from ftd_lightning.data.sources import ImageDataset, Parts, Pictures, fingerprints, resized, resizing, unit_range
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors
from ftd_lightning.files.schema import NAMES, check_metadata
from ftd_lightning.files.transforms import Standardization, Whitening
from ftd_lightning.sizes import ImageSize, as_size, sides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from lightning.pytorch import Trainer

    from ftd_lightning.contracts import ImageTransform
    from ftd_lightning.data.sources import Request


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
        name: read_images((file[f"{name}_images"], file[f"{name}_labels"]), f"{path}: {name}", None, None, None)
        for name in ("train", "test", "val")
        if name != "val" or "val_images" in file.names
    }
    maximum = file.metadata.get("maximum")
    names = file.metadata["class_names"]
    return describe_images(parts, class_names=names, transform=None, maximum=maximum).at(request.image_size)


READ_TWICE = 4  # items that are read a second time, to notice random augmentation
EXPECTED = "pass pictures as uint8, uint16 or floats in [0, 1], or transform=Normalize(mean, std) of normalised images"

Batch = tuple[Tensor, Tensor]  # pictures (B, C, H, W) and labels (B,), as given
Choice = Callable[[Any], Any]  # takes images and labels from a batch of any form


def normalisations(transform: Any) -> list[Standardization]:
    """Return what the ``Normalize``s of a torchvision transform do to pictures; of others, nothing."""
    if isinstance(transform, NormalizeV1 | Normalize):
        constants = (torch.as_tensor(values, dtype=torch.float64) for values in (transform.mean, transform.std))
        return [Standardization(*(values.flatten().tolist() for values in constants))]
    steps = transform if isinstance(transform, nn.Sequential) else getattr(transform, "transforms", [])
    return [found for step in steps for found in normalisations(step)]


def agreed(datasets: Iterable[Any], ask: Callable[[Any], Any]) -> Any:
    """Return what all datasets answer, or where one does not those that it wraps; None where they do not agree."""
    answers = []
    for dataset in datasets:
        if (answer := ask(dataset)) is None:
            inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
            answer = agreed((one for one in inner if one is not None), ask)
        answers.append(answer)
    return answers[0] if answers and all(other == answers[0] for other in answers) else None


def normalisation(given: Any, datasets: Iterable[Any]) -> ImageTransform | None:
    """Return how images are normalised: as ``given``, perhaps by torchvision's transforms, or as all datasets say."""
    if isinstance(given, Standardization | Whitening):
        return given
    if given is None:
        found = agreed(datasets, lambda one: normalisations(getattr(one, "transform", None)) or None) or []
    else:
        found = normalisations(given)
    if len(found) == 1:
        rank_zero_info(f"images are taken as normalised by {found[0]}")
        return found[0]
    if given is not None:
        raise InputError(
            "transform= needs the one Normalize of the images, or a ftd_lightning.Standardization(mean, std)"
        )
    return None


def read_images(
    data: Any, part: str, batch: Choice | None, image_size: ImageSize | None, transform: ImageTransform | None
) -> Pictures:
    """Read a torch dataset of (image, label) or a pair of tensors into memory, resized to ``image_size``.

    Images are Pillow images, tensors (C, H, W) or (H, W), arrays (H, W, C) or (H, W); or all of them, (N, C, H, W),
    (N, H, W) or, as an array with C <= 4 < H, (N, H, W, C). They are pictures, or with a ``transform`` normalised
    already. ``part`` is named in messages.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return joined([as_batch(data[0], data[1], part)], part, image_size, transform)
    if not isinstance(data, IterableDataset) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise InputError(f"{part}: must be a Dataset of (image, label) or a pair of tensors, not {type(data).__name__}")
    items = DataLoader(data, collate_fn=partial(_as_item, part=part, choose=batch), generator=torch.Generator())
    return _read(items, part, None, image_size, transform)[0]


def read_datasets(
    train: Any,
    test: Any,
    val: Any = None,
    *,
    batch: Choice | None = None,
    class_names: Sequence[str] | None = None,
    image_size: ImageSize | None = None,
    transform: Any = None,
) -> ImageDataset:
    """Read all parts and describe them; see :func:`normalisation`, :func:`read_images` and :func:`describe_images`."""
    given = {"train": train, "test": test, **({} if val is None else {"val": val})}
    by = normalisation(transform, given.values())
    parts = {name: read_images(data, name, batch, image_size, by) for name, data in given.items()}
    names = class_names or classes_of(train, parts["train"].labels)
    return describe_images(parts, class_names=names, transform=by)


def classes_of(dataset: Any, labels: Tensor) -> Sequence[str] | None:
    """Return the ``classes`` of a dataset, or of those that it wraps; None without."""
    names: Sequence[str] | None = agreed([dataset], lambda one: getattr(one, "classes", None))
    if names is None or hasattr(dataset, "classes"):
        return names
    return names[: int(labels.max()) + 1]  # a part may leave out the last classes


def as_batch(images: Any, labels: Any, part: str) -> Batch:
    """Check a batch of images (B, C, H, W), (B, H, W) or, as an array of numpy with C <= 4 < H, (B, H, W, C)."""
    if not isinstance(images, Tensor | np.ndarray) or images.ndim not in (3, 4):
        found = getattr(images, "shape", type(images).__name__)
        raise InputError(f"{part}: images must be Pillow images or tensors (C, H, W), this is {found}")
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[3] <= 4 < images.shape[1]:
        images = images.transpose(0, 3, 1, 2)
    pictures, labels = torch.as_tensor(images).detach().cpu(), _as_labels(labels, part)
    pictures = pictures.unsqueeze(1) if pictures.ndim == 3 else pictures
    if labels.shape != pictures.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        axes = labels.ndim == 2 and len(labels) == len(pictures)
        hint = "" if not axes else f"; labels.{'squeeze(1)' if labels.shape[1] == 1 else 'argmax(1)'} makes them so"
        raise InputError(
            f"{part}: labels must be {len(pictures)} integers, one per image, not {labels.dtype} "
            f"{tuple(labels.shape)}{hint}"
        )
    return pictures, labels.long()


def _as_labels(labels: Any, part: str) -> Tensor:
    try:
        return torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        one = labels[0] if isinstance(labels, tuple | list | np.ndarray) and len(labels) else labels
        raise InputError(f"{part}: labels must be integers, not {one!r:.40}; number the classes from 0") from error


def _as_item(items: Sequence[Any], part: str, choose: Choice | None) -> tuple[Any, Tensor]:
    """Turn one item of a dataset into a batch of one, to be checked by :func:`as_batch`."""
    image, label = pair(items[0], part, choose)
    if isinstance(image, Image.Image):
        try:
            image = torch.from_numpy(pixels(image, channels=1 if is_grey(image) else 3).copy())  # uint16 of 16 bits
        except ValueError as error:
            raise InputError(f"{part}: {error}") from error
    elif isinstance(image, np.ndarray):
        image = image.transpose(2, 0, 1) if image.ndim == 3 else image
    images = image[None] if isinstance(image, Tensor | np.ndarray) else image
    labels = _as_labels(label, part)
    return images, labels.reshape(1) if labels.numel() == 1 else labels[None]


def joined(
    batches: Iterable[Batch], part: str, image_size: ImageSize | None, transform: ImageTransform | None
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
    """Check that values are in [0, 1], or in the range that a normalisation gives them; see :func:`read_images`."""
    if images.dtype in (torch.uint8, torch.uint16) and transform is None:
        return images
    if not images.is_floating_point():
        wrong = "transform= is for normalised images, which are floats" if transform else EXPECTED
        raise InputError(f"{part}: images are {images.dtype}; {wrong}")
    images, channels = images.float(), images.shape[1]
    if isinstance(transform, Standardization) and len(transform.mean) not in (1, channels):
        raise InputError(f"{part}: images have {channels} channels, transform={transform} has {len(transform.mean)}")
    if len(images) and not isinstance(transform, Whitening):
        ends = torch.stack([images.amin((0, 2, 3)), images.amax((0, 2, 3))])[..., None, None]  # of each channel
        low, high = map(float, (transform.invert(ends) if transform else ends).aminmax())
        slack = 0.05 if transform else 0  # resizing may overshoot
        if not -slack <= low <= high <= 1 + slack:
            without = f" without their {transform}" if transform else ""
            raise InputError(f"{part}: images{without} have values from {low:.3g} to {high:.3g}; {EXPECTED}")
    return images


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
        maximum = max(1, *(int(values.int().max()) for values, labels in deep.values() if len(labels)))  # 1: all black
        scaled = {name: (_as_bytes(values.float() / maximum), labels) for name, (values, labels) in deep.items()}
        parts = {**parts, **{name: Pictures(*part) for name, part in scaled.items()}}
    train = parts["train"]
    shape, given = tuple(train.pictures.shape[1:]), class_names or list(map(str, range(int(train.labels.max()) + 1)))
    # torchvision's ImageNet has several names per class.
    names = tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in given)
    for part, (pictures, labels) in parts.items():
        if tuple(pictures.shape[1:]) != shape:
            mend = "image_size= resizes them" if pictures.shape[1] == shape[0] else "convert them, e.g. to RGB"
            raise InputError(f"{part}: images are {tuple(pictures.shape[1:])}, those of train {shape}; {mend}")
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


def read_datamodule(
    datamodule: Any,
    trainer: Trainer | None,
    *,
    batch: Choice | None = None,
    loaders: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    image_size: ImageSize | None = None,
    transform: Any = None,
) -> tuple[ImageDataset, int]:
    """Set another LightningDataModule up and read all its images, test images if any; also return its batch size."""
    datamodule.trainer = trainer
    for stage in ("fit", "test"):
        datamodule.setup(stage)
    found = {part: _loader(datamodule, part, loaders or {}) for part in ("train", "test", "val")}
    used = {part: loader for part, loader in found.items() if loader is not None}
    if "train" not in used:
        raise InputError(f"{type(datamodule).__name__} has no train_dataloader, which is needed")
    datasets = [getattr(loader, "dataset", None) for loader in used.values()]
    by = normalisation(transform, datasets)
    read = {part: _read(loader, part, batch, image_size, by) for part, loader in used.items()}
    train, size = read["train"]
    no_test = {"test": Pictures(train.pictures[:0], train.labels[:0])}
    parts = {**no_test, **{part: pictures for part, (pictures, _) in read.items()}}
    names = class_names or classes_of(datasets[0], train.labels)
    return describe_images(parts, class_names=names, transform=by), size


# Of the package `pytorch_lightning`, too: `lightning` has its classes a second time.
ABSTRACT = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


def _loader(datamodule: Any, part: str, loaders: Mapping[str, Any]) -> Any:
    """Return the loader of a part, of several the one that ``loaders`` names; None where there is none."""
    make = getattr(datamodule, f"{part}_dataloader")
    if getattr(make, "__module__", None) in ABSTRACT:
        return None
    found = make()
    several = found if isinstance(found, dict | list | tuple) else [found]
    choices = several if isinstance(several, dict) else dict(enumerate(several))
    if not (keys := list(choices)):
        return None
    if (key := loaders.get(part, keys[0] if len(keys) == 1 else None)) in keys:
        return choices[key]
    raise InputError(
        f"{type(datamodule).__name__}.{part}_dataloader returns {len(keys)} loaders: choose one of {keys}, such as "
        f"loaders={{{part!r}: {keys[0]!r}}}"
    )


def pair(found: Any, part: str, choose: Choice | None) -> tuple[Any, Any]:
    """Return images and labels of a batch or item, by the user's function where its form is another."""
    chosen = found if choose is None else choose(found)
    if isinstance(chosen, tuple | list) and len(chosen) == 2:
        return chosen[0], chosen[1]
    if choose is not None:
        raise InputError(f"{part}: batch= must return a pair (images, labels), not {type(chosen).__name__}")
    keyed = dict(found if isinstance(found, Mapping) else enumerate(found if isinstance(found, tuple | list) else ()))
    pictures = (key for key, one in keyed.items() if isinstance(one, Image.Image) or getattr(one, "ndim", 0) > 2)
    image = next(pictures, "images")
    numbers = (key for key, one in keyed.items() if key != image and isinstance(one, int | Tensor | np.ndarray))
    label = next(numbers, "labels")
    raise InputError(
        f"{part}: items and batches must be pairs (images, labels), not {type(found).__name__} with {list(keyed)}: "
        f"give batch=lambda b: (b[{image!r}], b[{label!r}]) or the like"
    )


def _read(
    loader: Any, part: str, choose: Choice | None, image_size: ImageSize | None, transform: ImageTransform | None
) -> tuple[Pictures, int]:
    """Read all images of a loader; also return its batch size."""
    ordered = _in_order(loader, part)

    def batches(given: Iterable[Any]) -> Iterator[Batch]:
        return (as_batch(*pair(one, part, choose), part) for one in given)

    if ordered is not None:
        some = range(min(READ_TWICE, len(ordered.dataset)))  # type: ignore[arg-type]
        first, again = (batches(ordered.collate_fn([ordered.dataset[i]]) for i in some) for _ in "12")
        if any(not torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True)):
            rank_zero_warn(
                f"{part}: the same images differ when they are read twice. They are read once: random augmentation in "
                "the dataset would be applied once. Leave it out; modules augment every batch themselves (augment=)"
            )
    read = batches(tqdm(ordered or loader, desc=f"reading {part} images", unit="batch", leave=False, delay=1))
    head = list(islice(read, 1))
    size = getattr(loader, "batch_size", None) or (len(head[0][1]) if head else 1)
    return joined(chain(head, read), part, image_size, transform), size


def _in_order(loader: Any, part: str) -> DataLoader[Any] | None:
    """Return a loader of the same images in the dataset's order, each once; None without a map-style dataset."""
    # Without a batch_sampler the dataset's items are batches.
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_sampler:
        return None
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    order: Sequence[int] = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, SubsetRandomSampler):
        order = sorted(sampler.indices)
    elif isinstance(sampler, WeightedRandomSampler):
        rank_zero_info(f"{part}: all {len(order):,} images of the dataset are read once, whatever their weights")
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 256,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # the global one is left alone
    )
