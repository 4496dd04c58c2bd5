import json
from pathlib import Path

import pytest
import torch
from fits import distil, make_trainer, small_data, small_matching
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ftd_lightning import SyntheticSet
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA
from ftd_lightning.core import FreshNetworks
from ftd_lightning.errors import InputError


def test_raw_and_averaged_images_are_measured_on_networks_of_their_own(tmp_path, trajectories, monkeypatch) -> None:
    """The public code of this line measures the averaged images on the network that has just seen the raw ones."""
    built, trained_on = {}, []
    build = FreshNetworks.build

    def spy(self, *seed):
        network = build(self, *seed)
        built[seed] = network
        return network

    from ftd_lightning.callbacks import evaluation

    train = evaluation.train_fresh_networks

    def spy_train(networks, images, *args, **kwargs):
        trained_on.append(([id(network) for network in networks], images.clone()))
        return train(networks, images, *args, **kwargs)

    monkeypatch.setattr(FreshNetworks, "build", spy)
    monkeypatch.setattr(evaluation, "train_fresh_networks", spy_train)
    callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(every_n_epochs=1, networks=2, epochs=2)]
    module = distil(tmp_path, trajectories, steps=10, callbacks=callbacks)
    seeds = [seed for seed in built if "evaluation" in seed]
    assert len(seeds) == 2 * 2 * 2, "two measurements, raw and averaged, two networks each"
    used = [network for networks, _ in trained_on for network in networks]
    assert len(set(used)) == len(used) == 8
    assert torch.equal(trained_on[-2][1], module.images)
    assert torch.equal(trained_on[-1][1], module.ema_images)


def test_the_best_is_chosen_on_held_out_images(tmp_path: Path, trajectories: Path) -> None:
    callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(every_n_epochs=2, networks=1, epochs=3)]
    module = distil(tmp_path, trajectories, steps=15, callbacks=callbacks)
    metrics = module.trainer.callback_metrics
    for name in ("raw", "ema"):
        for part in ("val", "test"):
            assert 0 <= float(metrics[f"evaluation/{name}_{part}_accuracy_mean"]) <= 1
            assert float(metrics[f"evaluation/{name}_{part}_accuracy_std"]) == 0, "one network has no spread"
    best = SyntheticSet.load(tmp_path / "best.safetensors")
    chosen = best.metadata["chosen_on"]
    assert max(chosen["held_out_accuracy"].values()) == pytest.approx(callbacks[1].best_accuracy)
    assert chosen["iteration"] in (10, 15), "after two epochs of five iterations, and after the last"


def test_scores_travel_with_the_set_that_they_were_measured_on(tmp_path: Path, trajectories: Path) -> None:
    callback = EvaluateSynthetic(every_n_epochs=1, networks=1, epochs=1)
    module = distil(tmp_path, trajectories, steps=5, callbacks=[callback])
    metrics, scores = module.trainer.callback_metrics, module.synthetic_set().metadata["scores"]
    assert set(scores) == {"raw images, held-out training images", "raw images, test images"}
    mean = scores["raw images, test images"]["mean"]
    assert mean == pytest.approx(float(metrics["evaluation/raw_test_accuracy_mean"]))
    later = distil(tmp_path, trajectories, steps=6, callbacks=[EvaluateSynthetic(100, networks=1, epochs=1)])
    assert "scores" in later.synthetic_set().metadata, "the last iteration is always measured"
    later.scores = {}
    assert "scores" not in later.synthetic_set().metadata


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


def test_without_held_out_images_nothing_is_chosen(tmp_path: Path) -> None:
    from fits import small_teacher

    from ftd_lightning.callbacks import TrajectoryRecorder

    data = {"val_fraction": 0.0}
    recorder = TrajectoryRecorder(str(tmp_path / "trajectories"))
    make_trainer(tmp_path, callbacks=[recorder]).fit(small_teacher(teachers=1), datamodule=small_data(**data))
    callback = EvaluateSynthetic(every_n_epochs=1, networks=1, epochs=1)
    distil(tmp_path, tmp_path / "trajectories", callbacks=[callback], data=small_data(**data))
    assert callback.best_accuracy == -1
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("bar", [True, False])
def test_its_progress_bar_is_shown_where_the_trainer_shows_one(tmp_path, trajectories, capsys, bar: bool) -> None:
    measure = EvaluateSynthetic(every_n_epochs=1, networks=1, epochs=1)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[measure], enable_progress_bar=bar)
    trainer.fit(small_matching(trajectories, iterations_per_epoch=2), datamodule=small_data())
    assert ("evaluation of raw images" in capsys.readouterr().err) == bar


def test_global_randomness_is_left_alone(tmp_path: Path, trajectories: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    distil(tmp_path, trajectories, callbacks=[EvaluateSynthetic(every_n_epochs=1, networks=1, epochs=1)])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("options", [{"every_n_epochs": -1}, {"networks": 0}, {"epochs": 0}])
def test_counts_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"at least [01]"):
        EvaluateSynthetic(**options)
