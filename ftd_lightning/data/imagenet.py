"""Subsets of ImageNet, and Tiny ImageNet."""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from functools import partial
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive

from ftd_lightning.data.decoding import DecodedImages, LabelledFiles, cache_file
from ftd_lightning.data.folder import ImageTree, os_errors_as_input_errors
from ftd_lightning.data.sources import ImageDataset, Request
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ftd_lightning.sizes import ImageSize


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pictures in [0, 1]
IMAGE_SIZE = 128

# In label order: WordNet id and name. This is the original split of ILSVRC 2012, not that of the smaller releases.
SUBSETS: dict[str, dict[str, str]] = {
    subset: dict(pair.split(":") for pair in classes.split())
    for subset, classes in {
        "imagenette": """
            n01440764:tench n02102040:english_springer n02979186:cassette_player n03000684:chain_saw n03028079:church
            n03394916:french_horn n03417042:garbage_truck n03425413:gas_pump n03445777:golf_ball n03888257:parachute
        """,
        "imagewoof": """
            n02096294:australian_terrier n02093754:border_terrier n02111889:samoyed n02088364:beagle
            n02086240:shih-tzu n02089973:english_foxhound n02087394:rhodesian_ridgeback n02115641:dingo
            n02099601:golden_retriever n02105641:old_english_sheepdog
        """,
        "imagefruit": """
            n07753275:pineapple n07753592:banana n07745940:strawberry n07747607:orange n07749582:lemon
            n07768694:pomegranate n07753113:fig n07720875:bell_pepper n07718472:cucumber n07742313:granny_smith
        """,
        "imagemeow": """
            n02123045:tabby n02123159:tiger_cat n02123394:persian n02123597:siamese n02124075:egyptian n02129165:lion
            n02129604:tiger n02128925:jaguar n02128757:snow_leopard n02127052:lynx
        """,
        "imagesquawk": """
            n01806143:peacock n02007558:flamingo n01818515:macaw n02051845:pelican n02056570:king_penguin
            n01614925:bald_eagle n01843383:toucan n01518878:ostrich n01860187:black_swan n01819313:cockatoo
        """,
        "imageyellow": """
            n02206856:bee n12057211:yellow_ladys_slipper n07753592:banana n07749582:lemon n12144580:corn
            n04146614:school_bus n03530642:honeycomb n02129165:lion n01773157:garden_spider n01531178:goldfinch
        """,
    }.items()
}


@os_errors_as_input_errors()
def _decoded(name: str, size: ImageSize, request: Request) -> DecodedImages:
    root, wnids = request.root, SUBSETS[name]
    tree = root / "imagenet" if (root / "imagenet").is_dir() else root
    folders = {part: [tree / folder / wnid for wnid in wnids] for part, folder in (("train", "train"), ("test", "val"))}
    missing = [path for paths in folders.values() for path in paths if not path.is_dir()]
    if missing:
        raise InputError(
            f"{root}: the images of {name} are missing ({len(missing)} of {2 * len(wnids)} folders, the first is "
            f"{missing[0].relative_to(tree)}) and cannot be downloaded; put ILSVRC 2012 as train/<wnid>/*.JPEG and "
            f"val/<wnid>/*.JPEG into {root / 'imagenet'}, or set data.root to the folder that contains both"
        )
    images = ImageTree(tree)
    parts = {part: images.part(paths) for part, paths in folders.items()}
    images.log_skipped()
    path = cache_file(request, name, size, tree, parts)
    return DecodedImages(path, parts, partial(dict, channels=3, size=size, skip_broken=request.skip_broken))


def _use(use: Callable[[DecodedImages], Any], name: str, size: ImageSize, request: Request) -> Any:
    return use(_decoded(name, size, request))


