from pathlib import Path

import pytest
import torch
from fits import make_trainer, small_data, small_matching, small_teacher
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from ftd_lightning.callbacks import AtomicCheckpointIO


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(2)}, tmp_path / "deep" / "last.ckpt")
    assert torch.load(tmp_path / "deep" / "last.ckpt", weights_only=True)["a"].tolist() == [1, 1]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["last.ckpt"]


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"a": (i for i in range(3))}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Seen(Callback):
    """Notes batches and ends of epochs."""

    def __init__(self) -> None:
        self.events = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.events.append((trainer.current_epoch, batch_idx, trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.events.append((trainer.current_epoch, "end", trainer.global_step))


@pytest.mark.filterwarnings("ignore:trainer.max_epochs=. ends this fit before its 1 teachers")
@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("kind", ["distillation", "teachers"])
def test_a_fit_goes_on_from_the_end_of_an_epoch(tmp_path: Path, trajectories: Path, kind: str, validated: bool) -> None:
    """Saved at the end of the first, second .. epoch and resumed there, it does what it would have done."""

    def fit(folder: Path, epochs: int, **options) -> list:
        seen = Seen()
        saved = ModelCheckpoint(folder, save_last=True, save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True)
        module = small_matching(trajectories) if kind == "distillation" else small_teacher(teachers=1)
        limit = {"max_steps": 5 * epochs} if kind == "distillation" else {"max_epochs": epochs}
        trainer = make_trainer(
            folder,
            callbacks=[seen, saved],
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=1.0 if validated else 0,
            **limit,
        )
        trainer.fit(module, datamodule=small_data(), **options)
        return seen.events

    whole = fit(tmp_path / "whole", 4)
    parts = fit(tmp_path / "parts", 1)
    for epochs in (2, 4):
        parts += fit(tmp_path / "parts", epochs, ckpt_path="last")
    assert parts == whole
