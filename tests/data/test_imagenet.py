import numpy as np
import pytest
import torch
from PIL import Image

from ftd_lightning.data import DistillationDataModule, get_dataset
from ftd_lightning.data.imagenet import SUBSETS

# ILSVRC class index, WordNet id and name, in label order.
TABLE = {
    "imagenette": (
        "0:n01440764 tench, 217:n02102040 english_springer, 482:n02979186 cassette_player, "
        "491:n03000684 chain_saw, 497:n03028079 church, 566:n03394916 french_horn, "
        "569:n03417042 garbage_truck, 571:n03425413 gas_pump, 574:n03445777 golf_ball, "
        "701:n03888257 parachute"
    ),
    "imagewoof": (
        "193:n02096294 australian_terrier, 182:n02093754 border_terrier, 258:n02111889 samoyed, "
        "162:n02088364 beagle, 155:n02086240 shih-tzu, 167:n02089973 english_foxhound, "
        "159:n02087394 rhodesian_ridgeback, 273:n02115641 dingo, 207:n02099601 golden_retriever, "
        "229:n02105641 old_english_sheepdog"
    ),
    "imagefruit": (
        "953:n07753275 pineapple, 954:n07753592 banana, 949:n07745940 strawberry, "
        "950:n07747607 orange, 951:n07749582 lemon, 957:n07768694 pomegranate, "
        "952:n07753113 fig, 945:n07720875 bell_pepper, 943:n07718472 cucumber, "
        "948:n07742313 granny_smith"
    ),
    "imagemeow": (
        "281:n02123045 tabby, 282:n02123159 tiger_cat, 283:n02123394 persian, "
        "284:n02123597 siamese, 285:n02124075 egyptian, 291:n02129165 lion, "
        "292:n02129604 tiger, 290:n02128925 jaguar, 289:n02128757 snow_leopard, "
        "287:n02127052 lynx"
    ),
    "imagesquawk": (
        "84:n01806143 peacock, 130:n02007558 flamingo, 88:n01818515 macaw, "
        "144:n02051845 pelican, 145:n02056570 king_penguin, 22:n01614925 bald_eagle, "
        "96:n01843383 toucan, 9:n01518878 ostrich, 100:n01860187 black_swan, "
        "89:n01819313 cockatoo"
    ),
    "imageyellow": (
        "309:n02206856 bee, 986:n12057211 yellow_ladys_slipper, 954:n07753592 banana, "
        "951:n07749582 lemon, 987:n12144580 corn, 779:n04146614 school_bus, "
        "599:n03530642 honeycomb, 291:n02129165 lion, 72:n01773157 garden_spider, "
        "11:n01531178 goldfinch"
    ),
}


def ready(root, name="imagenette", **options):
    data = DistillationDataModule(**{"dataset": name, "root": str(root), **options})
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("name", TABLE)
def test_classes_and_their_order(name):
    listed = [entry.split(":")[1].split() for entry in TABLE[name].split(", ")]
    assert [[wnid, title] for wnid, title in SUBSETS[name].items()] == listed
    assert len(listed) == 10
    data = DistillationDataModule(dataset=name, root="nowhere")
    assert data.class_names == [title for _, title in listed]
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 128)
    spec = get_dataset(name)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_indices_and_ids_agree_among_subsets():
    pairs = {tuple(entry.split()[0].split(":")) for line in TABLE.values() for entry in line.split(", ")}
    assert set(TABLE) == set(SUBSETS)
    assert len({index for index, _ in pairs}) == len({wnid for _, wnid in pairs}) == len(pairs)
    assert [w for _, w in sorted(pairs, key=lambda pair: int(pair[0]))] == sorted(w for _, w in pairs)


@pytest.mark.parametrize("below", ["imagenet", ""])
@pytest.mark.parametrize("name", ["imagefruit", "imageyellow"])
def test_labels_are_in_the_order_of_the_table(tmp_path, image_folder, name, below):
    for part in ("train", "val"):
        for label, wnid in enumerate(SUBSETS[name]):
            folder = tmp_path / below / part / wnid
            folder.mkdir(parents=True)
            image = Image.new("RGB", (30, 20), (label * 20, 0, 0))
            image.putpixel((0, 0), (255, 255, 255))
            image.save(folder / "a.JPEG", quality=100)
    image_folder(tmp_path / below / "train", ["n99999999"], ending="JPEG")  # a class of no subset
    data = ready(tmp_path, name, val_fraction=0.0)
    for images in (data.train, data.test):
        red = data.transform.invert(images.images)[:, 0].mean((1, 2)) * 255
        assert images.labels.tolist() == list(range(10))
        assert torch.allclose(red, torch.arange(10) * 20.0, atol=2)


