"""``ftd info``: what it says of each artefact, and of what is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import refusal
from safetensors.torch import save_file

from ftd_lightning import SyntheticSet, TrajectoryStore, cli
from ftd_lightning.files import Standardization, Whitening, write_teacher
from ftd_lightning.files.safetensors_io import write_tensors
from ftd_lightning.models import describe_network

METADATA = {
    "method": "ftd",
    "iterations": 12,
    "skipped_steps": 1,
    "dataset": {"name": "cifar10", "val_fraction": 0.1, "max_per_class": None, "seed": 0},
    "network": {"name": "convnet", "options": {"width": 8}, "in_channels": 3},
    "augmentation": {"strategy": "color,crop", "mode": "single"},
    "teachers": {"count": 3, "rho": 0.01, "alpha": 0.3, "adaptive": False},
    "settings": {"lr_images": 100.0},
    "scores": {"raw": {"mean": 0.5, "std": 0.01, "n": 5}},
    "versions": {"torch": "2"},
}


def colour_set(**changes) -> SyntheticSet:
    images = torch.linspace(-2, 3, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    fields = {
        "images": images,
        "labels": torch.tensor([0, 0, 1, 1]),
        "step_size": torch.tensor(0.0123),
        "ema_images": images,
        "class_names": ["ant", "bee"],
        "transform": Standardization([0.5] * 3, [0.25] * 3),
        "metadata": METADATA,
    }
    return SyntheticSet(**{**fields, **changes})


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    cli.main(["info", *map(str, arguments)])
    return capsys.readouterr().out


def rows(text: str) -> dict[str, str]:
    """The lines after the first, each a word and what is said of it, two spaces apart."""
    return {word: what.strip() for word, what in (line.strip().split("  ", 1) for line in text.splitlines()[1:])}


def test_a_set_in_about_ten_lines(tmp_path: Path, capsys) -> None:
    path = tmp_path / "set.safetensors"
    colour_set().save(path)
    text = said(capsys, path)
    assert text.splitlines()[0] == f"{path}: synthetic set"
    assert 10 <= len(text.splitlines()) <= 15
    assert (
        rows(text).items()
        >= {
            "method": "ftd, 12 iterations, 1 skipped",
            "data set": "cifar10 (seed 0, val_fraction 0.1)",
            "images": "4 of 3 x 32 x 32, 2 per class; with EMA images",
            "values": "-2 to 3, as networks see them",
            "classes": "2: ant, bee",
            "labels": "hard",
            "step size": "0.0123",
            "transform": "standardised, mean 0.5 0.5 0.5, std 0.25 0.25 0.25",
            "network": "convnet (width 8, in_channels 3)",
            "teachers": "adaptive no, alpha 0.3, count 3, rho 0.01",
            "scores": "raw 50.0 ± 1.0 % (5 networks)",
        }.items()
    )


def test_what_is_said_of_other_sets(tmp_path: Path, capsys, monkeypatch) -> None:
    path = tmp_path / "set.safetensors"
    whitening = Whitening.fit(torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    soft = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    SyntheticSet(torch.zeros(3, 1, 8, 8), soft, class_names=["0", "1"], transform=whitening).save(path)
    monkeypatch.setattr(torch.linalg, "inv", None)  # no whitening is built: of large images that takes minutes
    found = rows(said(capsys, path))
    assert found["method"] == "unknown"
    assert found["images"] == "3 of 1 x 8 x 8, 1 to 2 per class; no EMA images"
    assert found["labels"] == "soft, probabilities"
    assert found["step size"].startswith("none")
    assert found["transform"].startswith("ZCA whitening, eps 0.1")
    soft = torch.eye(2)[[0, 0, 1, 1]]
    by = {"labels_made": "teacher", "label_teacher": {"teacher": 2, "epoch": 5, "held_out_accuracy": []}}
    colour_set(labels=soft, metadata=by).save(path)
    assert rows(said(capsys, path))["labels"] == "soft (teacher), probabilities: teacher 2 after epoch 5"
    colour_set(labels=soft * 3, metadata={"label_kind": "target", "labels_made": "learned"}).save(path)
    assert rows(said(capsys, path))["labels"] == "soft (learned), targets"
    colour_set(metadata={"images_stored": 4, "images_trained_on": 16, "ema_initial_weight": 0.25}).save(path)
    counts = "2 per class, decoded from the storage of 4; with EMA images, which hold 25 % of the initial ones"
    assert counts in rows(said(capsys, path))["images"]
    decoder = {"class_path": "ftd_lightning.decoders.MultiFormation", "init_args": {"factor": 2}}
    stored = {"decoder": decoder, "images_stored": 1, "numbers_stored": 3072, "bytes_stored": 12288}
    decoded = colour_set(metadata=stored)
    decoded.codes = {"images": torch.zeros(1, 3, 32, 32)}
    decoded.save(path)
    found = rows(said(capsys, path))
    assert found["decoder"] == "MultiFormation (factor 2)"
    assert found["stored"] == "3,072 numbers, 12,288 bytes; an epoch of an evaluation has 1 step of at most 256 images"
    assert json.loads(said(capsys, path, "--json")).items() >= {**stored, "images_trained_on": 4}.items()


def test_a_set_as_json(tmp_path: Path, capsys) -> None:
    path = tmp_path / "set.safetensors"
    colour_set().save(path)
    found = json.loads(said(capsys, path, "--json"))
    assert (found["kind"], found["images"], found["per_class"]) == ("synthetic_set", [4, 3, 32, 32], [2, 2])
    assert (found["values"]["min"], found["values"]["max"]) == (-2, 3)
    assert (found["numbers_stored"], found["bytes_stored"], found["decoder"]) == (4 * 3072, 4 * 12288, None)
    assert found["metadata"].items() >= METADATA.items()


def test_a_store(trajectories: Path, capsys) -> None:
    text = said(capsys, trajectories)
    assert text.splitlines()[0] == f"{trajectories}: trajectory store"
    found = rows(text)
    store = TrajectoryStore(trajectories)
    assert found["teachers"] == f"2 of 4 epochs, {store.num_parameters:,} weights each"
    assert found["optimizer"] == "SGD, lr 0.1, momentum 0, weight_decay 0, batch_size 32"
    assert found["flatness"].startswith("rho 0, ")
    assert found["data set"].startswith("digits (")
    assert found["network"].startswith("convnet (depth 1, width 4")
    assert "% (" in found["accuracy"]
    facts = json.loads(said(capsys, trajectories, "--json"))
    assert (facts["kind"], facts["teachers"], facts["epochs"]) == ("trajectory_store", 2, 4)
    assert facts["metadata"] == store.metadata
    assert [one["teacher"] for one in facts["each"]] == [0, 1]


def test_a_store_of_a_network_from_elsewhere(tmp_path: Path, capsys) -> None:
    network = describe_network(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)))
    metadata = {"network": network, "dataset": {"unnamed": "ab"}, "transform": None, "precision": "bf16-mixed"}
    write_teacher(tmp_path, 0, [torch.zeros(25), torch.ones(25)], metadata)
    found = rows(said(capsys, tmp_path))
    assert found["network"] == "torch.nn.modules.container.Sequential (of 4 parameters, 0.weight to 1.bias)"
    assert (found["data set"], found["precision"]) == ("not described", "bf16-mixed")


def test_one_teacher_and_a_whitening(trajectories: Path, tmp_path: Path, capsys) -> None:
    text = said(capsys, trajectories / "teacher_0001.safetensors")
    assert text.splitlines()[0].endswith("teacher_0001.safetensors: teacher")
    assert rows(text)["teacher"].startswith("number 1, seed ")
    Whitening.fit(torch.rand(40, 1, 4, 4)).save(tmp_path / "zca.safetensors")
    text = said(capsys, tmp_path / "zca.safetensors")
    assert rows(text)["transform"] == "ZCA whitening, eps 0.1, 16 values per image"


def test_what_is_none_of_these_is_refused(tmp_path: Path, capsys) -> None:
    assert "no such file" in refusal(capsys, "info", tmp_path / "nowhere")
    assert "no teachers here" in refusal(capsys, "info", tmp_path)
    path = tmp_path / "file.safetensors"
    colour_set().save(path)
    save_file({"images": torch.zeros(2)}, path)
    assert "another program" in refusal(capsys, "info", path)
    write_tensors(path, {"a": torch.zeros(2)}, kind="tea_pot", metadata={})
    assert "is a tea pot" in refusal(capsys, "info", path)


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_it_quietly(tmp_path: Path) -> None:
    colour_set().save(tmp_path / "set.safetensors")
    readable, writable = os.pipe()
    os.close(readable)  # as ``head`` does; now every write fails
    command = [sys.executable, "-m", "ftd_lightning", "info", str(tmp_path / "set.safetensors")]
    done = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writable)
    assert (done.returncode, done.stderr) == (141, "")
