from pathlib import Path

import pytest
import torch

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
