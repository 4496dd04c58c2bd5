from pathlib import Path

import pytest
import torch
from fits import distil
from lightning.pytorch import Callback

from ftd_lightning import DistillationDataModule
from ftd_lightning.callbacks import SyntheticEMA
from ftd_lightning.cli import main


class Images(Callback):
    """Keeps the images of every iteration."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(pl_module.images.detach().clone())


def test_the_average_starts_at_the_initial_images(tmp_path: Path, trajectories: Path) -> None:
    average, images = SyntheticEMA(0.6), Images()
    module = distil(tmp_path, trajectories, steps=7, callbacks=[average, images])
    expected = module.initial_images.clone()
    for present in images.seen:
        expected = 0.6 * expected + 0.4 * present
    torch.testing.assert_close(average.average, {"images": expected})
    assert torch.equal(module.synthetic_set().ema_images, average.average["images"])


def test_bias_correction_takes_the_initial_images_out(tmp_path: Path, trajectories: Path) -> None:
    corrected, images = SyntheticEMA(0.9999, bias_correction=True), Images()
    module = distil(tmp_path, trajectories, steps=7, callbacks=[corrected, images])
    weights = [0.9999 ** (7 - update) for update in range(1, 8)]
    weighted = [weight * present.double() for weight, present in zip(weights, images.seen, strict=True)]
    torch.testing.assert_close(corrected.average["images"], (sum(weighted) / sum(weights)).float(), rtol=0, atol=1e-5)
    assert module.synthetic_set().metadata["ema_initial_weight"] == pytest.approx(0, abs=1e-6)


def test_the_share_of_the_initial_images_is_told(tmp_path: Path, trajectories: Path, caplog, capsys) -> None:
    file = tmp_path / "set.safetensors"
    made = distil(tmp_path, trajectories, steps=3, callbacks=[SyntheticEMA(0.9)]).synthetic_set()
    assert made.metadata["ema"] == {"decay": 0.9, "bias_correction": False}
    assert made.metadata["ema_initial_weight"] == pytest.approx(0.9**3)
    made.save(file)
    with caplog.at_level("INFO"):
        DistillationDataModule(synthetic=str(file), ema=True).setup()
    assert "its averaged images still hold 73 % of the initial ones" in caplog.text
    main(["info", str(file)])
    assert "with EMA images, which hold 73 % of the initial ones" in capsys.readouterr().out


def test_another_fit_begins_anew(tmp_path: Path, trajectories: Path) -> None:
    average = SyntheticEMA(0.6)
    distil(tmp_path, trajectories, steps=3, callbacks=[average])
    other = distil(tmp_path / "other", trajectories, steps=3, callbacks=[average], seed=1)
    alone = distil(tmp_path / "alone", trajectories, steps=3, callbacks=[SyntheticEMA(0.6)], seed=1)
    assert torch.equal(other.ema_images, alone.ema_images)
