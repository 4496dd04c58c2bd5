"""The benchmark's parts, at tiny sizes: that ours and the plain loops do the same, and that figures come out."""

import copy
import json
import os
from functools import partial

import pytest
import torch
from benchmarks import (
    evaluation,
    matching,
    measure,
    pictures,
    processes,
    report,
    run,
    scaling,
    startup,
    store,
    teacher,
)
from benchmarks.reference import sample_loader
from lightning.pytorch import Callback

from ftd_lightning.core import losses as side_by_side
from ftd_lightning.core import losses as teacher_pass
from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.networks import FreshNetworks
from ftd_lightning.data.loaders import BatchOrder, TensorLoader
from ftd_lightning.functional import flatten_parameters, inner_step, seeded
from ftd_lightning.models import ConvNet

TINY = {"width": 4, "depth": 2}


@pytest.fixture(autouse=True)
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def batches(images, labels, epoch, batch_size=256):
    order = BatchOrder(len(labels), batch_size, shuffle=True)
    order.set_epoch(epoch)
    return list(TensorLoader(images, labels, order))


def test_teachers_of_both_sides_are_the_same():
    module, data = teacher.fit(teacher.noise(300, image_size=8), Callback(), epochs=2, **TINY)
    plain = FreshNetworks("convnet", TINY, data.description().shape).build(0, "teacher", 0)
    start = flatten_parameters(plain)
    epoch = teacher.plain_teacher(plain, lambda epoch: batches(*data.train, epoch))
    for number in range(2):
        loss, accuracy = epoch(number)
    ours, theirs = (flatten_parameters(network) - start for network in (module.network.cpu(), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert float(module.trainer.callback_metrics["teacher/train_loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(module.trainer.callback_metrics["teacher/train_accuracy"]) == pytest.approx(accuracy)


@pytest.mark.parametrize("steps", [1, 7])
def test_matching_losses_and_gradients_of_both_sides_are_the_same(steps):
    case = matching.problem(2, image_size=8, **TINY)
    found = []
    for method in ("ours", "reference"):
        matching.step(method, case, steps)
        found.append((matching.loss_of(method, case, steps).detach(), case.images.grad, case.step_size.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    assert found[0][1].abs().max() > 1e-4, "gradients that vanish would always agree"


def test_networks_trained_by_both_sides_are_the_same():
    with seeded(0):
        fresh = [ConvNet(3, 10, 8, **TINY) for _ in range(2)]
        images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
    ours, theirs = copy.deepcopy(fresh), copy.deepcopy(fresh)
    train_fresh_networks(ours, images, labels, EvaluationProtocol(epochs=4, lr=evaluation.LR, batch_size=8))
    evaluation.one_after_the_other(theirs, lambda epoch: batches(images, labels, epoch, 8), epochs=4)
    for network, other, before in zip(ours, theirs, fresh, strict=True):
        moved = [flatten_parameters(n) - flatten_parameters(before) for n in (network, other)]
        torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-6)


def test_the_plain_loader_gives_every_sample_once():
    images = torch.arange(10.0).view(10, 1, 1, 1)
    read = list(sample_loader(images, torch.arange(10), batch_size=4))
    assert [len(labels) for _, labels in read] == [4, 4, 2]
    together = [torch.cat(parts) for parts in zip(*read, strict=True)]
    assert together[1].sort().values.tolist() == list(range(10))
    assert together[0].flatten().equal(together[1].float())


def test_ratios_are_those_of_pairs():
    row = measure.Row("part", "case", "time", "s", [1.0, 2.0, 6.0], [2.0, 2.0, 3.0])
    found = row.summary()
    assert (found["ratio"], found["low"], found["high"], found["pairs"]) == (1.0, 0.5, 2.0, 3)
    assert (found["ours"], found["reference"]) == (2.0, 2.0)
    assert report.verdict(found) == "no difference seen"
    more = measure.Row("part", "case", "images/s", "1/s", [4.0], [2.0], more_is_better=True).summary()
    assert report.verdict(more) == "ours, 2.00x"
    beyond = measure.Row("part", "case", "memory", "MiB", [4.0], [])
    assert "out of memory | - | - | - |" in report.markdown([beyond], [], measure.about())


def test_turns_are_turned():
    called = []
    works = {name: lambda name=name: called.append(name) or float(len(called)) for name in "ab"}
    assert measure.in_turns(works, 2) == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
    assert called == ["a", "b", "b", "a"]


def test_memory_is_that_of_a_process_of_its_own():
    ballast = torch.zeros(2**28)  # 1 GiB here must not be seen there
    found = processes.in_process("matching:memory", method="ours", ipc=1, steps=2, width=4)
    assert len(ballast)
    assert 0 < found["added"] < found["peak"]
    if measure.DEVICE == "cpu":
        assert found["peak"] < 1000


def test_store_and_buffers_read_the_same(tmp_path):
    store.write(tmp_path, 2, width=4)
    ours, theirs = store.read_store(str(tmp_path)), store.read_buffers(str(tmp_path))
    assert ours["check"] == theirs["check"] != 0


def test_imports_are_read_from_the_interpreter():
    result = startup.compare(1, ours=("-c", "import json, email.message"), reference=("-c", "pass"))
    parts = result.details["imports"]
    assert parts["json"]["cumulative"] >= parts["json"]["own"] > 0
    assert list(parts) == sorted(parts, key=lambda name: -parts[name]["own"])


@pytest.fixture
def tiny(monkeypatch):
    """Every part small, in this process, whose start would take seconds, and compiled by a backend that takes few."""
    monkeypatch.setattr(processes, "subprocess", None)
    here = {
        "matching:memory": matching.memory,
        "matching:times": matching.times,
        "scaling:matching_point": partial(scaling.matching_point, image_size=8),
        "scaling:ranks_point": partial(scaling.ranks_point, image_size=8),
        "store:read_store": store.read_store,
        "store:read_buffers": store.read_buffers,
    }
    for module in (matching, scaling):
        monkeypatch.setattr(module, "in_process", lambda function, **options: here[function](**options))
        monkeypatch.setattr(module, "stay_within_free_memory", lambda: None)
    for module in (teacher_pass, side_by_side, inner_step):
        monkeypatch.setattr(module, "compiled", partial(module.compiled, backend="aot_eager"))
    monkeypatch.setitem(matching.GRIDS, "quick", [(1, 4, (1, 3))])
    monkeypatch.setitem(teacher.SIZES, "quick", [{"images": 64, "image_size": 8, **TINY}])
    monkeypatch.setattr(teacher, "BATCH", 32)
    monkeypatch.setitem(evaluation.SIZES, "quick", [(1, 4, 2)])
    monkeypatch.setattr(scaling, "IMAGES", 20)


def written(folder, *words):
    run.main(["--quick", "--repeats", "2", "--output", str(folder), *words])
    return json.loads((folder / "benchmark.json").read_text()), (folder / "benchmark.md").read_text()


def test_what_is_written(tmp_path, tiny, capsys):
    parts = ["teacher", "matching", "evaluation"]
    content, table = written(tmp_path, "--parts", *parts)
    assert {row["part"] for row in content["rows"]} == set(parts)
    assert all(len(row["each"]["ours"]) == len(row["each"]["reference"]) == 2 for row in content["rows"])
    assert {"torch", "lightning", "python"} <= set(content["versions"])
    assert [case["steps"] for case in content["details"]["matching"]["cases"]] == [1, 3]
    assert table.strip() in capsys.readouterr().out
    assert table.count("\n| ") == 1 + len(content["rows"])
    assert (tmp_path / "unroll.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_both_paths_are_measured(tmp_path, tiny):
    parts = ["teacher", "matching", "evaluation"]
    content, _ = written(tmp_path, "--compile", "--parts", *parts)
    timed = {(row["part"], row["quantity"]) for row in content["rows"] if "time" in row["quantity"]}
    assert len(timed) == 2 * len(parts)


def test_scaling_has_every_point_of_every_curve(tmp_path, tiny):
    content, _ = written(tmp_path, "--parts", "scaling")
    panels, sizes = content["details"]["scaling"]["panels"], scaling.SIZES["quick"]
    wanted = {
        "images per class": sizes["ipc"],
        "inner steps": sizes["steps"],
        "classes": sizes["classes"],
        "teachers in the store": sizes["teachers"],
        "ranks": sizes["ranks"],
    }
    assert list(panels) == list(wanted)
    for name, values in wanted.items():
        points = panels[name]["points"]
        assert {(p["curve"], p["x"]) for p in points} == {(c, v) for c in panels[name]["curves"] for v in values}
        assert all(p["seconds"] > 0 for p in points)
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_a_curve_ends_where_memory_does(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "in_process", lambda function, **options: processes.NO_MEMORY)
    panel = scaling.matching_panel("steps", (1, 2), 4, 1)
    assert {(p["seconds"], p["mib"]) for p in panel["points"]} == {(None, None)}
    assert "ipc 1" in panel["title"]
    assert "inner steps" not in panel["title"]
    pictures.scaling({"inner steps": panel}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").is_file()


@pytest.mark.slow
def test_ranks_share_the_teachers():
    found = processes.in_process("scaling:ranks_point", ranks=2, teachers=2, images=20, width=4, image_size=8)
    seconds, memory = zip(*found["each"], strict=True)
    assert len(seconds) == 2
    assert found["seconds"] == max(seconds)
    assert found["mib"] == pytest.approx(sum(memory))


def test_the_clock_is_that_of_the_wall_or_of_the_process(monkeypatch):
    monkeypatch.setattr(measure.time, "process_time", lambda: -7.0)
    found = {}
    for name in ("wall", "cpu"):
        with processes.environment(measure.CLOCK, name):
            found[name] = measure.now()
    assert found["cpu"] == -7.0 < found["wall"]


def test_the_compiler_cache_is_empty_and_put_back(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    with processes.empty_compiler_cache():
        assert os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == []
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


def test_arguments_that_do_not_go_together(capsys):
    for words in (["--repeats", "0"], ["--quick", "--full"], ["--parts", "unknown"]):
        with pytest.raises(SystemExit):
            run.main(words)
    assert "at least 1" in capsys.readouterr().err
