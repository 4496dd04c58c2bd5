"""Where caches of images go."""

from pathlib import Path

from torchvision.datasets import ImageFolder

from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.decoding import cache_folder


def test_caches_lie_in_the_users_cache_or_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "ftd_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == tmp_path / ".cache" / "ftd_lightning"
    assert cache_folder("~/there") == tmp_path / "there"


def test_nothing_is_written_beside_the_images_and_home_is_known_in_every_path(tmp_path, image_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder(tmp_path / "images", ["a", "b"], count=6, size=(6, 6))

    def ready(**options):
        data = DistillationDataModule("folder", root="~/images", zca=True, cache_dir="~/given", **options)
        data.prepare_data()
        data.setup()
        return data

    ready(synthetic="random").synthetic_set.save("~/set.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "images", "set.safetensors"]
    assert sorted(path.name for path in (tmp_path / "given").iterdir()) == ["decoded", "whitening"]
    assert ImageFolder(tmp_path / "images").classes == ["a", "b"]
    assert len(ready(synthetic="~/set.safetensors").synthetic_set.images) == 2
    assert not Path("~").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("")
    data = DistillationDataModule(zca=True, root=str(tmp_path), cache_dir=str(tmp_path / "file"))
    with refused(tmp_path / "file", "data.cache_dir"):
        data.prepare_data()
