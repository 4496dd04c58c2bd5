import os
from pathlib import Path

import pytest
import torch

from ftd_lightning.callbacks import AtomicCheckpointIO


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"a": (i for i in range(3))}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Payload:
    def __reduce__(self):
        return os.system, ("touch exploded",)


GOOD = {"pytorch-lightning_version": "2.6.4", "state_dict": {}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**GOOD, "loops": Payload()}, "cannot be read as a checkpoint"),
        (None, "cannot be read as a checkpoint"),
        ({"state_dict": {}}, "is not a checkpoint of Lightning"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(content, words, tmp_path: Path, refused, monkeypatch) -> None:
    """However a fit came by its path: "last" too."""
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "last.ckpt")
    if content is None:
        (tmp_path / "last.ckpt").write_bytes(b"")
    with refused("last.ckpt", words):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert not Path("exploded").exists()
