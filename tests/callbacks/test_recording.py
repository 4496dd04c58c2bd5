"""The recorder and the set writer: what they refuse, and what they leave on disk."""

from pathlib import Path

import pytest
from fits import distil, make_trainer, small_data, small_matching, small_teacher

from ftd_lightning import SyntheticSet
from ftd_lightning.callbacks import FitProgress, SyntheticSetWriter, TrajectoryRecorder
from ftd_lightning.errors import InputError


def test_files_go_beside_the_logs_by_default(tmp_path: Path, trajectories: Path) -> None:
    make_trainer(tmp_path, callbacks=[TrajectoryRecorder()]).fit(small_teacher(teachers=1), datamodule=small_data())
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == ["teacher_0000.safetensors"]
    distil(tmp_path, trajectories, callbacks=[SyntheticSetWriter()])
    assert len(SyntheticSet.load(tmp_path / "set.safetensors").images) == 10


def test_each_refuses_the_other_phase(tmp_path: Path, trajectories: Path) -> None:
    with pytest.raises(InputError, match="SyntheticSetWriter writes what a distillation makes"):
        make_trainer(tmp_path, callbacks=[SyntheticSetWriter()]).fit(small_teacher(), datamodule=small_data())
    trainer = make_trainer(tmp_path, callbacks=[TrajectoryRecorder()], max_steps=1)
    with pytest.raises(InputError, match="TrajectoryRecorder records a FlatTeacher"):
        trainer.fit(small_matching(trajectories), datamodule=small_data())


def test_an_interrupted_teacher_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[TrajectoryRecorder()], max_epochs=2)
    with pytest.warns(UserWarning, match="ends this fit before"):
        trainer.fit(small_teacher(), datamodule=small_data())
    assert not list((tmp_path / "trajectories").glob("teacher_*"))
    assert len(list((tmp_path / "trajectories" / ".unfinished").iterdir())) == 3


def test_one_bar_counts_the_whole_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = FitProgress(refresh_seconds=0.0)
    trainer = make_trainer(tmp_path, enable_progress_bar=True, callbacks=[bar])
    trainer.fit(small_teacher(), datamodule=small_data())
    shown = capsys.readouterr().err
    batches = 2 * 4 * trainer.num_training_batches
    assert f"{batches}/{batches}" in shown
    assert "teacher 2/2" in shown
