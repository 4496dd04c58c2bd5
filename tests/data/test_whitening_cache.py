"""Whitenings that earlier runs have fitted."""

import pytest
import torch

from ftd_lightning.data.decoding import cached_whitening
from ftd_lightning.files.transforms import Whitening


@pytest.fixture
def pictures():
    return torch.rand(30, 1, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fitted(tmp_path, pictures):
    """Give a function that reads or fits the whitening, and its file, which is there."""

    def read():
        return cached_whitening(pictures, "some images", eps=0.1, cache_dir=tmp_path)

    read()
    (file,) = (tmp_path / "whitening").iterdir()
    return read, file


def flipped(content):
    return content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]


DAMAGES = {"truncated": lambda content: content[:-1], "foreign": lambda _: b"text" * 50, "a bit": flipped}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_whitening_is_fitted_again_with_a_word(fitted, damage):
    read, file = fitted
    content, before = file.read_bytes(), read()
    file.unlink()  # it is mapped
    file.write_bytes(DAMAGES[damage](content))
    with pytest.warns(UserWarning, match="fitted again") as said:
        again = read()
    assert len(said) == 1
    assert str(said[0].message).startswith(f"{file}: ")
    assert torch.equal(again.inverse, before.inverse)
    assert file.read_bytes() == content


@pytest.mark.parametrize("other", ["pictures", "eps", "size"])
def test_whitening_of_something_else_is_fitted_again(fitted, pictures, other):
    read, file = fitted
    content = file.read_bytes()
    shown = {"pictures": pictures / 2, "eps": pictures, "size": pictures[:, :, :2]}[other]
    fitted_on = None if other == "pictures" else read().fitted_on
    Whitening.fit(shown, eps=0.2 if other == "eps" else 0.1, fitted_on=fitted_on).save(file)
    with pytest.warns(UserWarning, match="other pictures"):
        read()
    assert file.read_bytes() == content


def test_what_cannot_fit_in_memory_is_refused_before_it_is_begun(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(Whitening, "fit", lambda *args, **options: pytest.fail("begun"))
    images = torch.zeros(12, 3, 250, 250, dtype=torch.uint8)
    with refused("zca", "data.image_size", "187,500 x 187,500 (140,625,000,000 bytes)", "GiB"):
        cached_whitening(images, "some images", eps=0.1, cache_dir=tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(fitted, refused):
    read, file = fitted
    file.unlink()
    file.mkdir()
    with refused(file, "is a folder", "data.cache_dir"):
        read()


def test_a_file_in_place_of_the_folder_is_refused(fitted, refused):
    read, file = fitted
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("")
    with refused(file.parent, "data.cache_dir"):
        read()
