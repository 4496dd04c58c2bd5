import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ftd_lightning.data import DistillationDataModule, decoding, folder
from ftd_lightning.data.folder import ImageTree

CLASSES = ["ant", "bee", "cow"]


def ready(root, **options):
    data = DistillationDataModule(**{"dataset": "folder", "root": str(root), "val_fraction": 0.0, **options})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def both(tmp_path, image_folder):
    """Give a folder with train/ and val/, 12 px."""
    image_folder(tmp_path / "root" / "train", CLASSES, count=5)
    image_folder(tmp_path / "root" / "val", CLASSES, count=2, seed=1)
    return tmp_path / "root"


@pytest.fixture
def flat(tmp_path, image_folder):
    """Give a folder of classes of ten images."""
    return image_folder(tmp_path, CLASSES, count=10)


@pytest.fixture
def logged(monkeypatch):
    """Give the lines that are logged."""
    lines = []
    folder._announce.cache_clear()
    monkeypatch.setattr(folder, "rank_zero_info", lines.append)
    return lines


def keys(images, data):
    pictures = data.transform.invert(images.images).mul(255).round().to(torch.uint8)
    return [picture.numpy().tobytes() for picture in pictures]


def key(file):
    with Image.open(file) as image:
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).tobytes()


# Files


def test_images_below_a_class_are_found_in_order_and_other_files_are_counted(tmp_path, image_folder, refused, logged):
    image_folder(tmp_path, ["a"], count=2)
    image_folder(tmp_path / "a", ["deep"], count=1, ending="JPEG")
    image_folder(tmp_path / "a", [".hidden"], count=1)
    for other in ("Thumbs.db", "._a_1.png", ".DS_Store", "notes.txt", "README", "moving.gif"):
        (tmp_path / "a" / other).write_text("x")
    image_folder(tmp_path, ["b"], count=1)
    (tmp_path / "b" / "linked.png").symlink_to("../a/a_0.png")  # a link to a file is a file
    (tmp_path / "b" / "up").symlink_to("..")  # a link to a folder is not followed
    tree = ImageTree(tmp_path)
    part = tree.part([tmp_path / "a", tmp_path / "b"])
    assert [file.name for file in part.files] == ["a_0.png", "a_1.png", "deep_0.JPEG", "b_0.png", "linked.png"]
    assert part.labels == [0, 0, 0, 1, 1]
    for _ in range(2):
        tree.log_skipped()
    assert logged == [f"{tmp_path}: skipped 1 .db, 1 .gif, 1 .txt, 1 linked folder, 1 no ending"]
    (tmp_path / "none").mkdir()
    for name in ("none", "absent"):
        with refused(tmp_path / name):
            tree.part([tmp_path / "a", tmp_path / name])


def test_files_and_folders_that_cannot_be_read_are_refused_by_name(both, refused, monkeypatch):
    (both / "train" / "bee" / "more.png").symlink_to("gone.png")
    with refused(both / "train" / "bee" / "more.png", "cannot be read"):
        ready(both)
    real, closed = os.scandir, str(both / "val" / "bee")

    def scandir(path):  # whoever runs the tests may be allowed to read everything
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with refused(f"{closed}: cannot be read (Permission denied)"):
        ready(both)


