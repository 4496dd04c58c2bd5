import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ftd_lightning.data import DistillationDataModule, decoding
from ftd_lightning.data.imagenet import SUBSETS

CLASSES = ["ant", "bee", "cow"]


def ready(root, **options):
    data = DistillationDataModule(**{"dataset": "folder", "root": str(root), "val_fraction": 0.0, **options})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def both(tmp_path, image_folder):
    """Give a folder with train/ and val/, 12 px."""
    image_folder(tmp_path / "train", CLASSES, count=5)
    image_folder(tmp_path / "val", CLASSES, count=2, seed=1)
    return tmp_path


@pytest.fixture
def flat(tmp_path, image_folder):
    """Give a folder of classes of ten images."""
    return image_folder(tmp_path, CLASSES, count=10)


def keys(images, data):
    pictures = data.transform.invert(images.images).mul(255).round().to(torch.uint8)
    return [picture.numpy().tobytes() for picture in pictures]


def test_everything_is_found_from_the_data(both):
    data = ready(both)
    assert (data.class_names, data.in_channels, data.image_size) == (CLASSES, 3, 12)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.test.labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    assert data.train.images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (data.train.images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    with Image.open(both / "train" / "bee" / "bee_3.png") as image:
        assert keys(data.train, data)[8] == np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).tobytes()


def test_properties_and_pickling_before_setup(both):
    data = DistillationDataModule(dataset="folder", root=str(both))
    assert data.num_classes == 3
    assert pickle.loads(pickle.dumps(data.spec)).class_names == data.spec.class_names


def test_description_says_what_was_found_and_copies_share_it(both, tmp_path_factory):
    data = ready(both)
    dataset = data.describe()["dataset"]
    assert (dataset["class_names"], dataset["in_channels"], dataset["image_size"]) == (CLASSES, 3, 12)
    copied = tmp_path_factory.mktemp("copy")
    for part in ("train", "val"):  # with other times of change
        shutil.copytree(both / part, copied / part, copy_function=shutil.copyfile)
    assert ready(copied).describe() == data.describe()
    (copied / "train" / "ant" / "ant_0.png").unlink()
    assert ready(copied).describe()["dataset"]["fingerprint"] != dataset["fingerprint"]
    assert "test_fraction" not in dataset
    assert ready(both, test_fraction=0.5).describe() == data.describe()
    assert ready(both, image_size=12).describe() == data.describe()
    assert ready(both, image_size=8).describe()["dataset"]["image_size"] == 8


@pytest.mark.parametrize(("fraction", "each"), [(0.2, 2), (0.5, 5), (0.01, 1), (0.9, 9)])
def test_one_folder_is_split_by_class_and_fraction(flat, fraction, each):
    data = ready(flat, test_fraction=fraction)
    assert data.test.labels.bincount().tolist() == [each] * 3
    assert data.train.labels.bincount().tolist() == [10 - each] * 3
    train, test = keys(data.train, data), keys(data.test, data)
    assert len({*train, *test}) == 30
    assert data.describe()["dataset"]["test_fraction"] == fraction


def test_split_is_the_same_for_every_seed_and_root(flat, tmp_path_factory):
    data = ready(flat)
    assert keys(ready(flat, seed=1).test, data) == keys(data.test, data)
    other = shutil.copytree(flat, tmp_path_factory.mktemp("copy") / "images")
    assert keys(ready(other).test, data) == keys(data.test, data)
    # Drawn, not the first or the last ones of each class.
    train, test = keys(data.train, data), keys(data.test, data)
    in_order = [np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() for file in sorted(flat.glob("???/*.png"))]
    assert sorted(in_order) == sorted(train + test)
    places = [in_order.index(key) % 10 for key in test]
    assert not set(places) <= {0, 1}
    assert not set(places) <= {8, 9}


def test_of_three_folders_val_is_held_out(both, image_folder):
    of_two = ready(both)
    image_folder(both / "test", CLASSES, count=3, seed=2)
    data = ready(both, val_fraction=0.5, max_per_class=4)
    assert torch.equal(ready(both).train.images, of_two.train.images)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [12, 6, 9]
    assert keys(data.val, data) == keys(of_two.test, of_two)
    assert data.val.labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    with Image.open(both / "test" / "bee" / "bee_2.png") as image:
        assert keys(data.test, data)[5] == np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).tobytes()
    assert [len(labels) for _, labels in data.val_dataloader()] == [6]
    assert torch.equal(pickle.loads(pickle.dumps(data.spec)).held_out().labels, data.val.labels)


