"""Subsets of ImageNet, and Tiny ImageNet: small trees in their layouts, and the real images where they are."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.utils import calculate_md5

from ftd_lightning.data import DistillationDataModule, imagenet
from ftd_lightning.data.imagenet import SUBSETS

# ILSVRC class indices, in label order.
INDICES = {
    "imagenette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
    "imagewoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
    "imagefruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
    "imagemeow": [281, 282, 283, 284, 285, 291, 292, 290, 289, 287],
    "imagesquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
    "imageyellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
}


def ready(root, name="imagenette", **options):
    data = DistillationDataModule(**{"dataset": name, "root": str(root), "download": False, **options})
    data.prepare_data()
    data.setup()
    return data


def test_classes_and_their_order():
    """Indices count the classes of ILSVRC in the order of their WordNet ids."""
    wnids = {}
    for name, indices in INDICES.items():
        wnids |= dict(zip(indices, SUBSETS[name], strict=True))
        data = DistillationDataModule(dataset=name, root="nowhere")
        assert data.class_names == list(SUBSETS[name].values())
        assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 128)
        assert (data.spec.mean, data.spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert set(INDICES) == set(SUBSETS)
    assert [wnids[index] for index in sorted(wnids)] == sorted(wnids.values())
    assert SUBSETS["imagewoof"]["n02086240"] == "shih-tzu"


@pytest.mark.parametrize(("name", "below"), [("imagefruit", "imagenet"), ("imageyellow", "")])
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


def test_real_images_are_squashed(imagenet_root):
    data = ready(imagenet_root, val_fraction=0.0)
    assert data.describe()["dataset"]["fingerprint"] == "e6813cb3a2e12aaaf41efa968c3cd9bd"  # as of version 0.1
    assert data.train.images.shape == (500, 3, 128, 128)
    assert data.test.images.shape == (200, 3, 128, 128)
    assert data.test.labels.bincount().tolist() == [20] * 10
    picture = data.transform.invert(data.train.images[:1])[0].permute(1, 2, 0).numpy()
    first = min((imagenet_root / "imagenet" / "train" / next(iter(SUBSETS["imagenette"]))).iterdir())
    with Image.open(first) as image:
        wanted = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR))
    assert np.abs(picture * 255 - wanted).max() < 1e-2


# Tiny ImageNet

TINY = "tiny-imagenet"
WNIDS = ["n02", "n03", "n01"]  # not in alphabetical order, nor are the official ones


@pytest.fixture
def small(tmp_path, image_folder):
    """Give a folder with three classes in the official layout, 64 px."""
    root = tmp_path / "root"
    folder = root / imagenet.NAME
    image_folder(folder / "train", WNIDS, size=(64, 64), ending="JPEG", inner="images")
    image_folder(folder / "val", ["images"], count=6, size=(64, 64), ending="JPEG", seed=1)
    for i in range(6):
        (folder / "val" / "images" / f"images_{i}.JPEG").rename(folder / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{WNIDS[(i + 1) % 3]}\t0\t0\t62\t62\n" for i in range(6)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    words = "n02\tEgyptian cat\nn01\tcrane, bird\nn03\tcrane\nn09\tnever, there\n"
    (folder / "words.txt").write_text(words)
    return root


def test_labels_follow_wnids_txt_and_val_its_annotations(small):
    data = ready(small, TINY, val_fraction=0.0)
    # Two classes share their first word: the ids tell them apart.
    assert data.class_names == ["Egyptian_cat", "crane_n03", "crane_n01"]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [1, 2, 0, 1, 2, 0]
    pictures = data.transform.invert(data.train.images).mul(255).round()
    with Image.open(small / imagenet.NAME / "train" / "n01" / "images" / "n01_2.JPEG") as image:
        assert np.array_equal(pictures[10].permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("listed", [None, "n01\nn02\n", "n01\nn02\nn03\nn04\n"])
def test_without_a_list_that_fits_classes_are_sorted(small, listed):
    file = small / imagenet.NAME / "wnids.txt"
    file.unlink() if listed is None else file.write_text(listed)
    (small / imagenet.NAME / "words.txt").unlink()
    assert ready(small, TINY).class_names == sorted(WNIDS)


def test_wrong_layouts_are_refused(small, refused):
    folder = small / imagenet.NAME
    annotations = folder / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(lines + "val_7.JPEG\tn01\n")
    with refused("val_7.JPEG: cannot be read"):
        ready(small, TINY)
    annotations.write_text(lines + "val_0.JPEG\tn99\n")
    with refused(annotations, "line 7", "n99"):
        ready(small, TINY)
    annotations.unlink()
    with refused(annotations):
        ready(small, TINY)
    annotations.write_text(lines)
    shutil.rmtree(folder / "train" / "n01" / "images")
    with refused(folder / "train" / "n01"):
        ready(small, TINY)
    shutil.rmtree(folder / "train")
    with refused(folder / "train"):
        ready(small, TINY)


def test_absent_folder_is_refused_where_it_may_not_be_downloaded(tmp_path, refused):
    data = DistillationDataModule(dataset=TINY, root=str(tmp_path), download=False)
    for stage in (data.prepare_data, data.setup, lambda: data.num_classes):
        with refused("Tiny ImageNet", tmp_path, "data.download"):
            stage()
    assert not list(tmp_path.iterdir())


# The download, of a small archive


@pytest.fixture
def archive(small, tmp_path, monkeypatch):
    """Put the small set's archive where the download fetches it from; give its path."""
    path = tmp_path / "server" / f"{imagenet.NAME}.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(small.rglob("*")):
            file.write(member, member.relative_to(small))
    monkeypatch.setattr(imagenet, "MD5", calculate_md5(path))
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda url, target: shutil.copy(path, target))
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    return path


