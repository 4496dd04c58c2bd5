"""The demo, with every step made short."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftd_lightning import SyntheticSet, demo

pytestmark = pytest.mark.slow  # fits as commands run them

SHORT = [
    *("--teacher.model.teachers=2", "--teacher.model.epochs=3"),
    *("--distill.trainer.max_steps=4", "--distill.model.iterations_per_epoch=2", "--distill.model.max_start_epoch=2"),
    *("--evaluate.trainer.max_epochs=12", "--evaluate.model.networks=2"),  # until something of the set is learned
    *("--evaluate.model.measure_every=12", "--trainer.accelerator=cpu"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, without a clone's configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_ends_with_results_and_a_picture(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.main(SHORT)
    results = json.loads(Path("runs/digits/results.json").read_text())
    assert list(results["accuracy"]) == ["random", "mtt", "ftd", "real"]
    for name, value in results["accuracy"].items():
        assert set(value) == {"mean", "std", "n"}, name
        assert 0 <= value["mean"] <= 1
        assert value["n"] == 2
    rows = [np.asarray(Image.open(f"runs/digits/{name}.png")) for name in ("random", "mtt", "ftd")]
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])
    sheet = np.asarray(Image.open("runs/digits/images.png"))
    assert sheet.shape[0] == sum(len(row) for row in rows)
    assert SyntheticSet.load("runs/digits/ftd.safetensors").ema_images is not None
    out, err = capfd.readouterr()
    # It speaks of the demo alone: no warnings, tips or tables of the fits.
    assert err == ""
    lines = out.splitlines()
    assert [line.split("]")[0] for line in lines if line.startswith("[")] == [f"[{n}/8" for n in range(1, 9)]
    assert any(line.startswith("10 random real images ") for line in lines)
    assert lines[-1].startswith("curves    ")
    assert "Seed set" not in out
    demo.main(SHORT)
    steps = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    assert len(steps) == 8
    assert all("done before" in line for line in steps)


def test_random_images_are_those_that_distillation_starts_from(here: Path) -> None:
    from fits import distil, record

    from ftd_lightning import DistillationDataModule

    data = DistillationDataModule(synthetic="random", ipc=1)
    data.setup()
    module = distil(Path(), record(Path()), steps=1)
    other = DistillationDataModule(max_per_class=14, synthetic="random", ipc=1)
    other.setup()
    assert torch.equal(other.synthetic_set.images, module.initial_images)
    assert data.synthetic_set.images.shape == module.initial_images.shape
