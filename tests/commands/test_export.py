"""``ftd export``: pictures that torchvision and Hugging Face read, in the right colours and with the right labels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

from ftd_lightning import SyntheticSet, cli
from ftd_lightning.commands import export as module
from ftd_lightning.commands.export import folder_names
from ftd_lightning.files import Standardization, Whitening


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_set(channels: int, size: int, *, zca: bool, names: list[str], **changes) -> SyntheticSet:
    """Three images of each class, the classes in turns."""
    count = 3 * len(names)
    pictures = random(count, channels, size, size)
    transform = (
        Whitening.fit(random(60, channels, size, size, seed=1))
        if zca
        else Standardization([0.5] * channels, [0.25] * channels)
    )
    fields = {
        "images": transform.apply(pictures),
        "labels": torch.arange(count) % len(names),
        "step_size": torch.tensor(0.01),
        "ema_images": transform.apply(pictures.flip(0)),
        "class_names": names,
        "transform": transform,
        "metadata": {"method": "ftd", "dataset": {"name": "toy"}},
    }
    return SyntheticSet(**{**fields, **changes})


DIGITS = [str(digit) for digit in range(10)]
ANIMALS = ["zebra", "ant", "Käfer", "train"]
SETS = {
    "digits": lambda: make_set(1, 8, zca=False, names=DIGITS),
    "whitened digits": lambda: make_set(1, 8, zca=True, names=DIGITS),
    "colours": lambda: make_set(3, 32, zca=False, names=ANIMALS),
    "whitened colours": lambda: make_set(3, 16, zca=True, names=ANIMALS),
}


def exported(synthetic: SyntheticSet, folder: Path, *arguments: str) -> Path:
    synthetic.save(folder / "some.safetensors")
    cli.main(["export", str(folder / "some.safetensors"), str(folder / "out"), *arguments])
    return folder / "out"


def table(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def eight_bit(picture: torch.Tensor) -> np.ndarray:
    """What a file has to hold: (H, W, 3), grey ones with three equal channels, as ImageFolder reads them."""
    return (picture.expand(3, -1, -1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *map(str, arguments)])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out, len(shown.err.splitlines())) == (1, "", 1)
    return shown.err


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_image_folder_reads_the_pictures_with_their_labels(name: str, ema: bool, tmp_path: Path, capsys) -> None:
    synthetic = SETS[name]()
    folder = exported(synthetic, tmp_path, *(["--ema"] if ema else []))
    assert capsys.readouterr().out.startswith(f"{folder}: {len(synthetic.images)} pictures")
    data = ImageFolder(str(folder))
    assert len(data) == len(synthetic.images)
    by_file = {line["file_name"]: line for line in table(folder)}
    pictures = SyntheticSet.load(tmp_path / "some.safetensors").pictures(ema=ema)
    for (file, label), (image, _) in zip(data.samples, data, strict=True):
        line = by_file.pop(str(Path(file).relative_to(folder)))
        # ImageFolder numbers folders in sorted order, which is that of the classes.
        assert label == line["label"] == int(synthetic.labels[line["index"]])
        assert line["class"] == synthetic.class_names[label]
        assert np.array_equal(np.asarray(image), eight_bit(pictures[line["index"]]))
        with Image.open(file) as stored:
            assert stored.mode == ("L" if synthetic.images.shape[1] == 1 else "RGB")
    assert not by_file


def test_real_colours_come_back_to_the_last_bit(tmp_path: Path) -> None:
    """From 8-bit pictures through whitening, the tensors and the PNG."""
    pictures = random(4, 3, 16, 16).mul(255).round().div(255)
    synthetic = make_set(3, 16, zca=True, names=ANIMALS)
    synthetic.images, synthetic.labels = synthetic.transform.apply(pictures), torch.arange(4)
    synthetic.ema_images = None
    folder = exported(synthetic, tmp_path)
    for line in table(folder):
        with Image.open(folder / line["file_name"]) as image:
            assert np.array_equal(np.asarray(image), eight_bit(pictures[line["index"]]))


def test_the_layout_is_what_hugging_face_documents_for_imagefolder(tmp_path: Path) -> None:
    """metadata.jsonl at the root, a row with a relative file_name for each image; the card's header names the files."""
    folder = exported(SETS["colours"](), tmp_path)
    lines = table(folder)
    images = {str(path.relative_to(folder)) for path in folder.glob("*/*.png")}
    assert {line["file_name"] for line in lines} == images
    assert len({tuple(line) for line in lines}) == 1, "every row has the same columns"
    header, body = front_matter(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert header["license"] == "unknown"
    assert header["task_categories"] == ["image-classification"]
    (config,) = header["configs"]
    (split,) = config["data_files"]
    assert split["split"] == "train"
    found = {str(path.relative_to(folder)) for pattern in split["path"] for path in folder.glob(pattern)}
    assert found == images | {"metadata.jsonl"}, "the grid is no image of the set"
    assert "(grid.png)" in body
    # No folder is taken for a split: these words beside a separator would be.
    words = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"
    split_words = re.compile(rf"(^|[-._ 0-9/])({words})[-._ 0-9/]")
    assert not any(split_words.search(name) for name in images)


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])