def test_held_out_images_identify_the_data(both, image_folder):
    assert ready(both).describe()["dataset"]["val_fraction"] == 0
    image_folder(both / "test", CLASSES, count=3, seed=2)
    dataset = ready(both).describe()["dataset"]
    assert dataset["val_fraction"] is None
    assert ready(both, val_fraction=0.2).describe()["dataset"] == dataset
    image_folder(both / "val", ["cow"], count=1, seed=9)
    changed = ready(both).describe()["dataset"]
    assert changed["held_out"] != dataset["held_out"]
    assert {**changed, "held_out": dataset["held_out"]} == dataset


def test_the_other_of_two_folders_is_the_test_part(both):
    as_val = ready(both, val_fraction=0.2)
    (both / "val").rename(both / "test")
    as_test = ready(both, val_fraction=0.2)
    assert as_test.describe() == as_val.describe()
    assert torch.equal(as_test.test.images, as_val.test.images)
    assert as_test.val.labels.tolist() == [0, 1, 2]


def test_one_more_image_moves_one_other_at_most(flat, image_folder):
    before = ready(flat)
    train, test = keys(before.train, before), keys(before.test, before)
    with Image.open(flat / "bee" / "bee_0.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(flat / "bee" / "aaa.png")
    after = ready(flat)
    moved = set(test) - set(keys(after.test, after))
    assert len(moved) <= 1, "the new one may take the place of one, in its class"
    assert len(set(train) - set(keys(after.train, after))) == 0


def test_grey_only_if_all_are_grey(both, image_folder):
    image_folder(both / "train", CLASSES[:1], count=1, mode="L")
    assert ready(both).in_channels == 3
    for part in ("train", "val"):
        image_folder(both / part, CLASSES, count=5, mode="L")
    data = ready(both)
    assert data.in_channels == 1
    assert data.train.images.shape == (15, 1, 12, 12)
    assert len(data.spec.mean) == 1


def test_most_common_size_is_taken_and_squashed(both, image_folder):
    image_folder(both / "train", CLASSES, count=3, size=(20, 16))
    data = ready(both)
    assert data.image_size == 16
    assert data.train.images.shape == (15, 3, 16, 16)
    small = ready(both, image_size=8)
    assert small.train.images.shape == (15, 3, 8, 8)


@pytest.mark.parametrize("parts", ["two", "three"])
def test_later_runs_map_the_cache_and_a_changed_file_is_read(both, image_folder, monkeypatch, parts):
    if parts == "three":
        image_folder(both / "test", CLASSES, count=3, seed=2)
    first = ready(both)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_picture", lambda *args, **options: pytest.fail("decoded again"))
        again = ready(both)
        assert torch.equal(again.train.images, first.train.images)
        assert torch.equal(again.val.images, first.val.images)
    image_folder(both / "train", ["cow"], count=1, seed=9)
    assert not torch.equal(ready(both).train.images, first.train.images)


def test_unreadable_image_is_refused_and_nothing_written(both, image_folder, refused):
    image_folder(both / "test", CLASSES, count=3, seed=2)
    for part, name in (("train", "bee_1.png"), ("val", "bee_1.png"), ("test", "bee_1.png")):
        file = both / part / "bee" / name
        content = file.read_bytes()
        file.write_bytes(content[:60])
        with refused(file, "readable image"):
            ready(both)
        file.write_bytes(content)
    for name in ("bee_0.png", "bee_1.png", "bee_2.png"):
        (both / "test" / "bee" / name).write_bytes(b"text")
    with refused(both / "test" / "bee" / "bee_0.png", "2 more files are unreadable"):
        ready(both)
    assert DistillationDataModule("folder", root=str(both)).census.unreadable == 3


def test_a_census_says_what_the_files_are_before_they_are_decoded(both, image_folder, monkeypatch):
    from ftd_lightning.data import folder

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 10)).save(both / "train" / "ant" / "turned.jpg", exif=exif)
    Image.new("RGBA", (12, 12)).save(both / "val" / "bee" / "clear.png")
    said = []
    monkeypatch.setattr(folder, "rank_zero_info", said.append)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_picture", lambda *args, **options: pytest.fail("decoded"))
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
        again = ready(both)
        assert again.census == census
        assert again.count("train") == [6, 5, 5]
    assert said == [
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
    (pictures, _), _ = data.spec.load()
    deep = pictures[[0, 5, 10]] if mixed else pictures
    assert (data.in_channels, data.census.bits, pictures.dtype) == (3 if mixed else 1, 16, torch.float32)
    assert [len(picture.unique()) for picture in deep] == [144] * 3
    assert torch.equal(deep[0, 0].flatten(), torch.linspace(0, 4095, 144).round() / 4095)
    assert data.describe()["dataset"]["maximum"] == 4095
    assert ready(both).describe() == data.describe()
    if mixed:
        with Image.open(both / "train" / "ant" / "ant_1.png") as image:
            assert torch.equal(pictures[1].mul(255).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_blank_images_are_refused_before_anything_is_trained(both, refused):
    for file in both.rglob("*.png"):
        Image.new("RGB", (12, 12), (len(file.name) % 7,) * 3).save(file)
    with refused("every training image is of a single colour"):
        DistillationDataModule("folder", root=str(both)).prepare_data()


def test_wrong_layouts_are_refused(tmp_path, image_folder, refused):
    with refused(tmp_path / "nowhere"):
        ready(tmp_path / "nowhere")
    with refused(tmp_path, "train/<class>/"):
        ready(tmp_path)
    image_folder(tmp_path / "loose", ["."])  # images, but no class
    with refused(tmp_path / "loose", "0 folders"):
        ready(tmp_path / "loose")
    image_folder(tmp_path / "a" / "train", CLASSES)
    with refused(tmp_path / "a", "train/ but no val/ or test/", "data.test_fraction"):
        ready(tmp_path / "a")
    image_folder(tmp_path / "c" / "val", CLASSES)
    with refused(tmp_path / "c", "val/ but no train/", "data.test_fraction"):
        ready(tmp_path / "c")
    image_folder(tmp_path / "c" / "test", CLASSES)
    with refused(tmp_path / "c", "val/ and test/ but no train/", "data.test_fraction"):
        ready(tmp_path / "c")
    image_folder(tmp_path / "c" / "train", [*CLASSES, "dog"])
    image_folder(tmp_path / "c" / "val", ["dog"])
    with refused(tmp_path / "c" / "test" / "dog", "no such folder"):
        ready(tmp_path / "c")
    image_folder(tmp_path / "a" / "val", CLASSES[:2])
    with refused(tmp_path / "a" / "val" / "cow", "no such folder"):
        ready(tmp_path / "a")
    image_folder(tmp_path / "a" / "val", [*CLASSES, "dog"])
    with refused(tmp_path / "a" / "train" / "dog", "no such folder"):
        ready(tmp_path / "a")
    (tmp_path / "a" / "train" / "dog").mkdir()
    with refused(tmp_path / "a" / "train" / "dog", "no images"):
        ready(tmp_path / "a")
    image_folder(tmp_path / "b", CLASSES, count=1)
    with refused(tmp_path / "b" / "ant", "one image"):
        ready(tmp_path / "b")


@pytest.mark.parametrize("wrong", [{"test_fraction": 0.0}, {"test_fraction": 1.0}, {"image_size": 0}])
def test_arguments_out_of_range_are_refused(refused, wrong):
    (name, value) = next(iter(wrong.items()))
    with refused(f"{name}={value}"):
        DistillationDataModule(dataset="folder", **wrong)


def test_teachers_distillation_and_evaluation_on_ones_own_images(imagenet_root, tmp_path, run_phases):
    """Three classes of real images at their own size but for an argument, split by the fraction."""
    (tmp_path / "images").mkdir()
    for wnid in list(SUBSETS["imagenette"])[:3]:
        shutil.copytree(imagenet_root / "imagenet" / "train" / wnid, tmp_path / "images" / wnid)
    store, synthetic, accuracies = run_phases(
        tmp_path / "runs", 3, dataset="folder", root=str(tmp_path / "images"), image_size=32, test_fraction=0.4
    )
    assert store.metadata["dataset"]["class_names"] == list(SUBSETS["imagenette"])[:3]
    assert store.metadata["dataset"]["image_size"] == store.metadata["network"]["image_size"] == 32
    assert synthetic.images.shape == (3, 3, 32, 32)
    # "At most": of 50 images 20 are there to test, 10 are kept.
    assert all((accuracy * 30) % 1 < 1e-3 or (accuracy * 30) % 1 > 1 - 1e-3 for accuracy in accuracies)
