"""The call on a machine with a GPU, rehearsed: its records arrive, and a stage that fails leaves the others alone."""

import json
import sys
import tarfile
import types

import pytest
from benchmarks import stages
from processes import FORKED

from ftd_lightning import SyntheticSet

pytestmark = pytest.mark.slow


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Give a function that runs the stages and gives their states, and the records that came home, by name."""
    monkeypatch.setattr(stages, "SECONDS", dict.fromkeys(stages.SECONDS, 300.0))  # on a busy machine, too
    monkeypatch.setattr(stages, "PROCESSES", FORKED)  # which start at once
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # else the module that began pytest
    monkeypatch.chdir(tmp_path)

    def run(*options):
        out = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
        stages.main(["--dry-run", "--minutes", "30", "--out", str(out), "--work", "work", *options])
        home = {path.name: path for path in out.iterdir()}
        assert len(home) <= 8
        assert all(path.stat().st_size < stages.LIMIT for path in home.values())
        return {name: one["state"] for name, one in json.loads(home["stages.json"].read_text())["stages"].items()}, home

    return run


def test_every_record_comes_home_and_is_made_once(rehearse, capsys):
    states, home = rehearse()
    assert states == {"tests": "done", "variants": "done", "ftd_ipc1": "done"}, capsys.readouterr().out
    endings = ("txt", "json", "safetensors", "tar.gz")
    assert set(home) == {"stages.json", "tests.txt", "variants.txt", "variants.json"} | {
        f"ftd_ipc1.{e}" for e in endings
    }
    assert "test_gsam_is_that_of_the_cpu" in home["tests.txt"].read_text()
    measured = json.loads(home["variants.json"].read_text())
    assert list(measured) == list(stages.VARIANTS)
    assert all(one["ms_per_step"] > 0 and one["ratio"] > 0 for one in measured.values()), measured
    cell = json.loads(home["ftd_ipc1.json"].read_text())
    assert [row["name"] for row in cell["rows"]] == ["ftd-ema", "ftd"]
    assert all(0.1 < row["accuracy"]["last"]["mean"] < 1 for row in cell["rows"])
    assert SyntheticSet.load(home["ftd_ipc1.safetensors"]).ema_images.shape == (10, 1, 8, 8)
    with tarfile.open(home["ftd_ipc1.tar.gz"]) as archive:
        assert [name for name in archive.getnames() if name.endswith("compare.md")]
    assert len(capsys.readouterr().out) < 12_000
    again, same = rehearse()
    assert again == states
    assert set(same) == set(home)
    assert same["ftd_ipc1.txt"].read_text() == home["ftd_ipc1.txt"].read_text(), "nothing ran again"


def test_a_stage_that_fails_or_has_no_time_leaves_the_others_alone(rehearse, monkeypatch, capsys):
    monkeypatch.setattr(stages, "SECONDS", {**stages.SECONDS, "tests": 0.0})
    monkeypatch.setattr(stages, "LIMIT", 400)  # the measurements are larger
    states, home = rehearse("--method", "dm")
    assert states == {"tests": "out of time", "variants": "done", "dm_ipc1": "failed"}
    assert "variants.json" not in home
    assert "variants.json" in json.loads(home["stages.json"].read_text())["too_large"]
    assert "its method has no teachers" in capsys.readouterr().out


def test_the_fastest_variant_is_one_that_learns(tmp_path):
    def measured(seconds, loss):
        return {"seconds_per_epoch": seconds, "ratio": 1.0, "loss": loss, "plain_loop_loss": 1.5}

    file = tmp_path / "variants.json"
    assert stages.fastest(file) == "compiled"
    found = {"cuda_graphs": measured(1.0, float("nan")), "compiled": measured(3.0, 1.5), "bf16": measured(2.0, 1.52)}
    file.write_text(json.dumps({**found, "eager float32": {"error": "RuntimeError: out of memory"}}))
    assert stages.fastest(file) == "bf16"
