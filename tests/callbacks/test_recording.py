"""The recorder and the set writer: what they refuse, and what they leave on disk."""

from pathlib import Path

import pytest
from fits import distil, make_trainer, small_data, small_matching, small_teacher
from lightning.pytorch import Callback

from ftd_lightning import SyntheticSet, TrajectoryMatching, TrajectoryStore
from ftd_lightning.callbacks import EvaluateSynthetic, FitProgress, SyntheticSetWriter, TrajectoryRecorder


def test_files_go_beside_the_logs_by_default(tmp_path: Path, trajectories: Path, caplog) -> None:
    caplog.set_level("INFO")
    make_trainer(tmp_path, callbacks=[TrajectoryRecorder()]).fit(small_teacher(teachers=1), datamodule=small_data())
    names = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
    assert names == ["data.safetensors", "teacher_0000.safetensors"]
    distil(tmp_path, trajectories, callbacks=[SyntheticSetWriter()])
    assert len(SyntheticSet.load(tmp_path / "set.safetensors").images) == 10
    (accuracy,) = TrajectoryStore(tmp_path / "trajectories").teacher_metadata(0)["accuracies"][-1:]
    text = f"1 teacher, {100 * accuracy:.1f} % mean accuracy after the last epoch"
    assert f"wrote {tmp_path / 'trajectories'}: {text}\n" in caplog.text
    assert f"wrote {tmp_path / 'set.safetensors'}: the set after 5 iterations" in caplog.text


def test_a_set_is_copied_only_to_be_written_or_measured(tmp_path: Path, trajectories: Path, monkeypatch) -> None:
    copied, original = [], TrajectoryMatching.synthetic_set
    monkeypatch.setattr(
        TrajectoryMatching, "synthetic_set", lambda self: copied.append(self.global_step) or original(self)
    )
    measuring = EvaluateSynthetic(3, networks=1, epochs=1, keep_best=False)
    distil(tmp_path, trajectories, steps=25, callbacks=[SyntheticSetWriter(every_n_epochs=2), measuring])
    assert copied == [10, 15, 20, 25, 25]


def test_each_leaves_the_other_phases_alone(tmp_path: Path, trajectories: Path) -> None:
    make_trainer(tmp_path, callbacks=[SyntheticSetWriter()]).fit(small_teacher(teachers=1), datamodule=small_data())
    assert not (tmp_path / "set.safetensors").exists()
    recorder = TrajectoryRecorder(str(tmp_path / "other"))
    make_trainer(tmp_path, callbacks=[recorder], max_steps=1).fit(small_matching(trajectories), datamodule=small_data())
    assert not (tmp_path / "other").exists()


def test_an_interrupted_teacher_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[TrajectoryRecorder()], max_epochs=2)
    told = pytest.warns(UserWarning, match="0 of 2 teachers")
    with pytest.warns(UserWarning, match="ends this fit before"), told:
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


def test_an_epoch_without_validation_has_no_accuracy(tmp_path: Path) -> None:
    """Those that the trainer still shows are another epoch's, or teacher's."""
    recorder = TrajectoryRecorder(str(tmp_path / "store"))
    make_trainer(tmp_path, callbacks=[recorder], check_val_every_n_epoch=2).fit(
        small_teacher(), datamodule=small_data()
    )
    for teacher in range(2):
        found = TrajectoryStore(tmp_path / "store").teacher_metadata(teacher)["accuracies"]
        assert [value is None for value in found] == [True, False, True, False]


def test_the_run_s_own_error_is_the_one_that_comes_out(tmp_path: Path, trajectories: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            pl_module.images.data.fill_(float("nan"))
            raise RuntimeError("the real reason")

    writer = SyntheticSetWriter(str(tmp_path / "set.safetensors"))
    with pytest.raises(RuntimeError, match="the real reason"), pytest.warns(UserWarning, match="not written"):
        distil(tmp_path, trajectories, callbacks=[Break(), writer])
    assert not writer.path.exists()


def test_a_set_of_other_settings_is_not_overwritten(tmp_path: Path, trajectories: Path, refused) -> None:
    distil(tmp_path, trajectories, steps=1, callbacks=[SyntheticSetWriter()])
    before = (tmp_path / "set.safetensors").read_bytes()
    with refused("set.safetensors", "syn_steps", "name another folder"):
        distil(tmp_path, trajectories, steps=1, callbacks=[SyntheticSetWriter()], syn_steps=2)
    assert (tmp_path / "set.safetensors").read_bytes() == before
    distil(tmp_path, trajectories, steps=1, callbacks=[SyntheticSetWriter()], compile=False)  # decides no number
