"""The measure of Figure 1 against its parts written out; ``ftd trajectory-error``: files, table, refusals."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from fits import record, refusal, small_data
from PIL import Image
from torch.nn.functional import cross_entropy

from ftd_lightning import DistillationDataModule, SyntheticSet, TrajectoryStore, cli
from ftd_lightning.contracts import Images
from ftd_lightning.errors import DivergenceError
from ftd_lightning.functional import flatten_parameters, load_flat
from ftd_lightning.models import ConvNet
from ftd_lightning.studies.trajectory_error import (
    QUANTITIES,
    TrajectoryErrorCurve,
    mean_loss,
    measure_trajectory_error,
    real_images,
)

NETWORK = {"name": "convnet", "options": {"width": 4, "depth": 1}, "in_channels": 1, "num_classes": 10, "image_size": 8}


@pytest.fixture(scope="module")
def data():
    module = small_data()
    module.prepare_data()
    module.setup()
    return module


@pytest.fixture
def network() -> ConvNet:
    return ConvNet(1, 10, 8, width=4, depth=1)


@pytest.fixture
def synthetic(data) -> SyntheticSet:
    """Real images as a synthetic set: 3 steps for an epoch, without augmentation."""
    labels = torch.arange(10)
    first = torch.stack([data.train.images[data.train.labels == label][0] for label in labels])
    return SyntheticSet(
        first,
        labels,
        torch.tensor(0.1),
        ema_images=first / 2,
        class_names=list("0123456789"),
        transform=data.transform,
        metadata={
            "method": "mtt",
            "settings": {"syn_steps": 3, "expert_epochs": 1},
            "network": NETWORK,
            **data.describe(),
        },
    )


def measured(synthetic, trajectories, data, network, **options) -> list[TrajectoryErrorCurve]:
    return measure_trajectory_error(synthetic, TrajectoryStore(trajectories), data.train, network, **options)


def test_against_the_parts_written_out(synthetic, trajectories: Path, data, network) -> None:
    """Both curves and the norms, teacher 1, from whole trajectories held in memory."""
    curve = measured(synthetic, trajectories, data, network, teachers=[1])[0]
    teacher = TrajectoryStore(trajectories).trajectory(1)

    def run(weights, steps):
        for _ in range(steps):
            load_flat(network, weights)
            network.zero_grad()
            cross_entropy(network(synthetic.images), synthetic.labels).backward()
            weights = weights - 0.1 * torch.cat([p.grad.flatten() for p in network.parameters()])
        return weights

    def real_loss(weights):
        load_flat(network, weights)
        with torch.no_grad():
            return float(cross_entropy(network(data.train.images), data.train.labels))

    assert (curve.teacher, curve.epochs) == (1, [1, 2, 3, 4])
    assert curve.initial_loss == pytest.approx(real_loss(teacher[0]), rel=1e-5)
    close = {"rel": 1e-3, "abs": 1e-5}
    before = torch.zeros_like(teacher[0])
    for t, (start, target) in enumerate(itertools.pairwise(teacher)):
        student, fresh = run(teacher[0], 3 * (t + 1)), run(start, 3)
        assert curve.teacher_loss[t] == pytest.approx(real_loss(target), **close)
        assert curve.evaluation[t] == pytest.approx(real_loss(student) - real_loss(target), **close)
        assert curve.distillation[t] == pytest.approx(real_loss(fresh) - real_loss(target), **close)
        epsilon, delta = student - target, fresh - target
        assert curve.epsilon[t] == pytest.approx(float(epsilon.norm()), **close)
        assert curve.delta[t] == pytest.approx(float(delta.norm()), **close)
        assert curve.initialization[t] == pytest.approx(float((epsilon - before - delta).norm()), **close)
        assert curve.segment[t] == pytest.approx(float((target - start).norm()), **close)
        before = epsilon
    assert curve.evaluation[0] == curve.distillation[0], "the same student"
    assert curve.initialization[0] == 0


def test_settings_change_the_measurement(synthetic, trajectories: Path, data, network) -> None:
    raw, ema = (measured(synthetic, trajectories, data, network, ema=ema)[0] for ema in (False, True))
    assert raw.epsilon != ema.epsilon
    longer = measured(synthetic, trajectories, data, network, syn_steps=6, expert_epochs=2)[0]
    assert longer.epochs == [2, 4]
    torch.testing.assert_close(longer.epsilon[-1], raw.epsilon[-1], rtol=1e-3, atol=1e-5)
    assert measured(synthetic, trajectories, data, network, expert_epochs=3)[0].epochs == [3], "whole segments only"
    synthetic.metadata["augmentation"] = {"strategy": "crop_scale_rotate", "mode": "single"}
    synthetic.metadata["settings"]["syn_batch"] = 4
    a, b, c = (measured(synthetic, trajectories, data, network, seed=seed) for seed in (0, 0, 1))
    assert a == b
    assert a[0].epsilon != c[0].epsilon
    assert a[0].epsilon != raw.epsilon
    assert a[0].evaluation[0] == a[0].distillation[0], "students of a segment see the same batches and augmentation"


def test_the_loss_does_not_depend_on_the_batch_size_and_batchnorm_keeps_its_statistics(data, network) -> None:
    weights = flatten_parameters(network)
    losses = [mean_loss(network, weights, data.test, batch_size=size) for size in (7, 1024)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    network = ConvNet(1, 10, 8, width=4, depth=1, norm="batch").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    weights, images = flatten_parameters(network), Images(*data.train)
    loss = mean_loss(network, weights, images, batch_size=len(images.labels))
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert loss == pytest.approx(float(cross_entropy(network(images.images), images.labels).detach()), rel=1e-5)


def test_sets_and_stores_that_do_not_fit_are_refused(synthetic, trajectories: Path, data, network, refused) -> None:
    def refuses(*words, **options):
        with refused(*words):
            measured(synthetic, trajectories, data, network, **options)

    refuses("expert_epochs=5", "4 epochs", expert_epochs=5)
    refuses("teacher 2", "0 to 1", teachers=[2])
    step_size, synthetic.step_size = synthetic.step_size, torch.tensor(1e30)
    with pytest.raises(DivergenceError, match="teacher 0: the student's weights are not finite at epoch 1"):
        measured(synthetic, trajectories, data, network)
    synthetic.step_size = None
    refuses("no learned step size")
    synthetic.step_size, synthetic.ema_images = step_size, None
    refuses("no EMA images", ema=True)
    described, synthetic.metadata["dataset"] = synthetic.metadata["dataset"], {"name": "digits", "val_fraction": 0.5}
    refuses("its teachers have dataset")
    synthetic.metadata |= {"dataset": described, "network": {**NETWORK, "options": {"width": 8}}}
    refuses("its teachers have network", "'width': 8")
    del synthetic.metadata["network"], synthetic.metadata["settings"]
    refuses("does not record its inner loop", "--syn-steps")
    assert measured(synthetic, trajectories, data, network, syn_steps=1, expert_epochs=4)[0].epochs == [4]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic, trajectories) -> Path:
    """A folder with a set and a store."""
    monkeypatch.chdir(tmp_path)
    synthetic.save("set.safetensors")
    Path("store").symlink_to(trajectories)
    return tmp_path


def run(*arguments: object) -> None:
    cli.main(["trajectory-error", *map(str, arguments)])


def test_the_command_writes_a_curve_a_plot_and_a_table(here: Path, trajectories: Path, capsys) -> None:
    run("set.safetensors", "store", "--teachers", 2, "--out", "out")
    curve = json.loads(Path("out/curve.json").read_text())
    assert (curve["kind"], curve["method"], curve["on"], curve["ema"]) == ("trajectory_error", "mtt", "test", False)
    assert (curve["syn_steps"], curve["expert_epochs"], curve["epochs"]) == (3, 1, [1, 2, 3, 4])
    assert [each["teacher"] for each in curve["each"]] == [0, 1]
    assert curve["each"][0]["epsilon"] != curve["each"][1]["epsilon"]
    for name in QUANTITIES:
        first, second = (torch.tensor(each[name], dtype=torch.float64) for each in curve["each"])
        assert curve["mean"][name] == pytest.approx(((first + second) / 2).tolist())
        assert curve["std"][name] == pytest.approx(((first - second).abs() / 2).tolist(), abs=1e-9)
    assert str(trajectories) not in Path("out/curve.json").read_text()

    with Image.open("out/curve.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10, "not a blank sheet"

    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |"))
    assert f"{curve['mean']['evaluation'][-1]:.4f}" in last
    assert f"{curve['mean']['epsilon'][-1]:.4f}" in last


def test_images_in_a_folder_are_found_as_the_teachers_saw_them(tmp_path: Path, image_folder) -> None:
    for name in ("parts/train", "parts/val", "parts/test", "flat"):
        image_folder(tmp_path / name, ["ant", "bee"], count=10, size=(8, 8), seed=len(name))
    for name, options in (("parts", {}), ("flat", {"test_fraction": 0.4})):
        root, file = str(tmp_path / name), tmp_path / "set.safetensors"
        data = DistillationDataModule("folder", root, synthetic="random", ipc=1, **options)
        data.training_set().save(file)
        store = record(tmp_path / f"{name} store", data=DistillationDataModule("folder", root, **options), teachers=1)
        found = real_images(TrajectoryStore(store), file, None, root)
        assert torch.equal(found.part("test").images, data.part("test").images)


def test_options_and_a_second_run_in_the_folder_of_the_set(here: Path) -> None:
    run("set.safetensors", "store")
    plain = json.loads(Path("trajectory_error/curve.json").read_text())["mean"]
    run("set.safetensors", "store", "--dataset", "digits", "--on", "train", "--out", "train")
    train = json.loads(Path("train/curve.json").read_text())["mean"]
    assert train["epsilon"] == plain["epsilon"], "weights do not know what they are measured on"
    assert train["teacher_loss"] != plain["teacher_loss"]
    words = ["--ema", "--syn-steps", 6, "--expert-epochs", 2, "--against", "trajectory_error/curve.json"]
    run("set.safetensors", "store", *words)
    curve = json.loads(Path("trajectory_error/curve.json").read_text())
    assert (curve["epochs"], curve["ema"], curve["syn_steps"]) == ([2, 4], True, 6)


def test_bad_input_is_one_line_before_anything_is_written(here: Path, capsys) -> None:
    both = ["set.safetensors", "store"]
    cases = [
        (["nowhere.safetensors", "store"], "nowhere.safetensors: no such file"),
        (["set.safetensors", "nowhere"], "nowhere: no teachers here"),
        (["store/teacher_0000.safetensors", "store"], "a synthetic set is needed here"),
        ([*both, "--teachers", 3], "teacher 2 is asked for"),
        ([*both, "--dataset", "digit"], "did you mean 'digits'"),
        ([*both, "--against", "nowhere/curve.json"], "nowhere/curve.json: is no curve.json"),
    ]
    for arguments, words in cases:
        assert words in refusal(capsys, "trajectory-error", *arguments)
    assert {path.name for path in here.iterdir()} == {"set.safetensors", "store"}
