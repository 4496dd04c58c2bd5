import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.v2.functional import resize

from ftd_lightning.data.decoding import in_parallel, pixels, read_picture


def saved(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def test_pixels_are_those_of_the_file_where_the_size_fits(tmp_path):
    array = noise(6, 6, 3)
    found, _ = read_picture(saved(tmp_path / "a.png", array), channels=3, size=6)
    assert np.array_equal(found, array.transpose(2, 0, 1))


def test_resizing_is_that_of_torchvision_and_squashes(tmp_path):
    array = noise(20, 30, 3)
    found, _ = read_picture(saved(tmp_path / "a.png", array), channels=3, size=8)
    wanted = resize(torch.from_numpy(array).permute(2, 0, 1), [8, 8], antialias=True)
    assert found.shape == (3, 8, 8)
    assert (torch.from_numpy(found).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P"])
def test_every_mode_becomes_rgb_or_grey(tmp_path, mode):
    path = saved(tmp_path / "a.png", noise(6, 6, 3), mode)
    rgb, grey = (read_picture(path, channels=channels, size=6)[0] for channels in (3, 1))
    assert (rgb.shape, grey.shape) == ((3, 6, 6), (1, 6, 6))
    if mode in ("L", "LA", "1"):
        assert np.array_equal(rgb, grey.repeat(3, axis=0))


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_the_values_of_the_file(tmp_path, ending):
    array = noise(6, 6, high=4096, dtype=np.uint16)
    array[0, 0] = 4095
    found, largest = read_picture(saved(tmp_path / f"a.{ending}", array), channels=3, size=6)
    assert largest == 4095
    assert all(np.array_equal(channel, array) for channel in found)
    smaller, largest = read_picture(tmp_path / f"a.{ending}", channels=1, size=3)
    assert (smaller.dtype, largest) == (np.uint16, 4095)
    assert abs(smaller.mean() - array.mean()) < 100


# What a viewer shows of four pixels that are stored as 1 2 / 3 4, by EXIF orientation.
UPRIGHT = {
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
}


@pytest.mark.parametrize(("ending", "dtype"), [("png", np.uint8), ("tiff", np.uint8), ("png", np.uint16)])
def test_images_are_turned_by_their_exif_orientation(tmp_path, ending, dtype):
    for value, wanted in UPRIGHT.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = value
        path = tmp_path / f"{value}.{ending}"
        Image.fromarray(np.array(UPRIGHT[1], dtype=dtype)).save(path, exif=exif)
        found, _ = read_picture(path, channels=1, size=2)
        assert found[0].tolist() == wanted, value


def test_unreadable_exif_leaves_the_image_as_it_is(tmp_path):
    Image.fromarray(noise(2, 2)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00no tags")
    assert read_picture(tmp_path / "a.jpg", channels=1, size=2)[0].shape == (1, 2, 2)


def test_transparency_is_white(tmp_path):
    path, colours = tmp_path / "a.png", np.zeros((1, 3, 4), dtype=np.uint8)
    colours[0, :, 3] = (0, 128, 255)  # black: clear, half, opaque
    for mode in ("RGBA", "LA"):
        saved(path, colours, mode)
        for channels in (1, 3):
            with Image.open(path) as shown:
                assert [values[0].tolist() for values in pixels(shown, channels=channels)] == [[255, 127, 0]] * channels
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(path, transparency=b"\x00\xff")
    with Image.open(path) as shown:
        assert pixels(shown, channels=3)[:, 0].T.tolist() == [[255, 255, 255], [0, 255, 0]]
    palette.convert("RGB").save(path, transparency=(255, 0, 0))
    with Image.open(path) as shown:
        assert pixels(shown, channels=3)[:, 0].T.tolist() == [[255, 255, 255], [0, 255, 0]]


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