def test_wrong_layouts_are_refused(tmp_path, image_folder, refused):
    def check(name, *words):
        with refused(tmp_path / name, *words):
            ready(tmp_path / name.partition("/")[0])

    check("nowhere")
    image_folder(tmp_path / "loose", ["."])  # images, but no class
    check("loose", "0 folders", "train/<class>/")
    image_folder(tmp_path / "a" / "train", CLASSES)
    check("a", "train/ but no val/ or test/", "data.test_fraction")
    image_folder(tmp_path / "a" / "val", CLASSES[:2])
    check("a/val/cow", "no such folder")
    image_folder(tmp_path / "a" / "val", [*CLASSES, "dog"])
    check("a/train/dog", "no such folder")
    (tmp_path / "a" / "train" / "dog").mkdir()
    shutil.rmtree(tmp_path / "a" / "train" / "cow")
    (tmp_path / "a" / "train" / "cow").mkdir()
    check("a/train/cow", tmp_path / "a" / "train" / "dog", "no images")
    image_folder(tmp_path / "b" / "val", CLASSES)
    image_folder(tmp_path / "b" / "test", CLASSES)
    check("b", "val/ and test/ but no train/", "data.test_fraction")
    image_folder(tmp_path / "c", CLASSES, count=1)
    check("c/ant", "one image")
    image_folder(tmp_path / "d" / "Training", CLASSES)
    image_folder(tmp_path / "d" / "Test", CLASSES)
    check("d/Test", tmp_path / "d" / "Training", "rename it to train, val or test")
    for part in ("train", "test", "valid"):
        image_folder(tmp_path / "e" / part, CLASSES)
    check("e/valid", "would not be read as a part")
    assert ready(image_folder(tmp_path / "f", ["invalid", "valid"])).class_names == ["invalid", "valid"]


def test_chosen_classes_are_counted_by_headers_alone(flat, monkeypatch):
    data = DistillationDataModule("folder", str(flat), classes=["cow", "ant"], test_fraction=0.3, val_fraction=0.2)
    monkeypatch.setattr(data, "_read", None)
    assert [data.count(part) for part in ("train", "val", "test")] == [[6, 6], [1, 1], [3, 3]]


def test_the_last_image_of_a_class_is_never_held_out(tmp_path, image_folder):
    root = image_folder(tmp_path, CLASSES, count=10)
    for file in sorted((root / "ant").iterdir())[2:]:
        file.unlink()
    data = ready(root, val_fraction=0.6)
    assert data.train.labels.bincount().tolist()[0] == 1


def test_a_set_that_may_have_seen_test_images_is_refused(flat, tmp_path, refused):
    made = ready(flat, synthetic="random", ipc=1, test_fraction=0.3).training_set()
    made.save(tmp_path / "set.safetensors")
    larger, smaller = (set(keys(data.test, data)) for data in (ready(flat, test_fraction=f) for f in (0.3, 0.2)))
    assert smaller < larger
    ready(flat, synthetic=str(tmp_path / "set.safetensors"), test_fraction=0.2)
    with refused("set.safetensors", "has seen test images"):
        ready(flat, synthetic=str(tmp_path / "set.safetensors"), test_fraction=0.4)


# Parts


