import json
from pathlib import Path

import pytest
import torch
from fits import SMALL, distil, make_trainer, small_data, small_matching, small_teacher
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from ftd_lightning import DistillationDataModule, SyntheticSet
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA, TrajectoryRecorder, evaluation
from ftd_lightning.errors import InputError
from ftd_lightning.modules import DistributionMatching


def test_raw_and_averaged_images_are_measured_on_networks_of_their_own(tmp_path, trajectories, monkeypatch) -> None:
    """The public code of this line measures the averaged images on the network that has just seen the raw ones."""
    trained, train = [], evaluation.train_fresh_networks

    def spy(networks, images, *args, **kwargs):
        trained.append((networks, images.clone()))
        return train(networks, images, *args, **kwargs)

    monkeypatch.setattr(evaluation, "train_fresh_networks", spy)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(every_n_epochs=1, networks=2, epochs=2)]
    module = distil(tmp_path, trajectories, steps=10, callbacks=callbacks)
    assert torch.equal(torch.rand(3), expected), "global randomness is left alone"
    assert len({id(network) for networks, _ in trained for network in networks}) == 8, "two times raw and averaged"
    assert torch.equal(trained[-2][1], module.images)
    assert torch.equal(trained[-1][1], module.ema_images)


def test_the_best_is_chosen_on_held_out_images(tmp_path: Path, trajectories: Path) -> None:
    callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(every_n_epochs=2, networks=1, epochs=3)]
    module = distil(tmp_path, trajectories, steps=15, callbacks=callbacks)
    metrics = module.trainer.callback_metrics
    for name in ("raw", "ema"):
        for part in ("val", "test"):
            assert 0 <= float(metrics[f"evaluation/{name}_{part}_accuracy_mean"]) <= 1
            assert float(metrics[f"evaluation/{name}_{part}_accuracy_std"]) == 0, "one network has no spread"
    chosen = SyntheticSet.load(tmp_path / "best.safetensors").metadata["chosen_on"]
    assert max(chosen["held_out_accuracy"].values()) == pytest.approx(callbacks[1].best_accuracy)
    assert chosen["iteration"] == 10, "after two epochs; the measurement after the last one was not due"


def test_all_measurements_are_listed_on_file_and_survive_a_resumption(tmp_path: Path, trajectories: Path) -> None:
    def fit(name: str, **options) -> tuple[list, Trainer]:
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=7)
        callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(every_n_epochs=1, networks=2, epochs=2), keep]
        trainer = make_trainer(tmp_path / name, max_steps=10, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(small_matching(trajectories), datamodule=small_data(), **options)
        entries = json.loads((tmp_path / name / "evaluations.json").read_text())
        assert entries == callbacks[1].history
        return entries, trainer

    entries, trainer = fit("whole")
    keys = [(entry["iteration"], entry["images"], entry["part"]) for entry in entries]
    assert keys == [(i, name, part) for i in (5, 10) for name in ("raw", "ema") for part in ("held_out", "test")]
    assert all(set(entry) - {"iteration", "images", "part"} == {"mean", "std", "n"} for entry in entries)
    assert entries[-1]["mean"] == pytest.approx(float(trainer.callback_metrics["evaluation/ema_test_accuracy_mean"]))
    assert entries[-1]["n"] == 2
    assert fit("resumed", ckpt_path=tmp_path / "step=7.ckpt")[0] == entries


def test_without_held_out_images_nothing_is_chosen(tmp_path: Path, capsys) -> None:
    recorder, data = TrajectoryRecorder(str(tmp_path / "store")), {"val_fraction": 0.0}
    make_trainer(tmp_path, callbacks=[recorder]).fit(small_teacher(teachers=1), datamodule=small_data(**data))
    callback, bar = EvaluateSynthetic(every_n_epochs=1, networks=1, epochs=1), {"enable_progress_bar": True}
    distil(tmp_path, tmp_path / "store", callbacks=[callback], data=small_data(**data), trainer=bar)
    assert callback.best_accuracy == -1
    assert not (tmp_path / "best.safetensors").exists()
    assert "evaluation of raw images" in capsys.readouterr().err
    with pytest.raises(InputError, match="at least 1"):
        EvaluateSynthetic(networks=0)


def test_data_without_test_images_are_refused_before_anything_is_learned(tmp_path: Path) -> None:
    own = LightningDataModule.from_datasets(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 2))
    module = DistributionMatching(network_options=SMALL)
    with pytest.raises(InputError, match="no test images"):
        make_trainer(tmp_path, max_steps=2, callbacks=[EvaluateSynthetic(1)]).fit(
            module, datamodule=DistillationDataModule.from_datamodule(own)
        )
    assert module.iterations == 0
