"""The demo, with every step made short."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import distil, record
from PIL import Image

from ftd_lightning import DistillationDataModule, SyntheticSet, demo
from ftd_lightning.studies.comparison import Comparison

SHORT = [
    *("--teacher.model.teachers=2", "--teacher.model.epochs=3"),
    *("--distill.trainer.max_steps=4", "--distill.model.iterations_per_epoch=2", "--distill.model.max_start_epoch=2"),
    *("--evaluate.trainer.max_epochs=12", "--evaluate.model.networks=2"),  # until something of the set is learned
    *("--evaluate.model.measure_every=12", "--trainer.accelerator=cpu"),
]


@pytest.mark.slow
def test_it_ends_with_results_and_a_picture(here: Path, in_process, capfd, monkeypatch) -> None:
    read = Comparison.from_file
    monkeypatch.setattr(Comparison, "from_file", lambda *given: replace(read(*given), jobs=1))  # in this process
    demo.main(SHORT, in_process)
    results = json.loads(Path("runs/digits/results.json").read_text())
    assert list(results["accuracy"]) == ["random", "mtt", "ftd", "real"]
    for name, value in results["accuracy"].items():
        assert set(value) == {"mean", "std", "n"}, name
        assert (0 <= value["mean"] <= 1, value["n"]) == (True, 2)
    rows = [np.asarray(Image.open(f"runs/digits/{name}.png")) for name in ("random", "mtt", "ftd")]
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])
    assert np.asarray(Image.open("runs/digits/images.png")).shape[0] == 2 + sum(28 + len(row) for row in rows)
    assert SyntheticSet.load("runs/digits/ftd.safetensors").ema_images is not None
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines if line.startswith("[")] == [f"[{n}/8" for n in range(1, 9)]
    assert any(line.startswith("10 random real images ") for line in lines)
    assert lines[-1].startswith("curves    ")
    done = len(in_process.commands)
    demo.main(SHORT, in_process)
    assert len(in_process.commands) == done == 8, "finished fits are not repeated"


def test_random_images_are_those_that_distillation_starts_from(here: Path) -> None:
    module = distil(Path(), record(Path()), steps=1)
    data = DistillationDataModule(max_per_class=14, synthetic="random", ipc=1)
    data.setup()
    assert torch.equal(data.synthetic_set.images, module.initial_images)
