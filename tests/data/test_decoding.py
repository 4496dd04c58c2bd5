import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from ftd_lightning.data.decoding import in_parallel, read_picture


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
