import shutil
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.utils import calculate_md5

from ftd_lightning.data import DistillationDataModule, decoding
from ftd_lightning.data import imagenet as tiny_imagenet

WNIDS = ["n02", "n03", "n01"]  # not in alphabetical order, nor are the official ones


@pytest.fixture
def small(tmp_path, image_folder):
    """Give a folder with three classes in the official layout, 64 px."""
    root = tmp_path / "root"
    folder = root / tiny_imagenet.NAME
    image_folder(folder / "train", WNIDS, size=(64, 64), ending="JPEG", inner="images")
    image_folder(folder / "val", ["images"], count=6, size=(64, 64), ending="JPEG", seed=1)
    for i in range(6):
        (folder / "val" / "images" / f"images_{i}.JPEG").rename(folder / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{WNIDS[(i + 1) % 3]}\t0\t0\t62\t62\n" for i in range(6)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    words = "n02\tEgyptian cat\nn01\tcrane, bird\nn03\tcrane\nn09\tnever, there\n"
    (folder / "words.txt").write_text(words)
    return root


def ready(root, **options):
    data = DistillationDataModule(**{"dataset": "tiny-imagenet", "root": str(root), "download": False, **options})
    data.prepare_data()
    data.setup()
    return data


def test_labels_follow_wnids_txt_and_val_its_annotations(small):
    data = ready(small, val_fraction=0.0)
    # Two classes share their first word: the ids tell them apart.
    assert data.class_names == ["Egyptian_cat", "crane_n03", "crane_n01"]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [1, 2, 0, 1, 2, 0]
    pictures = data.transform.invert(data.train.images).mul(255).round()
    with Image.open(small / tiny_imagenet.NAME / "train" / "n01" / "images" / "n01_2.JPEG") as image:
        assert np.array_equal(pictures[10].permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("listed", [None, "n01\nn02\n", "n01\nn02\nn03\nn04\n"])
def test_without_a_list_that_fits_classes_are_sorted(small, listed):
    file = small / tiny_imagenet.NAME / "wnids.txt"
    file.unlink() if listed is None else file.write_text(listed)
    (small / tiny_imagenet.NAME / "words.txt").unlink()
    assert ready(small).class_names == sorted(WNIDS)


def test_wrong_layouts_are_refused(small, refused):
    folder = small / tiny_imagenet.NAME
    annotations = folder / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(lines + "val_7.JPEG\tn01\n")
    with refused("val_7.JPEG", "line 7"):
        ready(small)
    annotations.write_text(lines + "val_0.JPEG\tn99\n")
    with refused(annotations, "line 7", "n99"):
        ready(small)
    annotations.write_text(lines.splitlines()[0])
    with refused(annotations, "n02"):
        ready(small)
    annotations.unlink()
    with refused(annotations):
        ready(small)
    annotations.write_text(lines)
    shutil.rmtree(folder / "train" / "n01" / "images")
    with refused(folder / "train" / "n01"):
        ready(small)
    shutil.rmtree(folder / "train")
    with refused(folder / "train"):
        ready(small)


def test_absent_folder_is_refused_where_it_may_not_be_downloaded(tmp_path, refused):
    data = DistillationDataModule(dataset="tiny-imagenet", root=str(tmp_path), download=False)
    for stage in (data.prepare_data, data.setup, lambda: data.num_classes):
        with refused("Tiny ImageNet", tmp_path, "data.download"):
            stage()
    assert not list(tmp_path.iterdir())


# The download, of a small archive from a server on this machine


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def archive(small, tmp_path, monkeypatch):
    """Put the small set's archive where the download looks for it; give its path."""
    path = tmp_path / "server" / f"{tiny_imagenet.NAME}.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(small.rglob("*")):
            file.write(member, member.relative_to(small))
    monkeypatch.setattr(tiny_imagenet, "MD5", calculate_md5(path))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=path.parent)) as server:
        monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/{path.name}")
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield path
        server.shutdown()
        thread.join()


def test_official_archive_is_named():
    assert tiny_imagenet.URL == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert tiny_imagenet.MD5 == "90528d7ca1a48142e341f4ef8d21d0de"


