import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from ftd_lightning.data import DistillationDataModule, decoding
from ftd_lightning.data.cache_folder import CacheFolder
from ftd_lightning.data.decoding import (
    Part,
    cache_file,
    cache_metadata,
    class_files,
    fill_cache,
    image_files,
    in_parallel,
    read_cache,
    read_picture,
)


def saved(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def test_pixels_are_those_of_the_file_where_the_size_fits(tmp_path):
    array = noise(6, 6, 3)
    found = read_picture(saved(tmp_path / "a.png", array), channels=3, size=6)
    assert np.array_equal(found, array.transpose(2, 0, 1))


def test_resizing_is_that_of_torchvision_and_squashes(tmp_path):
    array = noise(20, 30, 3)
    found = read_picture(saved(tmp_path / "a.png", array), channels=3, size=8)
    wanted = resize(torch.from_numpy(array).permute(2, 0, 1), [8, 8], antialias=True)
    assert found.shape == (3, 8, 8)
    assert (torch.from_numpy(found).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P"])
def test_every_mode_becomes_rgb_or_grey(tmp_path, mode):
    path = saved(tmp_path / "a.png", noise(6, 6, 3), mode)
    rgb, grey = (read_picture(path, channels=channels, size=6) for channels in (3, 1))
    assert (rgb.shape, grey.shape) == ((3, 6, 6), (1, 6, 6))
    if mode in ("L", "LA", "1"):
        assert np.array_equal(rgb, grey.repeat(3, axis=0))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    array = noise(6, 6, high=65536, dtype=np.uint16)
    found = read_picture(saved(tmp_path / "a.png", array), channels=1, size=6)
    assert np.abs(found[0] - array / 257).max() <= 0.5


def test_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.new("P", (6, 6))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert read_picture(tmp_path / "a.png", channels=3, size=6)[0].max() == 255


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "float"])
def test_unreadable_image_is_refused_by_name(tmp_path, refused, kind):
    path = saved(tmp_path / "a.png", noise(50, 50, 3))
    content = {"text": b"no image\nat all", "truncated": path.read_bytes()[:1000], "empty": b""}
    if kind == "float":
        Image.fromarray(np.zeros((5, 5), dtype=np.float32)).save(path := tmp_path / "a.tiff")
    else:
        path.write_bytes(content[kind])
    with refused(path, "readable image"):
        read_picture(path, channels=3, size=6)


def test_images_below_a_class_are_found_in_order_and_other_files_are_not(tmp_path, image_folder, refused):
    image_folder(tmp_path, ["a"], count=2)
    image_folder(tmp_path / "a", ["deep"], count=1, ending="JPEG")
    for other in ("Thumbs.db", "._a_1.png", "notes.txt"):
        (tmp_path / "a" / other).write_text("x")
    image_folder(tmp_path, ["b"], count=1)
    part = class_files([tmp_path / "a", tmp_path / "b"])
    assert [file.name for file in part.files] == ["a_0.png", "a_1.png", "deep_0.JPEG", "b_0.png"]
    assert part.labels == [0, 0, 0, 1]
    (tmp_path / "none").mkdir()
    for folder in ("none", "absent"):
        with refused(tmp_path / folder):
            class_files([tmp_path / "a", tmp_path / folder])


def test_work_is_shared_among_threads_and_stays_in_order(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    names = set()

    def work(i):
        names.add(threading.current_thread().name)
        time.sleep(0.001)
        return i

    assert in_parallel(work, 200, "test") == list(range(200))
    assert len(names) > 1


def test_a_failure_stops_what_has_not_begun():
    begun = []

    def work(i):
        begun.append(i)
        if i == 3:
            raise KeyboardInterrupt
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        in_parallel(work, 10_000, "test")
    assert len(begun) < 5000


@pytest.fixture
def parts(tmp_path, image_folder):
    root = image_folder(tmp_path / "images", ["a", "b"], count=3)
    part = class_files([root / "a", root / "b"])
    return root, part, Part(part.files[:2], part.labels[:2])


def test_cache_holds_both_parts_and_what_was_measured(tmp_path, parts):
    _, train, test = parts
    fill_cache(tmp_path / "c" / "x.safetensors", train, test, channels=3, size=12, extra=1)
    one, two = read_cache(tmp_path / "c" / "x.safetensors")
    metadata = cache_metadata(tmp_path / "c" / "x.safetensors")
    assert (one.pictures.shape, one.pictures.dtype, one.labels.tolist()) == (
        (6, 3, 12, 12),
        torch.uint8,
        [0] * 3 + [1] * 3,
    )
    assert torch.equal(two.pictures, one.pictures[:2])
    assert (metadata["in_channels"], metadata["image_size"], metadata["extra"]) == (3, 12, 1)
    pixels = one.pictures.double().div(255).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(metadata["mean"], dtype=torch.float64), pixels.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(metadata["std"], dtype=torch.float64), pixels.std(1, correction=0), atol=1e-6)


def test_interrupted_decoding_leaves_nothing(tmp_path, parts, monkeypatch):
    _, train, test = parts
    real, calls = decoding.read_picture, []

    def interrupted(path, **options):
        calls.append(path)
        if len(calls) == 7:  # in the second part
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(decoding, "read_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "c" / "x.safetensors", train, test, channels=3, size=12)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_interrupted_writing_leaves_nothing(tmp_path, parts, monkeypatch):
    from ftd_lightning.data import files

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "c" / "x.safetensors", *parts[1:], channels=3, size=12)
    assert not list((tmp_path / "c").iterdir())


def test_cache_is_named_by_all_that_it_depends_on(tmp_path, parts, refused):
    root, train, test = parts

    def name(size=12, **changed):
        return cache_file(CacheFolder(tmp_path), "x", size, root, {"train": train, "test": test, **changed})

    first = name()
    assert first == name()
    assert first.parent == tmp_path / "cache"
    others = {name(16), name(test=Part([], [])), name(train=Part(train.files, train.labels[::-1]))}
    os.utime(train.files[0], ns=(1, 1))
    others.add(name())
    train.files[0].write_bytes(train.files[0].read_bytes() + b" ")
    os.utime(train.files[0], ns=(1, 1))
    others.add(name())
    assert len(others | {first}) == 6
    train.files[0].unlink()
    with refused(train.files[0]):
        name()


def test_more_than_memory_holds_is_refused_before_anything_is_decoded(tmp_path, parts, refused):
    with refused("data.image_size", "GiB"):
        fill_cache(tmp_path / "x.safetensors", *parts[1:], channels=3, size=10_000_000)


def test_cache_that_cannot_be_written_is_refused(tmp_path, parts, refused):
    (tmp_path / "cache").write_text("a file in its place")
    with refused(tmp_path / "cache"):
        fill_cache(tmp_path / "cache" / "x.safetensors", *parts[1:], channels=3, size=12)


def test_a_root_may_be_relative(tmp_path, monkeypatch):
    """The command line's own default is: ``--data.root data``."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            folder = Path("data", part, name)
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (8, 8), (40 * index, 10, 200)).save(folder / f"{index}.png")
    assert image_files(Path("data", "train", "cats")) == [Path(f"data/train/cats/{index}.png") for index in range(2)]
    data = DistillationDataModule(dataset="folder", root="data", val_fraction=0.0)
    data.prepare_data()
    data.setup()
    assert data.train.images.shape == (4, 3, 8, 8)