def test_missing_tree_is_refused_with_a_word_on_what_to_put_where(tmp_path, refused, image_folder):
    parts = (tmp_path, "train/<wnid>", "val/<wnid>", "cannot be downloaded", tmp_path / "imagenet", "data.root")
    with refused("imagewoof", "20 of 20", *parts):
        ready(tmp_path, "imagewoof")
    image_folder(tmp_path / "imagenet" / "train", SUBSETS["imagewoof"], ending="JPEG", count=1)
    (tmp_path / "imagenet" / "val").mkdir()
    with refused("imagewoof", "10 of 20", "val/n02096294", *parts):
        ready(tmp_path, "imagewoof")
    image_folder(tmp_path / "imagenet" / "val", SUBSETS["imagewoof"], ending="JPEG", count=1)
    empty = tmp_path / "imagenet" / "val" / "n02115641"
    next(empty.iterdir()).unlink()
    with refused(empty):
        ready(tmp_path, "imagewoof")


# The real images


def test_real_images_are_squashed_and_grey_ones_become_rgb(imagenet_root):
    data = ready(imagenet_root, val_fraction=0.0)
    assert data.train.images.shape == (500, 3, 128, 128)
    assert data.test.images.shape == (200, 3, 128, 128)
    assert data.test.labels.bincount().tolist() == [20] * 10
    pictures = data.transform.invert(data.train.images)
    wnids = list(SUBSETS["imagenette"])
    files = [file for wnid in wnids for file in sorted((imagenet_root / "imagenet" / "train" / wnid).iterdir())]
    grey = []
    for i, file in enumerate(files):
        with Image.open(file) as image:
            if image.mode == "L":
                grey.append(i)
    assert grey, "the set has some"
    same = [bool(torch.allclose(p[0], p[1], atol=1e-3) and torch.allclose(p[0], p[2], atol=1e-3)) for p in pictures]
    assert all(same[i] for i in grey)
    with Image.open(files[0]) as image:
        wanted = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR))
    assert np.abs(pictures[0].permute(1, 2, 0).numpy() * 255 - wanted).max() < 1e-2


def test_another_size_is_decoded_from_the_files(imagenet_root, user_cache):
    data, small = ready(imagenet_root, max_per_class=5), ready(imagenet_root, image_size=32, max_per_class=5)
    assert small.train.images.shape[1:] == (3, 32, 32)
    assert "image_size" not in data.describe()["dataset"]
    assert small.describe()["dataset"]["image_size"] == 32
    means = [module.transform.invert(module.test.images).mean((1, 2, 3)) for module in (data, small)]
    assert torch.allclose(*means, atol=0.01), "the same pictures"
    names = sorted(path.name.rsplit("_", 1)[0] for path in (user_cache / "decoded").iterdir())
    assert {"imagenette_128", "imagenette_32"} <= set(names)


def test_descriptions_contain_the_fingerprint_of_the_images(imagenet_root, tmp_path):
    # The value that version 0.1 wrote beside the decoded images; asked for before anything is decoded.
    data = DistillationDataModule("imagenette", root=str(imagenet_root), cache_dir=str(tmp_path))
    assert data.describe()["dataset"]["fingerprint"] == "e6813cb3a2e12aaaf41efa968c3cd9bd"
    assert ready(imagenet_root, cache_dir=str(tmp_path)).describe() == data.describe()


def test_teachers_distillation_and_evaluation(imagenet_root, tmp_path, run_phases):
    store, synthetic, accuracies = run_phases(tmp_path, 5, dataset="imagenette", root=str(imagenet_root))
    assert store.metadata["network"]["image_size"] == 128
    assert synthetic.images.shape == (10, 3, 128, 128)
    assert synthetic.class_names[0] == "tench"
    assert all(0 <= accuracy < 1 for accuracy in accuracies)
