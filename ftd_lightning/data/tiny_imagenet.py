"""Tiny ImageNet: the folder of its official archive, downloaded where it is missing, read as it lies there."""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from functools import partial
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

from torchvision.datasets.utils import check_integrity, download_url
from tqdm.auto import tqdm

from ftd_lightning.data.decoded_cache import DecodedImages, cache_file
from ftd_lightning.data.image_tree import ImageTree, Part, told_what_is_unreadable
from ftd_lightning.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageDataset, Request
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

NAME = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
IMAGE_SIZE = 64


def _download(folder: Path) -> None:
    """Fetch and unpack the archive beside the folder and rename what came out; an archive in root is used, too."""
    root, archive = folder.parent, f"{NAME}.zip"
    part = root / f".{NAME}.part"
    try:
        if check_integrity(root / archive, MD5):
            source = root / archive
        else:
            # A whole archive that an interrupted run left here is taken, by its checksum; a part of one is not.
            download_url(URL, part, archive, MD5)
            source = part / archive
        with zipfile.ZipFile(source) as file:
            for member in tqdm(file.infolist(), desc=f"unpacking {archive}", unit="file", leave=False, delay=1):
                file.extract(member, part)
        (part / NAME).rename(folder)
    except (RuntimeError, URLError, OSError, HTTPException, zipfile.BadZipFile) as error:
        raise InputError(
            f"Tiny ImageNet cannot be downloaded ({error}): check the network, or put {archive} or the folder {NAME} "
            f"into {str(root)!r} (data.root)"
        ) from error
    shutil.rmtree(part)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is no text in UTF-8; take it from the official archive") from error


def _class_names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each class in words.txt, with its WordNet id where that is not unique; else the id alone."""
    names = {wnid: wnid for wnid in wnids}
    if (folder / "words.txt").is_file():
        for line in _lines(folder / "words.txt"):
            wnid, _, words = line.partition("\t")
            if wnid in names and words.strip():
                names[wnid] = words.split(",")[0].strip().replace(" ", "_")
    often = Counter(names.values())
    return tuple(name if often[name] == 1 else f"{name}_{wnid}" for wnid, name in names.items())


def _wnids(folder: Path) -> list[str]:
    """The classes in label order: that of wnids.txt if it names the folders of train/, else theirs, sorted."""
    train = folder / "train"
    there = sorted(path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else []
    if not there:
        raise InputError(f"{train}: no folders of classes here; the layout of the official archive is needed")
    file = folder / "wnids.txt"
    listed = " ".join(_lines(file)).split() if file.is_file() else []
    return listed if sorted(listed) == there else there


def _test_part(folder: Path, tree: ImageTree, wnids: list[str]) -> Part:
    """The images of val/, which lie in one folder, by the labels of val_annotations.txt."""
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise InputError(f"{annotations}: no such file; the layout of the official archive is needed")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    part, images = Part([], []), folder / "val" / "images"
    there = set(tree.images(images))
    for number, line in enumerate(_lines(annotations), start=1):
        name, wnid = (*line.split("\t"), "", "")[:2]
        if wnid not in labels:
            raise InputError(f"{annotations}, line {number}: class {wnid!r} has no folder in train/")
        file = images / name
        if file not in there:
            raise InputError(f"{file}: no such image, but line {number} of {annotations.name} names it")
        part.files.append(file)
        part.labels.append(labels[wnid])
    for wnid in wnids:
        if labels[wnid] not in part.labels:
            raise InputError(f"{annotations}: names no image of the class {wnid}, which has a folder in train/")
    return part


def _identify(decoded: DecodedImages) -> dict[str, Any]:
    return {"fingerprint": decoded.metadata()["fingerprint"]}


def find_tiny_imagenet(request: Request) -> ImageDataset:
    """Describe Tiny ImageNet by the folder ``tiny-imagenet-200`` under root; ``load`` and ``identify`` decode it.

    Every class of ``train/`` is one, be it 200 or a part of them; ``val/`` is the test part.

    Raises:
        InputError: if it is missing and cannot or must not be downloaded, or its layout is not the official one.
    """
    folder = request.root / NAME
    if not folder.is_dir():
        if not request.download:
            raise InputError(
                f"Tiny ImageNet is missing: put the folder {NAME} into {str(request.root)!r} (data.root), "
                "or set data.download to true"
            )
        request.root.mkdir(parents=True, exist_ok=True)
        _download(folder)
    with told_what_is_unreadable():
        wnids, size = _wnids(folder), request.image_size or IMAGE_SIZE
        names = _class_names(folder, wnids)
        # What is skipped is not told: the archive has a text file beside the images of every class.
        tree = ImageTree(folder)
        train = tree.part([folder / "train" / wnid for wnid in wnids])
        test = _test_part(folder, tree, wnids)
    path = cache_file(request.cache_dir, "tiny-imagenet", size, folder, {"train": train, "test": test})
    decoded = DecodedImages(path, train, test, partial(dict, channels=3, size=size))
    return ImageDataset(
        class_names=names,
        in_channels=3,
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        load=decoded.load,
        native_size=IMAGE_SIZE,
        identify=partial(_identify, decoded),
    )
