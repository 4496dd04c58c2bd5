"""The benchmark compares like with like: both sides of each part compute the same."""

import copy

import pytest
import torch
from benchmarks import run

from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.networks import NetworkFactory
from ftd_lightning.data.loaders import BatchOrder, TensorLoader
from ftd_lightning.functional import flatten_parameters, seeded
from ftd_lightning.models import ConvNet

pytestmark = pytest.mark.exhaustive  # a tool of the project
TINY = {"width": 4, "depth": 2}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(run, "DEVICE", "cpu")


def batches(images, labels, epoch, batch_size=256):
    order = BatchOrder(len(labels), batch_size, shuffle=True)
    order.set_epoch(epoch)
    return list(TensorLoader(images, labels, order))


def test_teachers():
    data = run.noise(300, image_size=8)
    settings = [f"--model.network_options={TINY}", "--model.compile=false", "--model.precision=float32"]
    module = run.fit_teacher(data, [], "--model.epochs=2", *settings)
    plain = NetworkFactory("convnet", TINY, data.description().shape).build(0, "teacher", 0)
    start = flatten_parameters(plain)
    epoch = run.plain_teacher(plain, lambda epoch: batches(*data.part("train"), epoch))
    for number in range(2):
        loss, accuracy = epoch(number)
    ours, theirs = (flatten_parameters(network) - start for network in (module.network, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert float(module.trainer.callback_metrics["teacher/train_loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(module.trainer.callback_metrics["teacher/train_accuracy"]) == pytest.approx(accuracy)


@pytest.mark.parametrize("steps", [1, 7])
def test_matching(steps):
    case = run.problem(2, image_size=8, **TINY)
    found = []
    for ours in {"compile": False}, {}:
        loss = run.matching_step(case, steps, **ours)
        found.append((loss, case.images.grad, case.step_size.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    assert found[0][1].abs().max() > 1e-4, "gradients that vanish would always agree"


def test_evaluation():
    with seeded(0):
        fresh = [ConvNet(3, 10, 8, **TINY) for _ in range(2)]
        images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
    ours, theirs = copy.deepcopy(fresh), copy.deepcopy(fresh)
    train_fresh_networks(ours, images, labels, EvaluationProtocol(epochs=4, lr=run.LR, batch_size=8))
    run.one_after_the_other(theirs, lambda epoch: batches(images, labels, epoch, 8), epochs=4)
    for network, other, before in zip(ours, theirs, fresh, strict=True):
        moved = [flatten_parameters(n) - flatten_parameters(before) for n in (network, other)]
        torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precisions", [("float32",), ("float32", "bf16")])
def test_the_table(monkeypatch, capsys, precisions):
    monkeypatch.setattr(run, "PRECISIONS", precisions)
    run.main(["--quick", "--repeats", "2"])
    _, *lines = capsys.readouterr().out.strip().split("\n")
    assert ("This device has no instructions for bf16, whose column is left out." in lines) == (len(precisions) == 1)
    titles, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert titles[2:-1] == list(precisions)
    assert [row[0].split(",")[0] for row in rows] == [
        "flat teacher",
        "matching step",
        "MiB of an eager matching step",
        "evaluation of 5 networks",
        "host",
        "host",
    ]
    for _, plain, float32, *rest in rows:
        middle, low, _, high = float32.replace("(", "").replace(")", "").split()
        assert float(plain) > 0 < float(low) <= float(middle) <= float(high)
        assert len(rest) == len(precisions)


def test_speeds_are_ratios_of_neighbours():
    row = run.Row("case", {"float32": [(1.0, 2.0), (4.0, 2.0), (6.0, 2.0)]}, 7.0)
    assert row.line().startswith("| case | 4 | 2.00 (0.50 to 3.00) | ")
