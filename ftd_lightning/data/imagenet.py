"""Six subsets of ImageNet, ten classes each, from an ILSVRC tree."""

from __future__ import annotations

from functools import partial
from typing import Any

from ftd_lightning.data.decoded_cache import DecodedImages, cache_file
from ftd_lightning.data.image_tree import ImageTree, told_what_is_unreadable
from ftd_lightning.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageDataset, Parts, Request
from ftd_lightning.errors import InputError

IMAGE_SIZE = 128

# In label order: WordNet id and name. This is the original split of ILSVRC 2012, not that of the smaller releases.
SUBSETS: dict[str, dict[str, str]] = {
    "imagenette": {
        "n01440764": "tench",
        "n02102040": "english_springer",
        "n02979186": "cassette_player",
        "n03000684": "chain_saw",
        "n03028079": "church",
        "n03394916": "french_horn",
        "n03417042": "garbage_truck",
        "n03425413": "gas_pump",
        "n03445777": "golf_ball",
        "n03888257": "parachute",
    },
    "imagewoof": {
        "n02096294": "australian_terrier",
        "n02093754": "border_terrier",
        "n02111889": "samoyed",
        "n02088364": "beagle",
        "n02086240": "shih-tzu",
        "n02089973": "english_foxhound",
        "n02087394": "rhodesian_ridgeback",
        "n02115641": "dingo",
        "n02099601": "golden_retriever",
        "n02105641": "old_english_sheepdog",
    },
    "imagefruit": {
        "n07753275": "pineapple",
        "n07753592": "banana",
        "n07745940": "strawberry",
        "n07747607": "orange",
        "n07749582": "lemon",
        "n07768694": "pomegranate",
        "n07753113": "fig",
        "n07720875": "bell_pepper",
        "n07718472": "cucumber",
        "n07742313": "granny_smith",
    },
    "imagemeow": {
        "n02123045": "tabby",
        "n02123159": "tiger_cat",
        "n02123394": "persian",
        "n02123597": "siamese",
        "n02124075": "egyptian",
        "n02129165": "lion",
        "n02129604": "tiger",
        "n02128925": "jaguar",
        "n02128757": "snow_leopard",
        "n02127052": "lynx",
    },
    "imagesquawk": {
        "n01806143": "peacock",
        "n02007558": "flamingo",
        "n01818515": "macaw",
        "n02051845": "pelican",
        "n02056570": "king_penguin",
        "n01614925": "bald_eagle",
        "n01843383": "toucan",
        "n01518878": "ostrich",
        "n01860187": "black_swan",
        "n01819313": "cockatoo",
    },
    "imageyellow": {
        "n02206856": "bee",
        "n12057211": "yellow_ladys_slipper",
        "n07753592": "banana",
        "n07749582": "lemon",
        "n12144580": "corn",
        "n04146614": "school_bus",
        "n03530642": "honeycomb",
        "n02129165": "lion",
        "n01773157": "garden_spider",
        "n01531178": "goldfinch",
    },
}


def _decoded(name: str, size: int, request: Request) -> DecodedImages:
    root = request.root
    with told_what_is_unreadable():
        tree, wnids = root / "imagenet" if (root / "imagenet").is_dir() else root, list(SUBSETS[name])
        missing = [f"{part}/{wnid}" for part in ("train", "val") for wnid in wnids if not (tree / part / wnid).is_dir()]
    if missing:
        raise InputError(
            f"{root}: the images of {name} are missing ({len(missing)} of {2 * len(wnids)} folders, the first is "
            f"{missing[0]}) and cannot be downloaded; put ILSVRC 2012 as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG "
            f"into {root / 'imagenet'}, or set data.root to the folder that contains both"
        )
    images = ImageTree(tree)
    train, test = (images.part([tree / part / wnid for wnid in wnids]) for part in ("train", "val"))
    images.tell_what_is_skipped()
    path = cache_file(request.cache_dir, name, size, tree, {"train": train, "test": test})
    return DecodedImages(path, train, test, partial(dict, channels=3, size=size))


def _load(name: str, size: int, request: Request) -> Parts:
    return _decoded(name, size, request).load()


def _identify(name: str, size: int, request: Request) -> dict[str, Any]:
    return {"fingerprint": _decoded(name, size, request).metadata()["fingerprint"]}


def find_subset(name: str, request: Request) -> ImageDataset:
    """Describe a subset without looking at files; ``load`` and ``identify`` decode them.

    Images are squashed to 128 x 128 pixels, or to the size that is asked for; val/ is the test part. Grey files become
    RGB. ``train/<wnid>`` and ``val/<wnid>`` are read under ``root/imagenet``, or under root; where folders are missing,
    an InputError says what to put where.

    Example:
        >>> find_subset("imagefruit", Request()).class_names[:2]
        ('pineapple', 'banana')
    """
    size, names = request.image_size or IMAGE_SIZE, tuple(SUBSETS[name].values())
    load, identify = partial(_load, name, size, request), partial(_identify, name, size, request)
    return ImageDataset(names, 3, size, IMAGENET_MEAN, IMAGENET_STD, load, native_size=IMAGE_SIZE, identify=identify)