def test_download_gives_the_same_images_and_leaves_the_folder_alone(small, archive, tmp_path):
    there, fetched = ready(small), ready(tmp_path / "new", download=True)
    assert torch.equal(there.train.images, fetched.train.images)
    assert torch.equal(there.test.labels, fetched.test.labels)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [tiny_imagenet.NAME]


def test_archive_that_lies_in_root_is_unpacked(small, archive, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    shutil.copy(archive, tmp_path / "new")
    monkeypatch.setattr(tiny_imagenet, "download_url", lambda *args: pytest.fail("downloaded"))
    assert ready(tmp_path / "new", download=True).num_classes == 3


def test_archive_with_another_checksum_is_refused(archive, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(tiny_imagenet, "MD5", "0" * 32)
    with refused("Tiny ImageNet", "corrupted", tmp_path / "new"):
        ready(tmp_path / "new", download=True)
    assert not (tmp_path / "new" / tiny_imagenet.NAME).exists()


def test_no_network_is_refused(tmp_path, monkeypatch, refused):
    def no_network(*args):
        raise URLError("no route to host")

    monkeypatch.setattr(tiny_imagenet, "download_url", no_network)
    with refused("Tiny ImageNet", "network", tmp_path / "new"):
        ready(tmp_path / "new", download=True)


def test_interrupted_unpacking_is_not_taken_for_whole(archive, tmp_path, monkeypatch):
    real, count = zipfile.ZipFile.extract, []

    def interrupted(*args, **options):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(zipfile.ZipFile, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(tmp_path / "new", download=True)
    assert not (tmp_path / "new" / tiny_imagenet.NAME).exists()
    # The archive came whole: it is not fetched again.
    archive.unlink()
    assert ready(tmp_path / "new", download=True).test.labels.tolist() == [1, 2, 0, 1, 2, 0]


def test_half_a_download_is_fetched_again(archive, tmp_path):
    part = tmp_path / "new" / f".{tiny_imagenet.NAME}.part" / archive.name
    part.parent.mkdir(parents=True)
    part.write_bytes(archive.read_bytes()[:1000])
    assert ready(tmp_path / "new", download=True).num_classes == 3


# The real images


def test_real_images(tiny_root):
    data = ready(tiny_root, val_fraction=0.0)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 64)
    assert data.train.images.shape == (5000, 3, 64, 64)
    assert data.train.labels.bincount().tolist() == [500] * 10
    assert data.test.labels.bincount().tolist() == [50] * 10
    assert data.class_names[:3] == ["Egyptian_cat", "reel", "volleyball"]
    # ImageNet's constants fit.
    assert data.train.images.mean().abs() < 0.1
    assert 1 < data.train.images.std() < 1.3
    described = data.describe()["dataset"]
    # The value that version 0.1 wrote beside the decoded images.
    assert described.pop("fingerprint") == "036655acbc7b68ec55cb961cbca4930f"
    assert described == {
        "name": "tiny-imagenet",
        "val_fraction": 0.0,
        "max_per_class": None,
        "seed": 0,
    }


def test_later_runs_map_the_cache(tiny_root, monkeypatch):
    first = ready(tiny_root)
    monkeypatch.setattr(decoding, "read_picture", lambda *args, **options: pytest.fail("decoded again"))
    again = ready(tiny_root)
    assert torch.equal(first.train.images, again.train.images)


def test_another_size_changes_the_images(tiny_root):
    data = ready(tiny_root, image_size=32, max_per_class=10)
    assert data.train.images.shape == (90, 3, 32, 32)
    assert data.describe()["dataset"]["image_size"] == 32


def test_teachers_distillation_and_evaluation(tiny_root, tmp_path, run_phases):
    store, synthetic, accuracies = run_phases(tmp_path, 4, dataset="tiny-imagenet", root=str(tiny_root))
    assert store.metadata["network"]["image_size"] == 64
    assert synthetic.images.shape == (10, 3, 64, 64)
    assert synthetic.class_names[0] == "Egyptian_cat"
    assert all(0 <= accuracy < 1 for accuracy in accuracies)
