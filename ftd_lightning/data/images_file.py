"""A data set in one file: images that were given as objects, kept for the fits of other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftd_lightning.data.files import write_tensors
from ftd_lightning.data.own_images import describe_images, read_images
from ftd_lightning.data.tensor_file import TensorFile
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ftd_lightning.data.images import ImageDataset, Pictures, Request

KIND = "images"
FILE = "images.safetensors"


def write_images_file(dataset: ImageDataset, folder: Path) -> Path:
    """Write all parts of a data set to ``images.safetensors`` of a folder.

    Args:
        dataset: pictures, not images that are normalised already.
        folder: is made.

    Returns:
        The file: ``train_images`` (N, C, H, W) uint8 or float32 in [0, 1], ``train_labels`` (N,) int64, likewise of
        "test" and, where there are held-out ones, of "val"; its metadata has "class_names" and, of pictures that were
        of 16 bits, the "maximum" that they were divided by.
    """
    train, test = dataset.load()
    parts = {"train": train, "test": test, **({} if dataset.held_out is None else {"val": dataset.held_out()})}
    tensors: dict[str, Tensor] = {}
    for name, (pictures, labels) in parts.items():
        tensors |= {f"{name}_images": pictures, f"{name}_labels": labels}
    path = folder / FILE
    maximum = {key: value for key, value in dataset.identify().items() if key == "maximum"}
    write_tensors(path, tensors, kind=KIND, metadata={"class_names": list(dataset.class_names), **maximum})
    return path


def find_images_file(request: Request) -> ImageDataset:
    """Describe the data set in ``images.safetensors`` under root; its contents identify it.

    Raises:
        InputError: for a file that is missing, damaged or not of this kind, or that holds no data set.
    """
    path = request.root / FILE
    file = TensorFile(path, kind=KIND)
    names = file.metadata.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: class_names are not a list of names; write it again")
    parts: dict[str, Pictures] = {}
    for part in ("train", "test", "val"):
        wanted = {f"{part}_images", f"{part}_labels"}
        if not wanted <= file.names:
            if part == "val":
                continue
            raise InputError(f"{path}: holds no {' and '.join(sorted(wanted - file.names))}; write it again")
        pair = (file[f"{part}_images"], file[f"{part}_labels"])
        parts[part] = read_images(pair, f"{path}: {part}", transform=None)
    described = describe_images(
        parts["train"],
        parts["test"],
        parts.get("val"),
        class_names=names,
        transform=None,
        maximum=file.metadata.get("maximum"),
    )
    return described.at(request.image_size)
