"""The measure of Figure 1: against its parts written out, and against what is known without computing."""

import itertools
from pathlib import Path

import pytest
import torch
from fits import small_data
from torch.nn.functional import cross_entropy

from ftd_lightning import SyntheticSet, TrajectoryStore
from ftd_lightning.contracts import Images
from ftd_lightning.errors import DivergenceError
from ftd_lightning.files import write_teacher
from ftd_lightning.functional import chunked_permutations, flatten_parameters, load_flat, make_generator, unroll
from ftd_lightning.models import ConvNet
from ftd_lightning.studies.trajectory_error import (
    QUANTITIES,
    TrajectoryErrorCurve,
    mean_loss,
    measure_trajectory_error,
    summarize,
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
        metadata={"settings": {"syn_steps": 3, "expert_epochs": 1}, "network": NETWORK, **data.describe()},
    )


def measured(synthetic, trajectories, data, network, **options) -> list[TrajectoryErrorCurve]:
    store = trajectories if isinstance(trajectories, TrajectoryStore) else TrajectoryStore(trajectories)
    return measure_trajectory_error(synthetic, store, data.train, network, **options)


def test_against_the_parts_written_out(synthetic, trajectories: Path, data, network) -> None:
    """Both curves and the norms, teacher 1, from whole trajectories held in memory."""
    curve = measured(synthetic, trajectories, data, network, teachers=[1])[0]
    teacher = TrajectoryStore(trajectories).trajectory(1)

    def run(weights, steps):
        for _ in range(steps):
            load_flat(network, weights)
            loss = cross_entropy(network(synthetic.images), synthetic.labels)
            for parameter in network.parameters():
                parameter.grad = None
            loss.backward()
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


def test_a_teacher_made_by_the_students_own_steps_is_followed_exactly(tmp_path, synthetic, data, network) -> None:
    snapshots = [flatten_parameters(network)]
    for _ in range(3):
        batches = chunked_permutations(10, 3, make_generator(0))
        with torch.no_grad():
            lr = synthetic.step_size
            snapshots.append(unroll(network, snapshots[-1], synthetic.images, synthetic.labels, lr, batches=batches))
    write_teacher(tmp_path, 0, snapshots, {"network": NETWORK, **data.describe()})
    curve = measured(synthetic, tmp_path, data, network)[0]
    for name in ("evaluation", "distillation", "epsilon", "delta", "initialization"):
        assert getattr(curve, name) == [0.0] * 3, name
    assert all(value > 0 for value in curve.segment)


def test_batches_and_augmentation_come_from_the_set_and_the_seed(synthetic, trajectories: Path, data, network) -> None:
    plain = measured(synthetic, trajectories, data, network)
    synthetic.metadata["augmentation"] = {"strategy": "crop_scale_rotate", "mode": "single"}
    synthetic.metadata["settings"]["syn_batch"] = 4
    a, b, c = (measured(synthetic, trajectories, data, network, seed=seed) for seed in (0, 0, 1))
    assert a == b
    assert a[0].epsilon != c[0].epsilon
    assert a[0].epsilon != plain[0].epsilon
    assert a[0].evaluation[0] == a[0].distillation[0], "students of a segment see the same batches and augmentation"


def test_averaged_images_and_other_settings_are_taken_when_asked_for(synthetic, trajectories, data, network) -> None:
    raw, ema = (measured(synthetic, trajectories, data, network, ema=ema)[0] for ema in (False, True))
    assert raw.epsilon != ema.epsilon
    longer = measured(synthetic, trajectories, data, network, syn_steps=6, expert_epochs=2)[0]
    assert longer.epochs == [2, 4]
    torch.testing.assert_close(longer.epsilon[-1], raw.epsilon[-1], rtol=1e-3, atol=1e-5)
    assert measured(synthetic, trajectories, data, network, expert_epochs=3)[0].epochs == [3], (
        "what is left is left out"
    )


def test_several_teachers_are_averaged(synthetic, trajectories: Path, data, network) -> None:
    curves = measured(synthetic, trajectories, data, network, teachers=range(2))
    assert [curve.teacher for curve in curves] == [0, 1]
    assert curves[1] == measured(synthetic, trajectories, data, network, teachers=[1])[0], "each is one's own"
    both = summarize(curves)
    assert set(both["mean"]) == set(both["std"]) == set(QUANTITIES)
    for name in QUANTITIES:
        first, second = (torch.tensor(getattr(curve, name)) for curve in curves)
        torch.testing.assert_close(torch.tensor(both["mean"][name]), (first + second) / 2)
        torch.testing.assert_close(torch.tensor(both["std"][name]), (first - second).abs() / 2, rtol=1e-4, atol=1e-6)


def test_batchnorm_takes_the_statistics_of_the_batch_and_keeps_its_own(data) -> None:
    network = ConvNet(1, 10, 8, width=4, depth=1, norm="batch").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    weights, images = flatten_parameters(network), Images(*data.train)
    loss = mean_loss(network, weights, images, batch_size=len(images.labels))
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert loss == pytest.approx(float(cross_entropy(network(images.images), images.labels).detach()), rel=1e-5)


def test_the_loss_is_the_mean_whatever_the_batch_size(data, network) -> None:
    weights = flatten_parameters(network)
    losses = [mean_loss(network, weights, data.test, batch_size=size) for size in (7, 1024)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_student_that_diverges_is_told(synthetic, trajectories: Path, data, network) -> None:
    synthetic.step_size = torch.tensor(1e30)
    with pytest.raises(DivergenceError, match="teacher 0: the student's weights are not finite at epoch 1"):
        measured(synthetic, trajectories, data, network)


def test_what_does_not_fit_is_told_in_one_line(synthetic, trajectories: Path, data, network, refused) -> None:
    for options, words in (
        ({"expert_epochs": 5}, ["expert_epochs=5", "4 epochs"]),
        ({"syn_steps": 0}, ["syn_steps=0"]),
        ({"teachers": [2]}, ["teacher 2", "0 to 1"]),
    ):
        with refused(*words):
            measured(synthetic, trajectories, data, network, **options)
    step_size, synthetic.step_size = synthetic.step_size, None
    with refused("no learned step size"):
        measured(synthetic, trajectories, data, network)
    synthetic.step_size, synthetic.ema_images = step_size, None
    with refused("no EMA images"):
        measured(synthetic, trajectories, data, network, ema=True)
    synthetic.metadata["network"] = {**NETWORK, "options": {"width": 8}}
    with refused("its teachers have network", "'width': 8"):
        measured(synthetic, trajectories, data, network)
    del synthetic.metadata["network"], synthetic.metadata["settings"]
    with refused("does not record its syn_steps", "--syn-steps"):
        measured(synthetic, trajectories, data, network)
    assert measured(synthetic, trajectories, data, network, syn_steps=1, expert_epochs=4)[0].epochs == [4]
