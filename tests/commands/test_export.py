"""``ftd export``: pictures that torchvision and Hugging Face read, tensors that ddranking reads, and the way back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fits import refusal
from PIL import Image
from torchvision.datasets import ImageFolder

from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.commands import export as module
from ftd_lightning.commands.export import folder_names
from ftd_lightning.files import Standardization, Whitening

DIGITS = [str(digit) for digit in range(10)]
ANIMALS = ["zebra", "ant", "Käfer", "train"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_set(channels: int, size: int, *, zca: bool, names: list[str], **changes) -> SyntheticSet:
    """Three images of each class, the classes in turns."""
    count = 3 * len(names)
    pictures = random(count, channels, size, size).mul(255).round().div(255)
    transform = Standardization([0.5] * channels, [0.25] * channels)
    transform = Whitening.fit(random(60, channels, size, size, seed=1)) if zca else transform
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


def exported(synthetic: SyntheticSet, folder: Path, *arguments: str) -> Path:
    synthetic.save(folder / "some.safetensors")
    cli.main(["export", str(folder / "some.safetensors"), str(folder / "out"), *arguments])
    return folder / "out"


def table(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])


@pytest.mark.parametrize(
    ("synthetic", "ema"),
    [(make_set(1, 8, zca=False, names=DIGITS), True), (make_set(3, 16, zca=True, names=ANIMALS), False)],
    ids=["grey", "whitened colours"],
)
def test_image_folder_reads_the_pictures_with_their_labels(synthetic, ema: bool, tmp_path: Path, capsys) -> None:
    folder = exported(synthetic, tmp_path, *(["--ema"] if ema else []))
    assert capsys.readouterr().out.startswith(f"{folder}: {len(synthetic.images)} pictures")
    data = ImageFolder(str(folder))
    by_file = {line["file_name"]: line for line in table(folder)}
    wanted = random(*synthetic.images.shape).mul(255).round()  # 8 bits come back to the last one, whitening undone
    wanted = wanted.flip(0) if ema else wanted
    for (file, label), (image, _) in zip(data.samples, data, strict=True):
        line = by_file.pop(str(Path(file).relative_to(folder)))
        # ImageFolder numbers folders in sorted order, which is that of the classes.
        assert label == line["label"] == int(synthetic.labels[line["index"]])
        assert line["class"] == synthetic.class_names[label]
        assert np.array_equal(np.asarray(image), wanted[line["index"]].expand(3, -1, -1).permute(1, 2, 0).numpy())
        with Image.open(file) as stored:
            assert stored.mode == ("L" if synthetic.images.shape[1] == 1 else "RGB")
    assert not by_file


@pytest.mark.parametrize("soft", [False, True])
def test_the_layout_is_what_hugging_face_documents_for_imagefolder(soft: bool, tmp_path: Path) -> None:
    """metadata.jsonl at the root, a row with a relative file_name for each image; the card's header names the files."""
    names = ["yes", "12", "a: 'b' # \"c\"", "train\n"]
    labels = torch.softmax(random(12, 4, seed=2) * 5, dim=1) if soft else torch.arange(12) % 4
    folder = exported(make_set(3, 8, zca=False, names=names, labels=labels), tmp_path)
    lines, (config,) = table(folder), front_matter(folder)["configs"]
    images = {str(path.relative_to(folder)) for path in folder.glob("*/*.png")}
    assert {line["file_name"] for line in lines} == images
    (split,) = config["data_files"]
    assert split["split"] == "train"
    found = {str(path.relative_to(folder)) for pattern in split["path"] for path in folder.glob(pattern)}
    assert found == images | {"metadata.jsonl"}, "the grid is no image of the set"
    image, label, *others = config["features"]
    assert image == {"name": "image", "dtype": "image"}
    assert label == {"name": "label", "dtype": {"class_label": {"names": {str(i): names[i] for i in range(4)}}}}
    # What is not declared here would be refused: the other columns of every row, in any order.
    kinds = {"string": str, "int64": int, "float64": list}
    columns = {feature["name"]: kinds[feature.get("dtype") or feature["sequence"]] for feature in others}
    for line in lines:
        assert {key: type(value) for key, value in line.items() if key not in ("file_name", "label")} == columns
        assert names[line["label"]] == line["class"]
        if soft:
            assert line["probabilities"] == pytest.approx(labels[line["index"]].tolist())
            assert line["label"] == int(labels[line["index"]].argmax())


