"""Anyone's images, in a folder a class."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING

import torch

from ftd_lightning.data.decoded_cache import DecodedImages, cache_file
from ftd_lightning.data.decoding import in_parallel, is_grey, opened
from ftd_lightning.data.image_tree import ImageTree, Part, told_what_is_unreadable
from ftd_lightning.data.images import ImageDataset, Request
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL.Image import Image

PARTS = ("train", "val", "test")  # folders of parts under root; where there are none, the folders there are classes
OWN_FOLDERS = ("cache", "whitening")  # what this library keeps under root, beside the classes


def _class_folders(folder: Path, root: Path) -> list[Path]:
    """The folders of classes, sorted; hidden ones, and this library's own unless they hold images, are left out."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; put the images of each class into a folder of its own there")
    there = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = [path for path in there if path.name not in OWN_FOLDERS or ImageTree(root).images(path)]
    if len(classes) < 2:
        raise InputError(
            f"{folder}: {len(classes)} folders of classes here, at least 2 are needed; put images into "
            "train/<class>/ and test/<class>/ (and val/<class>/, to hold them out), or into <class>/, under data.root"
        )
    return classes


def _split(part: Part, folders: Sequence[Path], fraction: float) -> tuple[Part, Part]:
    """Cut off the test part, the same share of every class, at least one image, always the same ones."""
    train, test = Part([], []), Part([], [])
    for label, folder in enumerate(folders):
        files = [file for file, of in zip(part.files, part.labels, strict=True) if of == label]
        if len(files) < 2:
            raise InputError(f"{folder}: holds one image, one to train and one to test are needed at least")
        count = min(max(round(fraction * len(files)), 1), len(files) - 1)
        # Not by the seed of a run: its test images must not be among the training images of another.
        order = torch.randperm(len(files), generator=make_generator("test part", folder.name)).tolist()
        chosen = set(order[:count])
        for i, file in enumerate(files):
            to = test if i in chosen else train
            to.files.append(file)
            to.labels.append(label)
    return train, test


def _parts(root: Path, fraction: float) -> tuple[tuple[str, ...], dict[str, Part]]:
    """The names of the classes, and the parts: "train", "test" and, if all three have folders, "val"."""
    tree = ImageTree(root)
    there = [name for name in PARTS if (root / name).is_dir()]
    if not there:
        classes = _class_folders(root, root)
        train, test = _split(tree.part(classes), classes, fraction)
        tree.tell_what_is_skipped()
        return tuple(path.name for path in classes), {"train": train, "test": test}
    if len(there) == 1 or "train" not in there:
        missing = "no val/ or test/" if there == ["train"] else "no train/"
        raise InputError(
            f"{root}: holds {' and '.join(f'{name}/' for name in there)} but {missing}; add it, or set data.root to a "
            "folder of classes, of which the share data.test_fraction becomes the test part"
        )
    folders = {name: _class_folders(root / name, root) for name in there}
    for here, other in permutations(there, 2):
        names = {path.name for path in folders[other]}
        for path in folders[here]:
            if path.name not in names:
                raise InputError(f"{root / other / path.name}: no such folder, but there is {path}")
    parts = {name: tree.part(classes) for name, classes in folders.items()}
    tree.tell_what_is_skipped()
    if "test" not in parts:
        parts["test"] = parts.pop("val")
    return tuple(path.name for path in folders["train"]), parts


def _survey(files: Sequence[Path]) -> tuple[int, int]:
    """Find channels and native size from the headers: 1 if all images are grey; the most common size, made square."""

    def look(image: Image) -> tuple[bool, tuple[int, int]]:
        return is_grey(image), image.size

    seen = in_parallel(lambda i: opened(files[i], look), len(files), "looking at images")
    sizes = Counter(size for _, size in seen)
    most = max(sizes.values())
    # The shorter side: no detail is made up.
    size = min(min(size) for size, count in sizes.items() if count == most)
    return (1 if all(grey for grey, _ in seen) else 3), size


def _form(train: Part, image_size: int | None) -> dict[str, int]:
    channels, native = _survey(train.files)
    return {"channels": channels, "size": image_size or native, "native_size": native}


def find_folder(request: Request) -> ImageDataset:
    """Describe images in folders of classes under root, in one of three layouts.

    - ``train/<class>/``, ``val/<class>/`` and ``test/<class>/``: the images of ``val/`` are the held-out part.
    - ``train/<class>/`` and one of the others, which is the test part: a share of the training images is held out.
    - ``<class>/``: the share ``test_fraction`` of every class becomes the test part, the same images for every seed; a
      share of the others is held out.

    All parts have the same classes: the folders in alphabetical order, with any folders below. There is one channel if
    all training images are grey, else three; the size is the most common one of the training images (of its sides the
    shorter) if none is asked for; mean and std are those of all pixels of the training images. What was found goes into
    descriptions, with a fingerprint of the decoded images, and one of those that ``val/`` gives as held out. GIFs,
    hidden files and whatever else is no image are skipped and counted.

    Raises:
        InputError: for another layout, a class that a part lacks or has no images of, an unreadable image, or a link
            that leads elsewhere (see :class:`~ftd_lightning.data.image_tree.ImageTree`), naming the folder or file.
    """
    root = request.root
    with told_what_is_unreadable():
        names, parts = _parts(root, request.test_fraction)
    path = cache_file(request.cache, "folder", request.image_size or "native", root, parts)
    form, sizes = partial(_form, parts["train"], request.image_size), ("in_channels", "image_size", "native_size")
    decoded = DecodedImages(path, parts["train"], parts["test"], form, sizes, parts.get("val"))
    metadata = decoded.metadata()
    # Told only where it was used, so that whoever reads a description can ask for the same images.
    split = {} if (root / "train").is_dir() else {"test_fraction": request.test_fraction}
    shape = {key: metadata[key] for key in ("in_channels", "image_size")}
    # As of images that are given as objects: which share was asked for says nothing then.
    given = {"val_fraction": None, "held_out": metadata["held_out"]} if "val" in parts else {}
    contents = {"class_names": list(names), "fingerprint": metadata["fingerprint"], **shape, **split, **given}
    return ImageDataset(
        class_names=names,
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        load=decoded.load,
        native_size=metadata["native_size"],
        identify=partial(dict, contents),
        held_out=decoded.load_held_out if "val" in parts else None,
        **shape,
    )
