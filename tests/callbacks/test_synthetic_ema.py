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
    first.average, first.updates = torch.rand(3), 5
    second.load_state_dict(first.state_dict())
    assert (second.average.tolist(), second.updates) == (first.average.tolist(), 5)


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
