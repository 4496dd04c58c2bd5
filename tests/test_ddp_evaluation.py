"""Two processes with gloo on the CPU: evaluation gives the networks and the files of one process, bit for bit."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching
from torch.utils.data import DataLoader

from ftd_lightning import SyntheticEvaluation
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA
from ftd_lightning.errors import InputError
from ftd_lightning.models import ConvNet

pytestmark = pytest.mark.slow  # processes

RUN = """
import sys
sys.path.insert(0, {tests!r})
import test_ddp_evaluation
for what, folder, *arguments in {calls!r}:
    getattr(test_ddp_evaluation, what)(folder, *arguments, strategy="ddp", devices=2)
"""
NORMS = ("instance", "batch")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two processes do in this file, in one go: most of its time is their start."""
    root = tmp_path_factory.mktemp("two")
    trajectories = str(record(root / "teachers"))
    calls = [("evaluate", str(root / f"{how}_{norm}"), norm, how) for norm in NORMS for how in ("whole", "resumed")]
    calls += [("distil", str(root / "distil"), trajectories), ("foreign", str(root / "foreign"))]
    for _, folder, *_ in calls:
        Path(folder).mkdir()
    script = root / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent), calls=calls))
    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def evaluate(folder: str, norm: str = "instance", how: str = "whole", **options) -> None:
    """Six epochs of three networks; "resumed", in two fits, the second one from the checkpoint of the first."""
    path, data = Path(folder), small_data(synthetic="random", ipc=2, batch_size=8)

    def fit(limit: int, checkpoint: Path | None) -> SyntheticEvaluation:
        network = {"network_options": {**SMALL, "norm": norm}, "networks": 3}
        module = SyntheticEvaluation(**network, augment="crop_scale", lr=0.05, measure_every=2)
        settings = {"max_epochs": 6, **options}
        trainer = make_trainer(path, limit_train_batches=3, max_steps=limit, **settings)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module

    if how == "resumed":
        fit(9, None).trainer.save_checkpoint(path / "half.ckpt")
    module = fit(-1, path / "half.ckpt" if how == "resumed" else None)
    assert module.trainer.current_epoch == 6
    module.trainer.test(module, datamodule=data, verbose=False)
    networks = {index: network.state_dict() for index, network in zip(module.own, module.networks, strict=True)}
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    rest = {"networks": networks, "history": module.history, "results": module.results["each"], "metrics": metrics}
    torch.save(rest, path / f"rank{module.global_rank}.pt")


def distil(folder: str, trajectories: str, **options) -> None:
    """Four iterations, measured after two and after four on three networks."""
    path = Path(folder)
    module = small_matching(trajectories, iterations_per_epoch=2, augment="crop_scale")
    # Frozen images: those of two processes follow two segments a step.
    module.configure_optimizers = lambda: torch.optim.SGD([module.images, module.step_size], lr=0.0)
    callback = EvaluateSynthetic(every_n_epochs=1, networks=3, epochs=3)
    trainer = make_trainer(path, callbacks=[SyntheticEMA(0.9), callback], max_steps=4, **options)
    trainer.fit(module, datamodule=small_data())
    torch.save({"history": callback.history, "scores": module.scores}, path / f"rank{trainer.global_rank}.pt")


def saved(folder: Path, rank: int = 0) -> dict:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def foreign(folder: str, **options) -> None:
    """A fit on a DataLoader, of which Lightning gives each rank a part."""
    data = small_data(synthetic="random", ipc=2)
    data.setup()
    images = torch.utils.data.TensorDataset(data.synthetic_set.images, data.synthetic_set.labels)
    module = SyntheticEvaluation(partial(ConvNet, 1, 10, 8, **SMALL), networks=2, lr=0.1)
    trainer = make_trainer(Path(folder), max_epochs=1, limit_val_batches=0, **options)
    try:
        trainer.fit(module, DataLoader(images, batch_size=10))
    except InputError as error:
        (Path(folder) / f"refused{trainer.global_rank}").write_text(str(error))


@pytest.mark.parametrize("norm", NORMS)
def test_two_ranks_evaluate_as_one_process_does(tmp_path: Path, two: Path, norm: str) -> None:
    evaluate(str(tmp_path), norm)
    one = saved(tmp_path)
    assert [len(entry["test"]) for entry in one["history"]] == [3, 3, 3]
    for folder in (two / f"whole_{norm}", two / f"resumed_{norm}"):
        ranks = [saved(folder, rank) for rank in range(2)]
        assert [list(rank["networks"]) for rank in ranks] == [[0, 2], [1, 3]], "the fourth fills up the round"
        for rank in ranks:
            for index, weights in rank["networks"].items():
                expected = one["networks"].get(index, weights)
                assert all(torch.equal(value, expected[name]) for name, value in weights.items()), (folder.name, index)
            assert (rank["history"], rank["results"]) == (one["history"], one["results"])
            assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
        assert (folder / "evaluation.json").read_bytes() == (tmp_path / "evaluation.json").read_bytes()


def test_a_checkpoint_of_two_processes_is_refused_by_one(tmp_path: Path, two: Path) -> None:
    network = {"network_options": {**SMALL, "norm": "instance"}, "networks": 3}
    module = SyntheticEvaluation(**network, augment="crop_scale", lr=0.05, measure_every=2)
    data = small_data(synthetic="random", ipc=2, batch_size=8)
    with pytest.raises(InputError, match=r"saved by 2 process\(es\), this run has 1"):
        make_trainer(tmp_path).fit(module, datamodule=data, ckpt_path=two / "resumed_instance" / "half.ckpt")


def test_one_process_resumed_in_the_middle_ends_the_same(tmp_path: Path) -> None:
    results = []
    for how in ("whole", "resumed"):
        (tmp_path / how).mkdir()
        evaluate(str(tmp_path / how), "instance", how)
        results.append(saved(tmp_path / how))
    whole, resumed = results
    assert whole["history"] == resumed["history"]
    for index, weights in whole["networks"].items():
        assert all(torch.equal(value, resumed["networks"][index][name]) for name, value in weights.items())


def test_networks_on_the_way_are_spread_over_ranks_too(tmp_path: Path, two: Path) -> None:
    distil(str(tmp_path), str(two / "teachers" / "trajectories"))
    one, first, second = saved(tmp_path), saved(two / "distil"), saved(two / "distil", 1)
    assert len(one["history"]) == 8, "two measurements of raw and averaged images on two parts"
    assert any(entry["std"] for entry in one["history"]), "the networks differ"
    assert one == first == second
    for folder in (tmp_path, two / "distil"):
        assert json.loads((folder / "evaluations.json").read_text()) == one["history"]


def test_loaders_that_split_the_set_are_refused(two: Path) -> None:
    for rank in range(2):
        assert "use a DistillationDataModule" in (two / "foreign" / f"refused{rank}").read_text()