@pytest.mark.parametrize("soft", [False, True])
def test_the_card_names_columns_and_classes_as_hugging_face_features(soft: bool, tmp_path: Path) -> None:
    names = ["yes", "12", "a: 'b' # \"c\"", "Käfer\n"]
    labels = torch.arange(12) % 4
    labels = torch.nn.functional.one_hot(labels, 4).float() if soft else labels
    folder = exported(make_set(3, 8, zca=False, names=names, labels=labels), tmp_path)
    header = front_matter(folder)
    features = header["dataset_info"]["features"]
    assert header["configs"][0]["features"] == features
    image, label, *others = features
    assert image == {"name": "image", "dtype": "image"}
    assert label == {"name": "label", "dtype": {"class_label": {"names": {str(i): names[i] for i in range(4)}}}}
    # What is not declared here would be refused: the other columns of every row, in any order.
    kinds = {"string": str, "int64": int, "float64": list}
    columns = {feature["name"]: kinds[feature.get("dtype") or feature["sequence"]] for feature in others}
    for line in table(folder):
        assert {key: type(value) for key, value in line.items() if key not in ("file_name", "label")} == columns
        assert names[line["label"]] == line["class"]


def test_classes_of_one_name_are_told_apart_in_the_card(tmp_path: Path) -> None:
    folder = exported(make_set(3, 8, zca=False, names=["crane", "ant", "crane"]), tmp_path)
    label = front_matter(folder)["dataset_info"]["features"][1]
    assert label["dtype"]["class_label"]["names"] == {"0": "0_crane", "1": "1_ant", "2": "2_crane"}
    assert [line["class"] for line in table(folder)][:3] == ["crane", "ant", "crane"]


def test_soft_labels_are_given_in_full(tmp_path: Path) -> None:
    soft = torch.softmax(random(12, 4, seed=2) * 5, dim=1)
    folder = exported(make_set(3, 8, zca=False, names=ANIMALS, labels=soft), tmp_path)
    for line in table(folder):
        assert line["probabilities"] == pytest.approx(soft[line["index"]].tolist())
        assert line["label"] == int(soft[line["index"]].argmax())
    assert "`probabilities`" in (folder / "README.md").read_text()


def test_the_card_and_what_lies_beside_it(tmp_path: Path) -> None:
    synthetic = make_set(3, 8, zca=False, names=["a|b", "c"])
    synthetic.metadata["scores"] = {"raw": {"mean": 0.662, "std": 0.003, "n": 5}}
    folder = exported(synthetic, tmp_path)
    text = (folder / "README.md").read_text(encoding="utf-8")
    for words in (
        "# Synthetic images distilled from toy",
        "8-bit PNGs are a preview",
        "the tensors in `set.safetensors` are the truth",
        "raw 66.2 ± 0.3 % (5 networks)",
        "| step size | 0.01 |",
        "| classes | 2: a\\|b, c |",
    ):
        assert words in text
    assert str(tmp_path) not in text
    assert (folder / "set.safetensors").read_bytes() == (tmp_path / "some.safetensors").read_bytes()
    with Image.open(folder / "grid.png") as grid:
        # Two columns under their names and three rows of 8 pixels enlarged to 96, two pixels apart.
        assert (grid.mode, grid.size) == ("RGB", (2 * 98 + 2, 20 + 3 * 98 + 2))
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "README.md",
        "grid.png",
        "metadata.jsonl",
        "set.safetensors",
    ]


def test_classes_without_images_have_no_folder_and_the_card_says_so(tmp_path: Path) -> None:
    synthetic = make_set(1, 8, zca=False, names=["a", "b", "c"])
    synthetic.labels = torch.tensor([0, 2] * 4 + [0])
    folder = exported(synthetic, tmp_path)
    assert ImageFolder(str(folder)).classes == ["a", "c"]
    assert {line["label"] for line in table(folder)} == {0, 2}
    assert "Some classes have no images" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["ant", "bee"], ["ant", "bee"]),
        (["bee", "ant"], ["0_bee", "1_ant"]),
        ([str(i) for i in range(11)], [f"{i:02d}_{i}" for i in range(11)]),
        (["Ant", "ant"], ["0_Ant", "1_ant"]),
        (["../up", "a/b", "..", ""], ["0_up", "1_a_b", "2_class", "3_class"]),
        (["streetcar", "train"], ["streetcar", "trainclass"]),
        (["dev-board", "retest", "trained"], ["devclass-board", "retest", "trained"]),
    ],
)
def test_folder_names_are_safe_and_sort_by_label(names: list[str], wanted: list[str]) -> None:
    assert folder_names(names) == wanted == sorted(wanted)


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path, capsys) -> None:
    folder = exported(SETS["digits"](), tmp_path)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "out: is there already" in refusal(capsys, tmp_path / "some.safetensors", folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("mine")
    assert "file: is there already" in refusal(capsys, tmp_path / "some.safetensors", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    SETS["digits"]().save(tmp_path / "some.safetensors")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        cli.main(["export", str(tmp_path / "some.safetensors"), str(tmp_path / name)])
        assert (tmp_path / name / "README.md").is_file()


def test_bad_sets_are_refused_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "some.safetensors", tmp_path / "out"
    assert "no such file" in refusal(capsys, path, out)
    make_set(1, 8, zca=False, names=DIGITS, ema_images=None).save(path)
    assert "no EMA images" in refusal(capsys, path, out, "--ema")
    make_set(2, 8, zca=False, names=DIGITS).save(path)
    assert "2 channels" in refusal(capsys, path, out)
    path.write_bytes(path.read_bytes()[:1000])
    assert "truncated" in refusal(capsys, path, out)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_export_that_is_cut_short_leaves_nothing(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.safetensors"
    SETS["digits"]().save(path)
    write, written = module.write_png, []

    def cut_short(picture, file) -> None:
        if len(written) == 5:
            raise stop
        written.append(file)
        write(picture, file)

    # A kill leaves the unfinished folder; the next export clears it away.
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "old.png").write_text("")
    monkeypatch.setattr(module, "write_png", cut_short)
    with pytest.raises(stop):
        module.main([str(path), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    cli.main(["export", str(path), str(tmp_path / "out")])
    assert len(ImageFolder(str(tmp_path / "out"))) == 30