def find_subset(name: str, request: Request) -> ImageDataset:
    """Describe a subset, ``train/<wnid>`` and ``val/<wnid>`` (to test); only ``load`` and ``contents`` decode files."""
    size, names = request.image_size or IMAGE_SIZE, tuple(SUBSETS[name].values())
    load, contents = (partial(_use, use, name, size, request) for use in (DecodedImages.load, DecodedImages.contents))
    return ImageDataset(names, 3, size, MEAN, STD, load, native_size=IMAGE_SIZE, contents=contents)


NAME = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_SIZE = 64


def _download(folder: Path) -> None:
    """Fetch and unpack the archive beside the folder and rename what came out; an archive in root is used, too."""
    root, archive = folder.parent, f"{NAME}.zip"
    part = root / f".{NAME}.part"
    try:
        if check_integrity(root / archive, MD5):
            extract_archive(root / archive, part)
        else:  # an archive that an interrupted run left there is used, if it is whole
            download_and_extract_archive(URL, part, filename=archive, md5=MD5)
        (part / NAME).rename(folder)
    except (RuntimeError, URLError, OSError, HTTPException, zipfile.BadZipFile) as error:
        raise InputError(
            f"Tiny ImageNet cannot be downloaded ({error}): check the network, or put {archive} or the folder {NAME} "
            f"into {str(root)!r} (data.root)"
        ) from error
    shutil.rmtree(part)


def _class_names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each class in words.txt, with its WordNet id where that is not unique; else the id alone."""
    names = {wnid: wnid for wnid in wnids}
    if (folder / "words.txt").is_file():
        for line in (folder / "words.txt").read_text(encoding="utf-8").splitlines():
            wnid, _, words = line.partition("\t")
            if wnid in names and words.strip():
                names[wnid] = words.split(",")[0].strip().replace(" ", "_")
    often = Counter(names.values())
    return tuple(name if often[name] == 1 else f"{name}_{wnid}" for wnid, name in names.items())


def _wnids(folder: Path) -> list[str]:
    """The classes in label order: that of wnids.txt if it names the folders of train/, else theirs, sorted."""
    train, file = folder / "train", folder / "wnids.txt"
    there = sorted(path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else []
    if not there:
        raise InputError(f"{train}: no folders of classes here; the layout of the official archive is needed")
    listed = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return listed if sorted(listed) == there else there


def _test_part(folder: Path, wnids: list[str]) -> LabelledFiles:
    """The images of val/, which lie in one folder, by the labels of val_annotations.txt."""
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise InputError(f"{annotations}: no such file; the layout of the official archive is needed")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    part = LabelledFiles([], [])
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        name, wnid = (*line.split("\t"), "", "")[:2]
        if wnid not in labels:
            raise InputError(f"{annotations}, line {number}: class {wnid!r} has no folder in train/")
        part.files.append(folder / "val" / "images" / name)
        part.labels.append(labels[wnid])
    return part


def find_tiny_imagenet(request: Request) -> ImageDataset:
    """Describe Tiny ImageNet, the classes of ``train/``, tested on ``val/``; it is downloaded where it is missing."""
    folder = request.root / NAME
    if not folder.is_dir():
        if not request.download:
            raise InputError(
                f"Tiny ImageNet is missing: put the folder {NAME} into {str(request.root)!r} (data.root), "
                "or set data.download to true"
            )
        request.root.mkdir(parents=True, exist_ok=True)
        _download(folder)
    size = request.image_size or TINY_SIZE
    with os_errors_as_input_errors():
        wnids = _wnids(folder)
        names = _class_names(folder, wnids)
        # Skipped files are not logged: the archive has a text file for every class.
        train = ImageTree(folder).part([folder / "train" / wnid for wnid in wnids])
        parts = {"train": train, "test": _test_part(folder, wnids)}
        path = cache_file(request, "tiny-imagenet", size, folder, parts)
    decoded = DecodedImages(path, parts, partial(dict, channels=3, size=size, skip_broken=request.skip_broken))
    return ImageDataset(names, 3, size, MEAN, STD, decoded.load, native_size=TINY_SIZE, contents=decoded.contents)
