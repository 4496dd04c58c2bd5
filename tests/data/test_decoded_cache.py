"""Caches of decoded images: what they hold, and that they are made again where they are damaged."""

import os
import warnings

import pytest
import torch

from ftd_lightning.data import DistillationDataModule, decoding
from ftd_lightning.data.decoding import KIND, DecodedImages, cache_file, fill_cache
from ftd_lightning.data.folder import ImageTree
from ftd_lightning.data.sources import Part
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors


@pytest.fixture
def parts(tmp_path, image_folder):
    root = image_folder(tmp_path / "images", ["a", "b"], count=3)
    part = ImageTree(root).part([root / "a", root / "b"])
    return root, part, Part(part.files[:2], part.labels[:2])


def test_cache_holds_both_parts_and_what_was_measured(tmp_path, parts):
    _, train, test = parts
    fill_cache(tmp_path / "c" / "x.safetensors", train, test, channels=3, size=12, extra=1)
    decoded = DecodedImages(tmp_path / "c" / "x.safetensors", train, test, lambda: pytest.fail("decoded again"))
    (one, two), metadata = decoded.load(), decoded.metadata()
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
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(decoding, "read_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "c" / "x.safetensors", train, test, channels=3, size=12)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_interrupted_writing_leaves_nothing(tmp_path, parts, monkeypatch):
    from ftd_lightning.files import safetensors_io as files

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "c" / "x.safetensors", *parts[1:], channels=3, size=12)
    assert not list((tmp_path / "c").iterdir())


def test_cache_is_named_by_all_that_it_depends_on(tmp_path, parts, refused):
    root, train, test = parts

    def name(size=12, **changed):
        return cache_file(tmp_path, "x", size, root, {"train": train, "test": test, **changed})

    first = name()
    assert first == name()
    assert first.parent == tmp_path / "decoded"
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


# Damage


@pytest.fixture
def decoded(tmp_path, parts):
    """Give decoded images whose cache is filled."""
    _, train, test = parts
    made = DecodedImages(tmp_path / "c" / "x.safetensors", train, test, lambda: {"channels": 3, "size": 12})
    made.load()
    return made


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGES = {
    "truncated": lambda content: content[:-1],
    "empty": lambda _: b"",
    "foreign": lambda _: b"no safetensors file" * 100,
    "a bit of the pictures": lambda content: flipped(content, len(content) - 1000),
    "a bit of the metadata": lambda content: flipped(content, content.index(b"0.") + 3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again_with_a_word(decoded, damage):
    content = decoded.path.read_bytes()
    decoded.path.write_bytes(DAMAGES[damage](content))
    with pytest.warns(UserWarning, match="decoded again") as said:
        train, _ = decoded.load()
    assert len(said) == 1
    assert str(said[0].message).startswith(f"{decoded.path}: ")
    assert train.labels.tolist() == [0] * 3 + [1] * 3
    assert decoded.path.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded.load()


def change(key, value):
    return lambda tensors, metadata: metadata.update({key: value})


def cut(tensors, metadata):
    tensors["test.pictures"] = tensors["test.pictures"][:1]


def relabel(tensors, metadata):
    tensors["train.labels"] = 1 - tensors["train.labels"]


def drop(tensors, metadata):
    del tensors["train.pictures"]


# What a whole file of this kind may hold that does not fit: contents, and what reading the metadata has to notice.
MISFITS = {
    "fewer images": (cut, True),
    "no images": (drop, True),
    "other labels": (relabel, False),
    "another size": (change("image_size", 6), True),
    "no channels": (change("in_channels", None), True),
    "a mean of text": (change("mean", ["0.1", "0.2", "0.3"]), True),
    "a std of one channel": (change("std", [0.1]), True),
    "no fingerprint": (change("fingerprint", None), True),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_cache_of_something_else_is_made_again(decoded, kind):
    content = decoded.path.read_bytes()
    spoil, in_metadata = MISFITS[kind]
    for read in [decoded.load, *([decoded.metadata] if in_metadata else [])]:
        file = TensorFile(decoded.path, kind=KIND)
        tensors, metadata = file.with_prefix(""), dict(file.metadata)
        spoil(tensors, metadata)
        write_tensors(decoded.path, tensors, kind=KIND, metadata=metadata)
        with pytest.warns(UserWarning, match="decoded again"):
            read()
        assert decoded.path.read_bytes() == content


def change_file(path, tensors, metadata):
    file = TensorFile(path, kind=KIND)
    held, header = file.with_prefix(""), dict(file.metadata)
    write_tensors(path, held | tensors, kind=KIND, metadata=header | metadata)


def test_the_held_out_part_is_checked_as_the_others_are(tmp_path, parts):
    _, train, test = parts
    form = {"channels": 3, "size": 12}
    decoded = DecodedImages(tmp_path / "c" / "x.safetensors", train, test, lambda: form, val=train)
    held_out = decoded.load_held_out()
    content = decoded.path.read_bytes()
    fewer, others = held_out.pictures[:3].clone(), 1 - held_out.labels
    for changes in (({}, {"held_out": None}), ({"val.pictures": fewer}, {}), ({"val.labels": others}, {})):
        change_file(decoded.path, *changes)
        with pytest.warns(UserWarning, match="decoded again"):
            found = decoded.load_held_out()
        assert torch.equal(found.labels, held_out.labels)
        assert decoded.path.read_bytes() == content


def test_a_folder_in_place_of_the_cache_is_refused(decoded, refused):
    decoded.path.unlink()
    decoded.path.mkdir()
    with refused(decoded.path, "is a folder", "data.cache_dir"):
        decoded.load()


def test_a_damaged_cache_does_not_disturb_a_run(parts, tmp_path):
    root, *_ = parts

    def ready():
        data = DistillationDataModule("folder", root=str(root), val_fraction=0.0, cache_dir=str(tmp_path / "there"))
        data.prepare_data()
        data.setup()
        return data

    first = ready()
    (file,) = (tmp_path / "there" / "decoded").iterdir()
    content = file.read_bytes()
    file.unlink()  # the first run has mapped it
    file.write_bytes(DAMAGES["a bit of the pictures"](content))
    with pytest.warns(UserWarning, match="decoded again"):
        again = ready()
    assert torch.equal(again.train.images, first.train.images)
    assert again.describe() == first.describe()
