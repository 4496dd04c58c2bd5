"""The benchmark compares like with like: both sides of each part compute the same."""

import copy
import json

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
    module = run.fit_teacher(data, [], epochs=2, **TINY)
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
    for method in ("ours", "reference"):
        loss = run.matching_step(method, case, steps)
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


def test_the_report(tmp_path, monkeypatch, capsys):
    step = run.matching_step  # a compiler would take minutes
    monkeypatch.setattr(run, "matching_step", lambda method, *rest: step(method.replace("compiled", "ours"), *rest))
    monkeypatch.setattr(run, "SIZES", {"matching": {"quick": [(1, 4, 2)]}})
    run.main(["--quick", "--repeats", "2", "--output", str(tmp_path), "--parts", "matching"])
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["quantity"] for row in rows] == [
        "seconds, ours",
        "seconds, compiled",
        "seconds, compiled bf16",
        "added MiB",
    ]
    assert (tmp_path / "benchmark.md").read_text().strip() in capsys.readouterr().out
