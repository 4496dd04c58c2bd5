"""Anyone's images, in a folder a class."""

from __future__ import annotations

from collections import Counter
from functools import partial
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
            "train/<class>/ and val/<class>/, or into <class>/, under data.root"
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


def _parts(root: Path, fraction: float) -> tuple[tuple[str, ...], Part, Part]:
    """The names of the classes, the training part and the test part."""
    tree = ImageTree(root)
    folders = [root / name for name in ("train", "val") if (root / name).is_dir()]
    if len(folders) == 1:
        (missing,) = {"train", "val"} - {folders[0].name}
        raise InputError(
            f"{root}: holds {folders[0].name}/ but no {missing}/; add it, or set data.root to a folder of classes, of "
            "which the share data.test_fraction becomes the test part"
        )
    if not folders:
        classes = _class_folders(root, root)
        names, parts = classes, _split(tree.part(classes), classes, fraction)
    else:
        train, val = (_class_folders(folder, root) for folder in folders)
        for here, there in ((train, val), (val, train)):
            other = {path.name for path in there}
            for path in here:
                if path.name not in other:
                    raise InputError(f"{there[0].parent / path.name}: no such folder, but there is {path}")
        names, parts = train, (tree.part(train), tree.part(val))
    tree.tell_what_is_skipped()
    return tuple(path.name for path in names), *parts


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
    """Describe images in ``train/<class>/`` and ``val/<class>/`` under root, or in ``<class>/`` under root.

    In the second layout, the share ``test_fraction`` of every class becomes the test part: the same images for every
    seed. Classes are folders in alphabetical order, with any folders below. There is one channel if all training images
    are grey, else three; the size is the most common one of the training images (of its sides the shorter) if none is
    asked for; mean and std are those of all pixels of the training images. What was found goes into descriptions, with
    a fingerprint of the decoded images. GIFs, hidden files and whatever else is no image are skipped and counted.

    Raises:
        InputError: for another layout, a class without images, an unreadable image, or a link that leads elsewhere (see
            :class:`~ftd_lightning.data.image_tree.ImageTree`), naming the folder or file.
    """
    root = request.root
    with told_what_is_unreadable():
        names, train, test = _parts(root, request.test_fraction)
    path = cache_file(request.cache, "folder", request.image_size or "native", root, {"train": train, "test": test})
    form, sizes = partial(_form, train, request.image_size), ("in_channels", "image_size", "native_size")
    decoded = DecodedImages(path, train, test, form, sizes)
    metadata = decoded.metadata()
    # Told only where it was used, so that whoever reads a description can ask for the same images.
    split = {} if (root / "train").is_dir() else {"test_fraction": request.test_fraction}
    shape = {key: metadata[key] for key in ("in_channels", "image_size")}
    contents = {"class_names": list(names), "fingerprint": metadata["fingerprint"], **shape, **split}
    return ImageDataset(
        class_names=names,
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        load=decoded.load,
        native_size=metadata["native_size"],
        identify=partial(dict, contents),
        **shape,
    )
