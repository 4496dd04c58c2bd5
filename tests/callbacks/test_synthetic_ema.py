from pathlib import Path

import pytest
import torch
from fits import distil
from lightning.pytorch import Callback

from ftd_lightning.callbacks import SyntheticEMA
from ftd_lightning.errors import InputError


class Images(Callback):
    """Keeps the images of every iteration."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(pl_module.images.detach().clone())


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_starts_at_the_initial_images(tmp_path: Path, trajectories: Path, warmup: bool) -> None:
    average, images = SyntheticEMA(0.6, warmup=warmup), Images()
    module = distil(tmp_path, trajectories, steps=7, callbacks=[average, images])
    expected = module.initial_images.clone()
    for update, present in enumerate(images.seen, 1):
        decay = min(0.6, update / (update + 9)) if warmup else 0.6
        expected = decay * expected + (1 - decay) * present
    torch.testing.assert_close(average.average, expected)
    assert torch.equal(module.synthetic_set().ema_images, average.average)


def test_bias_correction_takes_the_initial_images_out(tmp_path: Path, trajectories: Path) -> None:
    plain, corrected, images = SyntheticEMA(0.9999), SyntheticEMA(0.9999, bias_correction=True), Images()
    module = distil(tmp_path, trajectories, steps=7, callbacks=[corrected, images])
    weights = [0.9999 ** (7 - update) for update in range(1, 8)]
    weighted = [weight * present.double() for weight, present in zip(weights, images.seen, strict=True)]
    expected = (sum(weighted) / sum(weights)).float()
    torch.testing.assert_close(corrected.average, expected, rtol=0, atol=1e-5)
    assert module.synthetic_set().metadata["ema_initial_weight"] == pytest.approx(0, abs=1e-6)
    # It is the plain average without its initial images.
    module = distil(tmp_path / "plain", trajectories, steps=7, callbacks=[plain])
    held = 0.9999**7
    assert module.synthetic_set().metadata["ema_initial_weight"] == pytest.approx(held, rel=1e-5)
    without = (plain.average.double() - held * module.initial_images.double()) / (1 - held)
    torch.testing.assert_close(without.float(), expected, rtol=0, atol=2e-2)  # 1 - held leaves three digits


def test_what_an_average_still_holds_is_told(tmp_path: Path, trajectories: Path, caplog, capsys) -> None:
    from ftd_lightning import DistillationDataModule
    from ftd_lightning.cli import main

    file = tmp_path / "set.safetensors"
    distil(tmp_path, trajectories, steps=3, callbacks=[SyntheticEMA(0.9)]).synthetic_set().save(file)
    with caplog.at_level("INFO"):
        DistillationDataModule(synthetic=str(file), ema=True).setup()
    assert "its averaged images still hold 73 % of the initial ones" in caplog.text
    main(["info", str(file)])
    assert "with EMA images, which hold 73 % of the initial ones" in capsys.readouterr().out


def test_two_beginnings_are_refused() -> None:
    with pytest.raises(InputError, match="give one of them"):
        SyntheticEMA(0.9, warmup=True, bias_correction=True)


def test_the_average_is_not_the_images(tmp_path: Path, trajectories: Path) -> None:
    average = SyntheticEMA(0.6)
    module = distil(tmp_path, trajectories, steps=2, callbacks=[average])
    assert average.average.data_ptr() != module.images.data_ptr()
    assert not torch.equal(average.average, module.images)


def test_decay_0_is_the_images_themselves(tmp_path: Path, trajectories: Path) -> None:
    average = SyntheticEMA(0.0)
    module = distil(tmp_path, trajectories, steps=2, callbacks=[average])
    torch.testing.assert_close(average.average, module.images.detach())


def test_state_goes_through_a_checkpoint() -> None:
    first, second = SyntheticEMA(0.6), SyntheticEMA(0.6)
    first.average, first.updates, first.initial_weight = torch.rand(3), torch.tensor(5), torch.tensor(0.5)
    second.load_state_dict(first.state_dict())
    assert (second.average.tolist(), second.updates, second.initial_weight) == (first.average.tolist(), 5, 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match="must lie in"):
        SyntheticEMA(decay)


def test_another_fit_begins_anew_and_the_same_module_goes_on(tmp_path: Path, trajectories: Path) -> None:
    average = SyntheticEMA(0.6)
    distil(tmp_path, trajectories, steps=3, callbacks=[average])
    other = distil(tmp_path / "other", trajectories, steps=3, callbacks=[average], seed=1)
    alone = distil(tmp_path / "alone", trajectories, steps=3, callbacks=[SyntheticEMA(0.6)], seed=1)
    assert torch.equal(other.ema_images, alone.ema_images)