def test_the_card_and_what_lies_beside_it(tmp_path: Path) -> None:
    synthetic = make_set(3, 8, zca=False, names=["a|b", "c", "a|b", "d"])
    synthetic.labels = torch.arange(12) % 3  # none of the last class
    synthetic.metadata["scores"] = {"raw": {"mean": 0.662, "std": 0.003, "n": 5}}
    folder = exported(synthetic, tmp_path)
    text = (folder / "README.md").read_text(encoding="utf-8")
    for words in (
        "# 12 synthetic images of toy",
        "8-bit PNGs are a preview",
        "| scores | raw 66.2 ± 0.3 % (5 networks) |",
        "| step size | 0.01 |",
        "| classes | 4: a\\|b, c, a\\|b, d |",
    ):
        assert words in text
    assert str(tmp_path) not in text
    names = front_matter(folder)["configs"][0]["features"][1]["dtype"]["class_label"]["names"]
    assert names == {"0": "0_a_b", "1": "1_c", "2": "2_a_b", "3": "3_d"}, "classes of one name are told apart"
    assert (folder / "set.safetensors").read_bytes() == (tmp_path / "some.safetensors").read_bytes()
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert files == ["README.md", "grid.png", "metadata.jsonl", "set.safetensors"]


def test_folder_names_are_safe_and_sort_by_label() -> None:
    for names, wanted in (
        (["bee", "ant"], ["0_bee", "1_ant"]),
        ([str(i) for i in range(11)], [f"{i:02d}_{i}" for i in range(11)]),
        (["Ant", "ant"], ["0_Ant", "1_ant"]),
        (["../up", "a/b", "..", ""], ["0_up", "1_a_b", "2_class", "3_class"]),
    ):
        assert folder_names(names) == wanted == sorted(wanted)


