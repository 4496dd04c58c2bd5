"""The demo, with every step made short."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftd_lightning import demo, lightning_cli
from ftd_lightning.errors import InputError

pytestmark = pytest.mark.slow  # fits as commands run them

SHORT = {
    "teacher_mtt": ["--model.teachers=2", "--model.epochs=3"],
    "teacher_ftd": ["--model.teachers=2", "--model.epochs=3"],
    "distill_mtt_ipc1": ["--trainer.max_steps=4", "--model.iterations_per_epoch=2", "--model.max_start_epoch=2"],
    "distill_ftd_ipc1": ["--trainer.max_steps=4", "--model.iterations_per_epoch=2", "--model.max_start_epoch=2"],
    "evaluate": ["--trainer.max_epochs=12"],  # until networks have learned something of their set
}


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run in an empty folder; give the configs in the order of their runs."""
    (tmp_path / "configs").symlink_to(Path(__file__).resolve().parents[1] / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo"])
    run, order = lightning_cli.run, []

    def run_short(args):
        config = Path(args[2]).stem
        order.append(config)
        return run([*args, *SHORT[config], "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"])

    monkeypatch.setattr(lightning_cli, "run", run_short)
    return order


def test_it_ends_with_results_and_a_picture(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    demo.main()
    assert short == [step.config for step in demo.STEPS]
    results = json.loads(Path("runs/digits/results.json").read_text())
    assert list(results["accuracy"]) == ["random", "mtt", "ftd", "real"]
    for name, value in results["accuracy"].items():
        assert set(value) == {"mean", "std", "n"}, name
        assert 0 <= value["mean"] <= 1
        assert value["n"] == 5
    sheet = np.asarray(Image.open("runs/digits/images.png"))
    height = 2 + 20 + 98  # the names of the classes, and a row of pictures
    assert sheet.shape == (3 * height, 96 + 2 + 10 * 98, 3)
    rows = [sheet[height * row : height * (row + 1), 96:] for row in range(3)]
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])
    shown = capsys.readouterr().out
    assert "random real images" in shown
    assert "--logdir runs" in shown


def test_random_images_are_those_that_distillation_starts_from(short: list[str]) -> None:
    from fits import distil, record

    from ftd_lightning import DistillationDataModule

    data = DistillationDataModule(synthetic="random", ipc=1)
    data.setup()
    module = distil(Path(), record(Path()), steps=1)
    other = DistillationDataModule(max_per_class=14, synthetic="random", ipc=1)
    other.setup()
    assert torch.equal(other.synthetic_set.images, module.initial_images)
    assert data.synthetic_set.images.shape == module.initial_images.shape


def test_elsewhere_it_says_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run the demo in the project's folder"):
        demo.main()
