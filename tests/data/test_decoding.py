import os
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.v2.functional import resize

from ftd_lightning.data import decoding
from ftd_lightning.data.decoding import (
    DecodedImages,
    LabelledFiles,
    cache_file,
    cached_whitening,
    decode,
    pixels,
)
from ftd_lightning.data.sources import Request
from ftd_lightning.files.transforms import Whitening


def read(path, *, channels=3, size=6):
    with Image.open(path) as image:
        return pixels(image, channels=channels, size=(size, size))


def saved(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def test_pixels_are_kept_or_resized_as_torchvision_does(tmp_path):
    array = noise(6, 6, 3)
    assert np.array_equal(read(saved(tmp_path / "a.png", array)), array.transpose(2, 0, 1))
    array = noise(20, 30, 3)
    found = read(saved(tmp_path / "a.png", array), size=8)
    wanted = resize(torch.from_numpy(array).permute(2, 0, 1), [8, 8], antialias=True)
    assert found.shape == (3, 8, 8)
    assert (torch.from_numpy(found).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P"])
def test_every_mode_becomes_rgb_or_grey(tmp_path, mode):
    path = saved(tmp_path / "a.png", noise(6, 6, 3), mode)
    rgb, grey = (read(path, channels=channels) for channels in (3, 1))
    assert (rgb.shape, grey.shape) == ((3, 6, 6), (1, 6, 6))
    if mode in ("L", "LA", "1"):
        assert np.array_equal(rgb, grey.repeat(3, axis=0))


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_the_values_of_the_file(tmp_path, ending):
    array = noise(6, 6, high=4096, dtype=np.uint16)
    assert all(np.array_equal(channel, array) for channel in read(saved(tmp_path / f"a.{ending}", array)))
    smaller = read(tmp_path / f"a.{ending}", channels=1, size=3)
    assert smaller.dtype == np.uint16
    assert abs(smaller.mean() - array.mean()) < 100


# Four pixels that are stored as 1 2 / 3 4, as a viewer shows them by EXIF orientation.
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
        assert read(path, channels=1, size=2)[0].tolist() == wanted, value
    Image.fromarray(noise(2, 2)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00no tags")
    assert read(tmp_path / "a.jpg", channels=1, size=2).shape == (1, 2, 2)


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
    for image, transparency in ((palette, b"\x00\xff"), (palette.convert("RGB"), (255, 0, 0))):
        image.save(path, transparency=transparency)
        with Image.open(path) as shown:
            assert pixels(shown, channels=3)[:, 0].T.tolist() == [[255, 255, 255], [0, 255, 0]]


def test_unreadable_images_are_refused_by_name(tmp_path, refused):
    path = saved(tmp_path / "a.png", noise(50, 50, 3))
    deep = tmp_path / "a.tiff"
    Image.fromarray(np.zeros((5, 5), dtype=np.float32)).save(deep)
    for file, content in ((path, b"no image\nat all"), (path, path.read_bytes()[:1000]), (path, b""), (deep, None)):
        if content is not None:
            file.write_bytes(content)
        with refused(f"unreadable images, 1 of 1: {file} (", "data.skip_broken", "--skip-broken"):
            decode({"train": LabelledFiles([file], [0])}, channels=3, size=6, deep=False)


# The cache of decoded images


@pytest.fixture
def decoded(tmp_path, image_folder):
    """Give decoded images whose cache is filled."""
    root = image_folder(tmp_path / "images", ["a", "b"], count=3)
    train = LabelledFiles(sorted(root.glob("*/*.png")), [0] * 3 + [1] * 3)
    parts = {"train": train, "test": LabelledFiles(train.files[:2], train.labels[:2])}
    found = DecodedImages(tmp_path / "c" / "x.safetensors", parts, lambda: {"channels": 3, "size": 12, "extra": 1})
    found.load()
    return found


def test_cache_holds_all_parts_and_their_statistics(decoded):
    parts, metadata = decoded.load(), decoded.metadata()
    train, test = parts["train"], parts["test"]
    assert (train.pictures.shape, train.pictures.dtype) == ((6, 3, 12, 12), torch.uint8)
    assert train.labels.tolist() == [0] * 3 + [1] * 3
    assert torch.equal(test.pictures, train.pictures[:2])
    assert (metadata["in_channels"], metadata["image_size"], metadata["extra"]) == (3, 12, 1)
    values = train.pictures.double().div(255).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(metadata["mean"], dtype=torch.float64), values.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(metadata["std"], dtype=torch.float64), values.std(1, correction=0), atol=1e-6)


def test_interrupted_work_leaves_nothing(decoded, monkeypatch):
    decoded.path.unlink()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    for place in ("ftd_lightning.data.decoding.pixels", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                decoded.load()
        assert not list(decoded.path.parent.iterdir())


def test_cache_is_named_by_all_that_it_depends_on(tmp_path, decoded):
    train, empty = decoded.parts["train"], LabelledFiles([], [])

    def name(size=12, skip=False, **changed):
        request = Request(cache_dir=tmp_path, skip_broken=skip)
        return cache_file(request, "x", size, tmp_path / "images", {**decoded.parts, **changed})

    names = {name(), name(), name(16), name(test=empty), name(train=LabelledFiles(train.files, train.labels[::-1]))}
    names.add(name(skip=True))
    os.utime(train.files[0], ns=(1, 1))
    names.add(name())
    train.files[0].write_bytes(train.files[0].read_bytes() + b" ")
    os.utime(train.files[0], ns=(1, 1))
    names.add(name())
    assert len(names) == 7
    assert {path.parent for path in names} == {tmp_path / "decoded"}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_damaged_cache_is_made_again_with_a_word(decoded, monkeypatch):
    content = decoded.path.read_bytes()
    for damaged in (content[:-1], flipped(content, len(content) - 1000)):
        decoded.path.unlink()  # it is mapped
        decoded.path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="decoded again") as warned:
            parts = decoded.load()
        assert [str(warning.message).startswith(f"{decoded.path}: ") for warning in warned] == [True]
        assert parts["train"].labels.tolist() == [0] * 3 + [1] * 3
        assert decoded.path.read_bytes() == content
    monkeypatch.setattr(decoding, "decode", lambda *args, **options: pytest.fail("decoded again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded.load()


def test_caches_that_cannot_be_made_are_refused(decoded, tmp_path, refused):
    huge = DecodedImages(tmp_path / "y", decoded.parts, lambda: {"channels": 3, "size": 10_000_000})
    with refused("data.image_size", "GiB"):
        huge.load()
    decoded.path.unlink()
    decoded.path.mkdir()
    with refused(decoded.path, "cannot be written", "data.cache_dir"):
        decoded.load()


# The cache of whitenings


def test_damaged_whitening_is_fitted_again_with_a_word(tmp_path):
    pictures = torch.rand(30, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    def whitening():
        return cached_whitening(lambda: pictures, {"name": "some images"}, eps=0.1, cache_dir=tmp_path)

    before = whitening()
    (file,) = (tmp_path / "whitening").iterdir()
    assert " " not in file.name
    content = file.read_bytes()
    file.unlink()  # it is mapped
    file.write_bytes(flipped(content, len(content) - 10))
    with pytest.warns(UserWarning, match="fitted again"):
        assert torch.equal(whitening().inverse, before.inverse)
    assert file.read_bytes() == content


def test_whitening_beyond_the_memory_is_refused_before_it_is_begun(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(Whitening, "fit", lambda *args, **options: pytest.fail("begun"))
    images = torch.zeros(12, 3, 250, 250, dtype=torch.uint8)
    with refused("zca", "data.image_size", "187,500 x 187,500 (140,625,000,000 bytes)", "GiB"):
        cached_whitening(lambda: images, {"name": "some images"}, eps=0.1, cache_dir=tmp_path)
