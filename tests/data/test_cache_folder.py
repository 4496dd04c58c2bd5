"""Where caches of images go."""

import os
import shutil

import pytest

from ftd_lightning.data import DistillationDataModule, cache_folder
from ftd_lightning.data.cache_folder import CacheFolder


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    cache_folder._announce.cache_clear()
    return tmp_path / "user" / "ftd_lightning"


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(cache_folder, "rank_zero_info", lines.append)
    return lines


def test_caches_lie_under_root_or_the_given_folder(tmp_path, said):
    assert CacheFolder(tmp_path).file("cache", "x") == tmp_path / "cache" / "x"
    assert CacheFolder(tmp_path / "new" / "root").file("cache", "x") == tmp_path / "new" / "root" / "cache" / "x"
    assert CacheFolder(tmp_path, tmp_path / "there").file("cache", "x") == tmp_path / "there" / "cache" / "x"
    assert not said


def test_without_a_folder_that_can_be_written_the_users_cache_takes_them(tmp_path, user_cache, said):
    (tmp_path / "file").write_text("")
    below_a_file = CacheFolder(tmp_path / "file" / "root")
    for _ in range(2):
        assert below_a_file.file("cache", "x") == user_cache / "cache" / "x"
    assert CacheFolder(None).file("cache", "x") == user_cache / "cache" / "x"
    assert CacheFolder(tmp_path / "none", makes_root=False).file("cache", "x") == user_cache / "cache" / "x"
    assert len(said) == 3, "each reason once"
    assert all("data.cache_dir" in line for line in said)


def test_home_is_the_users_cache_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CacheFolder(None).file("cache", "x") == tmp_path / ".cache" / "ftd_lightning" / "cache" / "x"


def test_a_tree_that_cannot_be_written_is_decoded_and_whitened(tmp_path, image_folder, user_cache, monkeypatch):
    root, given = tmp_path / "images", tmp_path / "given"
    for part in ("train", "val"):
        image_folder(root / part, ["a", "b"], size=(6, 6))
    access = os.access
    monkeypatch.setattr(
        cache_folder.os, "access", lambda path, mode: not str(path).startswith(str(root)) and access(path, mode)
    )

    def ready(**options):
        data = DistillationDataModule("folder", root=str(root), zca=True, val_fraction=0.0, **options)
        data.prepare_data()
        data.setup()
        return data.describe()

    described = ready()
    assert sorted(path.name for path in root.iterdir()) == ["train", "val"]
    assert sorted(path.name for path in user_cache.iterdir()) == ["cache", "whitening"]
    assert ready(cache_dir=str(given)) == described
    assert sorted(path.name for path in given.iterdir()) == ["cache", "whitening"]
    # Caches that somebody has put under root are read there.
    shutil.copytree(given, root, dirs_exist_ok=True)
    shutil.rmtree(user_cache)
    assert ready() == described
    assert not user_cache.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("")
    data = DistillationDataModule(zca=True, root=str(tmp_path), cache_dir=str(tmp_path / "file"))
    with refused(tmp_path / "file", "data.cache_dir"):
        data.prepare_data()
