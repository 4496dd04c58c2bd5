"""Which files of a tree are images, and where its links may lead."""

import os
from pathlib import Path

import pytest
from PIL import Image

from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data import folder as image_tree
from ftd_lightning.data.folder import ImageTree, told_what_is_unreadable


@pytest.fixture
def said(monkeypatch):
    """Give the lines that are logged."""
    lines = []
    image_tree._announce.cache_clear()
    monkeypatch.setattr(image_tree, "rank_zero_info", lines.append)
    return lines


@pytest.fixture
def root(tmp_path, image_folder):
    """Give train/ and val/ with the classes a and b, four images each."""
    for part in ("train", "val"):
        image_folder(tmp_path / "root" / part, ["a", "b"])
    return tmp_path / "root"


def find(root):
    return DistillationDataModule("folder", root=str(root), val_fraction=0.0).spec.load()


def test_images_below_a_class_are_found_in_order_and_other_files_are_not(tmp_path, image_folder, refused):
    image_folder(tmp_path, ["a"], count=2)
    image_folder(tmp_path / "a", ["deep"], count=1, ending="JPEG")
    for other in ("Thumbs.db", "._a_1.png", "notes.txt"):
        (tmp_path / "a" / other).write_text("x")
    image_folder(tmp_path, ["b"], count=1)
    part = ImageTree(tmp_path).part([tmp_path / "a", tmp_path / "b"])
    assert [file.name for file in part.files] == ["a_0.png", "a_1.png", "deep_0.JPEG", "b_0.png"]
    assert part.labels == [0, 0, 0, 1]
    (tmp_path / "none").mkdir()
    for folder in ("none", "absent"):
        with refused(tmp_path / folder):
            ImageTree(tmp_path).part([tmp_path / "a", tmp_path / folder])


def test_a_root_may_be_relative(tmp_path, monkeypatch):
    """The command line's own default is: ``--data.root data``."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            folder = Path("data", part, name)
            folder.mkdir(parents=True)
            for index in range(2):
                Image.linear_gradient("L").convert("RGB").resize((8, 8)).save(folder / f"{index}.png")
    assert ImageTree(Path("data")).images(Path("data", "train", "cats")) == [
        Path(f"data/train/cats/{index}.png") for index in range(2)
    ]
    data = DistillationDataModule(dataset="folder", root="data", val_fraction=0.0)
    data.prepare_data()
    data.setup()
    assert data.train.images.shape == (4, 3, 8, 8)


# Links

LINKS = {
    "up, to the tree": ("train/a/up", "..", "up to"),
    "up, to the root": ("train/a/up", "../..", "up to"),
    "to itself": ("train/a/same", ".", "up to"),
    "to a sibling below": ("train/a/more", "../b", "also read"),
    "to the other part": ("train/a/more", "../../val/a", "also read"),
    "from a class that comes later": ("val/b/more", "../../train", "also read"),
    "a class that is another": ("train/c", "b", "also read"),
    "out, a class": ("train/c", "../../outside", "out of"),
    "out, below a class": ("train/b/more", "../../../outside", "out of"),
    "out, a file": ("train/b/more.png", "../../../outside/outside_0.png", "out of"),
    "out, to nothing": ("train/b/more.png", "/nowhere/at/all.png", "out of"),
    "in a circle": ("train/b/loop", "loop", "cannot be read"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_that_lead_elsewhere_are_refused_by_name(tmp_path, root, image_folder, refused, kind):
    link, target, problem = LINKS[kind]
    image_folder(tmp_path, ["outside"])
    (root / link).symlink_to(target)
    if link.endswith("c"):
        image_folder(root / "val", ["c"])
    with refused(f"{root / link}: ", problem):
        find(root)


def test_a_part_that_is_the_other_one_is_refused(tmp_path, image_folder, refused):
    image_folder(tmp_path / "train", ["a", "b"])
    (tmp_path / "val").symlink_to("train")
    with refused(f"{tmp_path / 'val'}: a link", "also read", tmp_path / "train" / "a"):
        find(tmp_path)


def test_a_link_up_from_a_class_of_a_flat_tree_is_refused(tmp_path, image_folder, refused):
    """It once made 984 images of 24."""
    image_folder(tmp_path, ["a", "b"], count=12)
    (tmp_path / "a" / "up").symlink_to("..")
    with refused(tmp_path / "a" / "up"):
        find(tmp_path)


def test_links_within_the_tree_and_to_the_root_are_followed(tmp_path, root, image_folder):
    image_folder(root / ".shelf", ["deep"], count=2)
    (root / "train" / "a" / "more").symlink_to("../../.shelf/deep")
    (root / "train" / "b" / "again.png").symlink_to("b_0.png")
    (tmp_path / "elsewhere").symlink_to("root")
    train, test = find(tmp_path / "elsewhere")
    assert train.labels.tolist() == [0] * 6 + [1] * 5
    assert test.labels.tolist() == [0] * 4 + [1] * 4


def test_a_link_that_leads_nowhere_is_refused(root, refused):
    (root / "train" / "b" / "more.png").symlink_to("gone.png")
    with refused(root / "train" / "b" / "more.png", "cannot be read"):
        find(root)


# What is skipped, and what cannot be read


def test_what_is_skipped_is_counted_by_kind_and_said_once(root, said):
    for name in ("._a_1.png", ".DS_Store", "notes.txt", "README"):
        (root / "train" / "a" / name).write_text("x")
    (root / "val" / "a" / ".hidden").mkdir()
    frames = [Image.new("L", (6, 6), value) for value in (0, 255)]
    frames[0].save(root / "val" / "b" / "moving.gif", save_all=True, append_images=frames[1:])
    os.mkfifo(root / "val" / "b" / "pipe.png")
    for _ in range(2):
        assert [len(part.labels) for part in find(root)] == [8, 8]
    assert said == [
        f"{root}: skipped 1 GIF, 2 hidden files, 1 hidden folder, 3 other files (endings: .png, .txt, none)"
    ]


def test_nothing_is_said_where_nothing_is_skipped(tmp_path, image_folder, said):
    image_folder(tmp_path, ["a", "b"])
    find(tmp_path)
    assert not said


@pytest.mark.parametrize("place", ["train", "train/a", "val/b"])
def test_an_unreadable_folder_is_refused_by_name(root, refused, monkeypatch, place):
    # Whoever runs the tests may be allowed to read everything.
    real = os.scandir

    def scandir(path):
        if Path(path) == root / place:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in scandir(path)])
    with refused(f"{root / place}: cannot be read (Permission denied)"):
        find(root)


def test_an_unreadable_file_is_refused_by_name(root, refused, monkeypatch):
    real, file = Image.open, root / "train" / "b" / "b_2.png"

    def opened(path):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Image, "open", opened)
    with refused(f"{file}: cannot be read (Permission denied)"):
        find(root)


def test_errors_of_the_operating_system_name_their_path(refused):
    with refused("data/x: cannot be read (Permission denied)"), told_what_is_unreadable():
        raise PermissionError(13, "Permission denied", "data/x")