def test_everything_is_found_from_the_data(both, monkeypatch):
    monkeypatch.chdir(both.parent)
    data = ready("root")  # relative, as the command line's default is
    assert (data.class_names, data.in_channels, data.image_size) == (CLASSES, 3, 12)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.test.labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    assert data.train.images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (data.train.images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert keys(data.train, data)[8] == key(both / "train" / "bee" / "bee_3.png")
    assert torch.equal(pickle.loads(pickle.dumps(data.spec)).load()["test"].labels, data.test.labels)


def test_description_holds_the_findings_and_copies_share_it(both, tmp_path):
    data = ready(both)
    dataset = data.describe()["dataset"]
    assert (dataset["class_names"], dataset["in_channels"], dataset["image_size"]) == (CLASSES, 3, 12)
    assert "test_fraction" not in dataset
    copied = shutil.copytree(both, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times of change
    for same in (ready(copied), ready(both, test_fraction=0.5), ready(both, image_size=12)):
        assert same.describe() == data.describe()
    (copied / "train" / "ant" / "ant_0.png").unlink()
    assert ready(copied).describe()["dataset"]["fingerprint"] != dataset["fingerprint"]
    assert ready(both, image_size=8).describe()["dataset"]["image_size"] == 8


@pytest.mark.parametrize(("fraction", "each"), [(0.2, 2), (0.01, 1), (0.9, 9)])
def test_one_folder_is_split_by_class_and_fraction(flat, fraction, each):
    data = ready(flat, test_fraction=fraction)
    assert data.test.labels.bincount().tolist() == [each] * 3
    assert data.train.labels.bincount().tolist() == [10 - each] * 3
    assert len({*keys(data.train, data), *keys(data.test, data)}) == 30
    assert data.describe()["dataset"]["test_fraction"] == fraction


def test_names_of_files_decide_the_split_and_one_more_image_moves_one_other_at_most(flat, tmp_path):
    data = ready(flat)
    train, test = keys(data.train, data), keys(data.test, data)
    assert keys(ready(flat, seed=1).test, data) == test
    other = shutil.copytree(flat, tmp_path / "copy" / "images")
    assert keys(ready(other).test, data) == test
    in_order = [key(file) for file in sorted(flat.glob("???/*.png"))]
    places = {in_order.index(one) % 10 for one in test}
    assert not places <= {0, 1}  # not the first or the last ones of each class
    assert not places <= {8, 9}
    with Image.open(other / "bee" / "bee_0.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(other / "bee" / "aaa.png")
    after = ready(other)
    assert len(set(test) - set(keys(after.test, after))) <= 1
    assert set(train) <= set(keys(after.train, after))


def test_of_three_folders_val_is_held_out_and_identifies_the_data(both, image_folder):
    of_two = ready(both, val_fraction=0.2)
    assert of_two.val.labels.tolist() == [0, 1, 2]
    assert of_two.describe()["dataset"]["val_fraction"] == 0.2
    image_folder(both / "test", CLASSES, count=3, seed=2)
    data = ready(both, val_fraction=0.5, max_per_class=4)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [12, 6, 9]
    assert keys(data.val, data) == keys(of_two.test, of_two)
    assert keys(data.test, data)[5] == key(both / "test" / "bee" / "bee_2.png")
    assert [len(labels) for _, labels in data.val_dataloader()] == [6]
    dataset = ready(both).describe()["dataset"]
    assert dataset["val_fraction"] is None
    assert ready(both, val_fraction=0.2).describe()["dataset"] == dataset
    image_folder(both / "val", ["cow"], count=1, seed=9)
    changed = ready(both).describe()["dataset"]
    assert changed["held_out"] != dataset["held_out"]
    assert {**changed, "held_out": dataset["held_out"]} == dataset


def test_grey_only_if_all_are_grey_and_the_most_common_size(both, image_folder):
    image_folder(both / "train", CLASSES[:1], count=1, mode="L")
    assert ready(both).in_channels == 3
    image_folder(both / "train", CLASSES, count=3, size=(20, 16))
    data = ready(both)
    assert data.train.images.shape == (15, 3, 16, 16)
    assert ready(both, image_size=8).train.images.shape == (15, 3, 8, 8)
    for part in ("train", "val"):
        image_folder(both / part, CLASSES, count=5, mode="L")
    data = ready(both)
    assert (data.train.images.shape, len(data.spec.mean)) == ((15, 1, 12, 12), 1)


# Decoding


def test_a_census_counts_the_files_before_they_are_decoded(both, logged, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 10)).save(both / "train" / "ant" / "turned.jpg", exif=exif)
    Image.new("RGBA", (12, 12)).save(both / "val" / "bee" / "clear.png")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", lambda *args, **options: pytest.fail("decoded"))
        data = DistillationDataModule("folder", root=str(both), val_fraction=0.4)
        census = data.census
        assert [data.count(part) for part in ("train", "val", "test")] == [[4, 3, 3], [2, 2, 2], [2, 3, 2]]
    assert (census.files, census.classes) == (23, {"ant": 8, "bee": 8, "cow": 7})
    assert (census.sizes, census.modes) == ({(12, 12): 22, (10, 20): 1}, {"RGB": 22, "RGBA": 1})
    assert (census.turned, census.transparent, census.bits, census.unreadable) == (1, 1, 8, 0)
    assert census.lines() == [
        "23 images of 12 x 12 to 10 x 20 px in colour; 3 classes of 7 (cow) to 8 (ant)",
        "1 is turned upright by EXIF orientation; 1 is transparent, composited on white",
    ]
    for _ in range(2):
        assert ready(both).count("train") == [6, 5, 5]
    assert logged == [
        "images become 12 x 12 px: 1 of 23 are enlarged; 1 of 23 are squashed, aspect ratio changed by up to 2.00"
    ]


@pytest.mark.parametrize("mixed", [False, True])
def test_twelve_bits_keep_their_levels(both, mixed):
    for part in ("train", "val"):
        for i, name in enumerate(CLASSES):
            ramp = np.linspace(0, 4095, 144).round().astype(np.uint16).reshape(12, 12)
            Image.fromarray(np.roll(ramp, i)).save(both / part / name / f"{name}_0.png")
            for file in (both / part / name).glob("*_[1-9].png") if not mixed else ():
                file.unlink()
    data = ready(both)
    pictures = data.spec.load()["train"].pictures
    deep = pictures[[0, 5, 10]] if mixed else pictures
    assert (data.in_channels, data.census.bits, pictures.dtype) == (3 if mixed else 1, 16, torch.float32)
    assert [len(picture.unique()) for picture in deep] == [144] * 3
    assert torch.equal(deep[0, 0].flatten(), torch.linspace(0, 4095, 144).round() / 4095)
    assert data.describe()["dataset"]["maximum"] == 4095
    assert ready(both).describe() == data.describe()
    if mixed:
        with Image.open(both / "train" / "ant" / "ant_1.png") as image:
            assert torch.equal(pictures[1].mul(255).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_blank_and_unreadable_images_are_refused_and_nothing_is_written(both, image_folder, refused, tmp_path):
    image_folder(both / "test", CLASSES, count=3, seed=2)
    for part in ("train", "val", "test"):
        file = both / part / "bee" / "bee_1.png"
        content = file.read_bytes()
        file.write_bytes(content[:60])
        with refused(f"unreadable images, 1 of 30: {file} ("):
            ready(both, cache_dir=str(tmp_path / "cache"))
        file.write_bytes(content)
    assert not list(tmp_path.glob("cache/decoded/*"))
    for name in ("bee_0.png", "bee_1.png", "bee_2.png"):
        (both / "test" / "bee" / name).write_bytes(b"text")
    (both / "test" / "cow" / "cow_0.png").write_bytes(b"")
    with refused("unreadable images, 4 of 30", *(both / "test" / "bee" / f"bee_{i}.png" for i in range(3)), ", ...;"):
        ready(both)
    with refused(f"{both / 'test' / 'bee'}: holds no readable image"):
        ready(both, skip_broken=True)
    image_folder(both / "test", ["bee"], count=1, seed=2)
    skipping = ready(both, skip_broken=True)
    assert [skipping.count(part) for part in ("train", "val", "test")] == [[5, 5, 5], [2, 2, 2], [3, 1, 2]]
    identity = skipping.describe()["dataset"]["fingerprint"]
    assert DistillationDataModule("folder", root=str(both)).census.unreadable == 3
    with refused("3 of 30"):  # what was decoded with the option is not read without
        ready(both)
    (both / "test" / "cow" / "cow_0.png").unlink()
    assert ready(both, skip_broken=True).describe()["dataset"]["fingerprint"] == identity
    for file in both.rglob("*.png"):
        Image.new("RGB", (12, 12), (len(file.name) % 7,) * 3).save(file)
    with refused("every training image is of a single colour"):
        DistillationDataModule("folder", root=str(both)).prepare_data()


def test_caches_lie_in_the_given_folder_and_home_is_known_in_every_path(tmp_path, image_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder(tmp_path / "images", ["a", "b"], count=6, size=(6, 6))
    ready("~/images", zca=True, cache_dir="~/given", synthetic="random").synthetic_set.save("~/set.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "images", "set.safetensors"]
    assert sorted(path.name for path in (tmp_path / "given").iterdir()) == ["decoded", "whitening"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["a", "b"]
    again = ready("~/images", cache_dir="~/given", synthetic="~/set.safetensors")
    assert len(again.synthetic_set.images) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ready("~/images")
    assert len(list(tmp_path.glob("xdg/ftd_lightning/decoded/*"))) == 1
    assert not Path("~").exists()