def test_a_folder_that_is_taken_is_left_alone_and_an_empty_one_is_filled(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    folder = exported(make_set(1, 8, zca=False, names=DIGITS), tmp_path)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "out: is there already" in refusal(capsys, "export", tmp_path / "some.safetensors", folder)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert ".: is there already" in refusal(capsys, "export", tmp_path / "some.safetensors", ".")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_export_that_is_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.safetensors"
    make_set(1, 8, zca=False, names=DIGITS).save(path)
    monkeypatch.setattr(module, "card", None)
    with pytest.raises(TypeError):
        module.export(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


# Tensors

CLASSES, IPC = 10, 2
SETTINGS = {"method": "datm", "settings": {"ipc": IPC}, "labels_made": "learned", "dataset": {"name": "digits"}}
IN_TURNS = torch.arange(CLASSES).repeat(IPC)  # not class by class


def soft_labels(classes: torch.Tensor) -> torch.Tensor:
    """Probabilities whose largest is that of the class; a third of them are 0."""
    values = random(len(classes), CLASSES, seed=1) * (random(len(classes), CLASSES, seed=2) > 0.33)
    values[torch.arange(len(classes)), classes] = 1.5
    return values / values.sum(1, keepdim=True)


def digits_set(labels: torch.Tensor, **changes) -> SyntheticSet:
    data = DistillationDataModule("digits", val_fraction=0, zca=changes.pop("zca", False))
    data.prepare_data()
    data.setup()
    fields = {
        "images": random(len(labels), 1, 8, 8) * 4 - 2,
        "labels": labels,
        "step_size": torch.tensor(0.0123),
        "class_names": data.class_names,
        "transform": data.transform,
        "metadata": SETTINGS,
    }
    return SyntheticSet(**{**fields, **changes})


def tensors(synthetic: SyntheticSet, folder: Path, *arguments: str) -> list[torch.Tensor]:
    out = exported(synthetic, folder, "--format", "tensors", *arguments)
    return [torch.load(out / name, weights_only=True) for name in ("images.pt", "labels.pt", "lr.pt")]


@pytest.mark.parametrize("kind", ["hard", "soft", "whitened"])
def test_tensors_are_as_their_reader_takes_them_and_come_back(kind: str, tmp_path: Path, capsys) -> None:
    synthetic = digits_set(soft_labels(IN_TURNS) if kind == "soft" else IN_TURNS, zca=kind == "whitened")
    images, labels, rate = tensors(synthetic, tmp_path)
    assert capsys.readouterr().out.endswith("out: 20 images, images.pt, labels.pt, lr.pt, README.txt\n")
    order = torch.tensor([place for label in range(CLASSES) for place in (label, label + CLASSES)])
    assert torch.equal(images, synthetic.images[order])
    # The reader makes the classes of images itself, out of the number of images per class.
    rebuilt = torch.arange(CLASSES).repeat_interleave(IPC)
    assert torch.equal(labels.argmax(1) if kind == "soft" else labels, rebuilt)
    assert (rate.ndim, rate.dtype, float(rate)) == (0, torch.float32, float(synthetic.step_size))
    if kind == "soft":
        assert float(labels.min()) == pytest.approx(-87.3365, abs=1e-3), "of probabilities of 0"
        assert float((labels.softmax(1) - synthetic.labels[order]).abs().max()) <= 1e-7
    text = (tmp_path / "out/README.txt").read_text(encoding="utf-8")
    assert ("soft_label_mode S" in text) == (kind == "soft")
    assert f"{'soft' if kind == 'soft' else 'hard'}_labels labels.pt" in text
    assert f"use_zca {'true' if kind == 'whitened' else 'false'}" in text
    (command,) = re.findall(r"^ftd import (.*)$", text, re.MULTILINE)
    words = [
        str(tmp_path / "out" / word) if word.endswith((".pt", ".safetensors")) else word for word in command.split()
    ]
    cli.main(["import", *words])
    back = SyntheticSet.load(tmp_path / "out/set.safetensors")
    assert torch.equal(back.images, synthetic.images[order])
    assert torch.allclose(back.labels.double(), synthetic.labels[order].double(), rtol=0, atol=1e-6)
    assert torch.equal(back.step_size, synthetic.step_size)
    assert back.transform.describe() == synthetic.transform.describe()
    assert back.class_names == synthetic.class_names


def test_averaged_images_several_step_sizes_and_learned_labels(tmp_path: Path) -> None:
    """A distillation keeps ipc images of each class together, whatever becomes of the labels."""
    labels = soft_labels(IN_TURNS.sort().values)
    labels[0] = labels[0].roll(3)  # the first image of class 0 now is most probably of class 3
    synthetic = digits_set(labels, step_size=torch.tensor([0.01, 0.03]), ema_images=random(20, 1, 8, 8, seed=3))
    images, logits, rate = tensors(synthetic, tmp_path, "--ema")
    assert torch.equal(images, synthetic.ema_images)
    assert int(logits[0].argmax()) == 3
    assert float(rate) == pytest.approx(0.02)


def test_what_cannot_be_written_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "some.safetensors", tmp_path / "out"
    targets = {"labels": torch.randn(20, 10), "metadata": {"label_kind": "target"}}
    for changes, said in (({"step_size": None}, "has no step size"), (targets, "targets of a regression")):
        digits_set(**{"labels": IN_TURNS, **changes}).save(path)
        assert said in refusal(capsys, "export", path, out, "--format", "tensors")
    assert "no EMA images" in refusal(capsys, "export", path, out, "--ema")
    make_set(4, 8, zca=False, names=DIGITS).save(path)
    assert "one or three of the 4" in refusal(capsys, "export", path, out, "--channels", "1,2")
    assert not out.exists()


def test_pictures_of_many_channels_show_three_and_the_tensors_hold_all(tmp_path: Path) -> None:
    synthetic = make_set(13, 8, zca=False, names=DIGITS)
    folder = exported(synthetic, tmp_path, "--channels", "3,2,1")
    line = table(folder)[0]
    shown = np.asarray(Image.open(folder / line["file_name"]))
    wanted = synthetic.pictures()[line["index"], [3, 2, 1]].mul(255).round()
    assert np.array_equal(shown, wanted.permute(1, 2, 0).numpy())
    assert "| channels | 3, 2, 1 of 13, from 0, in the PNGs" in (folder / "README.md").read_text(encoding="utf-8")
    cli.main(["export", str(tmp_path / "some.safetensors"), str(tmp_path / "tensors"), "--format", "tensors"])
    images = torch.load(tmp_path / "tensors/images.pt", weights_only=True)
    assert torch.equal(images, synthetic.images[synthetic.labels.argsort(stable=True)])


def test_unequal_classes_become_tensors_that_say_who_cannot_read_them(tmp_path: Path, capsys) -> None:
    labels = torch.tensor([1] * 11 + [0, *range(2, 10)])
    images, classes, _ = tensors(digits_set(labels), tmp_path)
    assert torch.equal(classes, labels.sort().values)
    assert len(images) == 20
    told = "cannot read them: it counts on equally many images of each class"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "out/README.txt").read_text(encoding="utf-8")