def test_download_gives_the_same_images_and_leaves_the_folder_alone(small, archive, tmp_path):
    there, fetched = ready(small, TINY), ready(tmp_path / "new", TINY, download=True)
    assert torch.equal(there.train.images, fetched.train.images)
    assert torch.equal(there.test.labels, fetched.test.labels)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [imagenet.NAME]


def test_archive_with_another_checksum_is_refused(archive, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(imagenet, "MD5", "0" * 32)
    with refused("Tiny ImageNet", "corrupted", tmp_path / "new"):
        ready(tmp_path / "new", TINY, download=True)
    assert not (tmp_path / "new" / imagenet.NAME).exists()


def test_interrupted_unpacking_is_not_taken_for_whole(archive, tmp_path, monkeypatch):
    real, count = zipfile.ZipFile._extract_member, []

    def interrupted(*args, **options):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(zipfile.ZipFile, "_extract_member", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(tmp_path / "new", TINY, download=True)
    assert not (tmp_path / "new" / imagenet.NAME).exists()
    # The archive came whole: it is not fetched again.
    archive.unlink()
    assert ready(tmp_path / "new", TINY, download=True).test.labels.tolist() == [1, 2, 0, 1, 2, 0]


# The real images


def test_real_images(tiny_root):
    data = ready(tiny_root, TINY, val_fraction=0.0)
    assert data.train.images.shape == (5000, 3, 64, 64)
    assert data.test.labels.bincount().tolist() == [50] * 10
    assert data.class_names[:3] == ["Egyptian_cat", "reel", "volleyball"]
    # ImageNet's constants fit.
    assert data.train.images.mean().abs() < 0.1
    assert 1 < data.train.images.std() < 1.3
    described = data.describe()["dataset"]
    # The value that version 0.1 wrote beside the decoded images.
    assert described.pop("fingerprint") == "036655acbc7b68ec55cb961cbca4930f"
    assert described == {"name": "tiny-imagenet", "val_fraction": 0.0, "max_per_class": None, "seed": 0}
