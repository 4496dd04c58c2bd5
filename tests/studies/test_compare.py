"""``ftd compare``: rows, what they share, what a stop and a failure leave, and what is written."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from fits import distil
from PIL import Image

import ftd_lightning
from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.callbacks import SyntheticSetWriter
from ftd_lightning.callbacks.progress import PeakMemory
from ftd_lightning.data import decoding
from ftd_lightning.studies import compare
from ftd_lightning.studies.comparison import Comparison
from ftd_lightning.studies.fits import Deadline, Fit, Settings, kept, resolved, run_child, run_fit
from ftd_lightning.studies.tables import collect, full_lines, markdown, short_table
from ftd_lightning.terminal import TerminatedError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "digits"
MTT = {"distill": str(CONFIGS / "distill_mtt_ipc1.yaml"), "teachers": "mtt"}
LAST = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
LAST["init_args"] = {"save_last": True, "save_top_k": 1, "every_n_epochs": 1, "save_on_train_epoch_end": True}
QUICK = {"enable_model_summary": False, "enable_progress_bar": False, "accelerator": "cpu"}
SMALL = {
    "distill": {
        "model": {"iterations_per_epoch": 2, "syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 3},
        "data": {"max_per_class": 14, "batch_size": 32},
        "trainer": {
            **QUICK,
            "max_steps": 4,
            "callbacks": [{"class_path": "EvaluateSynthetic", "init_args": {"every_n_epochs": 0}}, LAST],
        },
    },
    "evaluate": {
        "config": str(CONFIGS / "evaluate.yaml"),
        "model": {"network_options": {"width": 4, "depth": 1}, "networks": 2, "measure_every": 4},
        "data": {"max_per_class": 14, "batch_size": 32},
        "trainer": {**QUICK, "max_epochs": 12},
    },
}


def content(**changes) -> dict:
    """Give a comparison of rows that share an evaluation and teachers; None takes a key away."""
    given = {
        "title": "small",
        "dataset": "digits",
        "run": "runs/small",
        "teachers": {"mtt": str(CONFIGS / "teacher_mtt.yaml"), "ftd": str(CONFIGS / "teacher_ftd.yaml")},
        "evaluate": str(CONFIGS / "evaluate.yaml"),
        "rows": {
            "mtt": {"label": "MTT", **MTT, "x": 0.2},
            "mtt+wide": {**MTT, "evaluate": {"model": {"networks": 3}}},
            "random": {"synthetic": "random", "x": 0.1},
        },
        **changes,
    }
    return {key: value for key, value in given.items() if value is not None}


def comparison(*overrides: str, **changes) -> Comparison:
    return Comparison.from_dict(content(**changes), Path("small.yaml"), overrides)


def folders(job: Comparison, row: str) -> list[Path]:
    return [fit.folder for fit in job.fits_of(row).each()]


@pytest.mark.slow
def test_a_stop_a_failing_row_and_the_results(here: Path, trajectories: Path, in_process, capsys) -> None:
    rows = {
        "broken": {"distill": {"config": MTT["distill"], "model": {"prune_by": "guess"}}, "teachers": "mtt"},
        "mtt": {"label": "MTT", **MTT, "x": 0.2},
        "random": {"synthetic": "random", "x": 0.1},
        "whole": {"synthetic": "real", "reference": True},
    }
    given = content(**SMALL, teachers={"mtt": {"store": str(trajectories)}}, rows=rows, plot="value")
    Path("study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    job = Comparison.from_file(Path("study"))

    def ended(command, log, deadline):  # by the deadline, after the first checkpoint
        in_process([*command, "--trainer.max_steps=2"], log, deadline)

    assert compare.run_rows(job, ["mtt"], Deadline(9), ended) == ({}, False)
    assert [row["state"] for row in collect(job, {})["rows"]] == ["to do"] * 4
    failures, in_time = compare.run_rows(job, list(job.rows), Deadline(None), in_process)
    assert (list(failures), in_time) == (["broken"], True)
    assert "prune_by" in failures["broken"]
    assert "\n" not in failures["broken"]
    assert [command[-1] == "--ckpt_path=last" for command in in_process.commands] == [False, False, True, *[False] * 3]
    shown = capsys.readouterr().out
    assert "6 of 6 fits to do" in shown
    assert "MTT: distillation, resumes after " in shown

    results = compare.write_results(job, failures)
    assert results == json.loads(Path("runs/small/compare.json").read_text())
    assert str(here) not in json.dumps(results)
    found = {row["name"]: row for row in results["rows"]}
    assert [row["state"] for row in results["rows"]] == ["failed", "done", "done", "done"]
    assert found["mtt"]["iterations"] == 4
    assert found["mtt"]["seconds"]["teachers"] is None, "nobody timed a store that was given"
    assert found["mtt"]["seconds"]["distillation"] > 0
    assert found["mtt"]["peak_memory_MiB"]["process"] > 50
    assert results["teachers"]["mtt"]["count"] == 2
    for name in ("mtt", "random", "whole"):
        accuracy = found[name]["accuracy"]
        assert set(accuracy) == {"last", "chosen_on_held_out", "best_on_test"}
        assert all(set(value) == {"mean", "std", "n"} and value["n"] == 2 for value in accuracy.values())
    assert found["mtt"]["seeds"] == found["random"]["seeds"] == found["whole"]["seeds"]
    images = {name: (row["images"], row["share"]) for name, row in found.items() if name != "broken"}
    assert images == {"mtt": (10, 1 / 14), "random": (10, 1 / 14), "whole": (130, 13 / 14)}
    assert found["whole"]["label"] == "whole (130, 12 epochs, not trained to its end)"
    assert np.asarray(Image.open("runs/small/study.png")).shape == (480, 660, 4)
    picture = np.asarray(Image.open("runs/small/random.png"))
    sheet = np.asarray(Image.open("runs/small/images.png"))
    assert sheet.shape == (2 + 2 * (28 + len(picture)), 4 + picture.shape[1], 3), "MTT above random, under their names"
    assert np.array_equal(sheet[-len(picture) - 2 : -2, 2:-2], picture)
    lines = Path("runs/small/compare.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| MTT |"))
    assert f"| {100 * found['mtt']['accuracy']['last']['mean']:.1f} ± " in line
    assert line.endswith("| hard | 10 | 7.14 % |")
    assert any(line.startswith("| broken | failed: broken: distillation: ") for line in lines)

    done = len(in_process.commands)
    assert compare.run_rows(job, ["mtt", "random", "whole"], Deadline(None), in_process) == ({}, True)
    assert len(in_process.commands) == done, "what is done is not done again"
    assert "[1/4] MTT: distillation: done before, in " in capsys.readouterr().out


@pytest.mark.slow
def test_children_end_with_the_command_and_resume(here: Path, trajectories: Path, command, in_process) -> None:
    """End to end, with a child process: a signal in the middle of a distillation, which then goes on."""
    given = content(**SMALL, teachers={"mtt": {"store": str(trajectories)}}, rows={"mtt": MTT})
    given["distill"] = {**given["distill"], "trainer": {**given["distill"]["trainer"], "max_steps": 60}}
    Path("study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    running = command.start("compare", "--config", "study.yaml", cwd=here)
    running.wait_for(lambda: list(Path("runs").rglob("last.ckpt")))
    running.send_signal(signal.SIGTERM)
    done = running.wait()
    assert done.stderr.splitlines()[-1] == "ftd: terminated: run the same command again"
    job = Comparison.from_file(Path("study"))
    fit = job.fits_of("mtt").distill
    assert "resume with the same command" in (fit.folder / "output.txt").read_text(), "it ended after a checkpoint"
    assert 0 < SyntheticSet.read_metadata(fit.folder / "set.safetensors")["iterations"] < 60
    assert not fit.is_done()
    assert compare.run_rows(job, ["mtt"], Deadline(None), in_process) == ({}, True)
    assert in_process.commands[0][-1] == "--ckpt_path=last"
    assert collect(job, {})["rows"][0]["iterations"] == 60


def test_rows_at_the_same_time_share_fits_and_end_together(here: Path) -> None:
    job, begun, both = comparison(jobs=2), [], threading.Barrier(2, timeout=60)

    def child(command, log, deadline):
        phase = log.parent.name.partition("_")[0]
        begun.append(phase)
        fits = {fit.folder: fit for name in job.rows for fit in job.fits_of(name).each()}
        file = log.parent / fits[log.parent].output
        if phase == "teacher" or log.parent.name.startswith("evaluate_random"):
            both.wait()  # fails unless both run
        if killed and phase == "teacher":
            while deadline.remaining() != 0:
                time.sleep(0.01)
            return None
        if killed:
            raise TerminatedError
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"lr": 1}')
        return 0

    killed = True
    with pytest.raises(TerminatedError):
        compare.run_rows(job, ["mtt", "random", "mtt+wide"], Deadline(None), child)
    assert sorted(begun) == ["evaluate", "teacher"]
    assert not job.fits_of("mtt").teachers.is_done()
    killed = begun.clear()
    assert compare.run_rows(job, ["mtt", "random", "mtt+wide"], Deadline(None), child) == ({}, True)
    assert sorted(begun) == ["distill", "evaluate", "evaluate", "evaluate", "teacher"]


def test_a_setting_in_several_spellings_is_one_fit(here: Path, monkeypatch) -> None:
    own = folders(comparison(), "mtt")  # its teachers' config says lr: 0.05
    for words in (["--teacher.model.lr=0.05"], ["--teacher.model.lr", "0.050"], ["--teacher.model.lr", "5e-2"]):
        assert folders(comparison(*words), "mtt") == own
    written = {"mtt": {"config": str(CONFIGS / "teacher_mtt.yaml"), "model": {"lr": 0.05, "momentum": 0.0}}}
    assert folders(comparison(teachers=written), "mtt") == own, "the config's own, and a default"
    assert folders(comparison("--data.root", "elsewhere", "--trainer.accelerator=cpu"), "mtt") == own
    assert folders(comparison("--teacher.model.lr=0.06"), "mtt") != own
    for version, same in (("9.1.0", False), ("9.1.7.dev0", True)):
        before = folders(comparison(), "mtt")
        monkeypatch.setattr(ftd_lightning, "__version__", version)
        found = zip(folders(comparison(), "mtt"), before, strict=True)
        assert [now == then for now, then in found] == [same] * 3


def test_a_folder_bears_the_name_of_the_first_row_and_the_identity_of_the_fit(here: Path) -> None:
    def named(job: Comparison, row: str) -> list[str]:
        return [folder.name.rpartition("_")[0] for folder in folders(job, row)]

    job = comparison(networks={"": {}, "a net/1": {"model": {"network": "alexnet"}}})
    assert named(job, "mtt") == ["teacher_mtt", "distill_mtt", "evaluate_mtt", "evaluate_mtt_a-net-1"]
    assert named(job, "mtt+wide")[:3] == ["teacher_mtt", "distill_mtt", "evaluate_mtt+wide"], "what it shares with mtt"
    own = folders(comparison(), "mtt")
    other = comparison(rows={"second": MTT})
    assert not {*own} & {*folders(other, "second")[1:]}
    for folder in own:
        folder.mkdir(parents=True)
    assert folders(comparison(rows={"second": MTT}), "second") == own, "the fits that are there"
    renamed = own[0].rename(own[0].with_name(f"mine_{own[0].name.rpartition('_')[2]}"))
    assert folders(comparison(), "mtt") == [renamed, *own[1:]]


def test_a_fit_is_named_after_the_pictures_in_a_folder(here: Path, image_folder, monkeypatch) -> None:
    one, other = (image_folder(here / name, ["cat", "dog"], seed=seed) for seed, name in enumerate("ab"))
    shutil.copytree(one, here / "copy", copy_function=shutil.copy)
    options = {"dataset": "folder", "rows": {"random": {"synthetic": "random"}}, "teachers": None}
    found = {
        root.name: folders(comparison("--data.root", str(root), **options), "random")
        for root in (one, other, here / "copy")
    }
    assert found["a"] == found["copy"] != found["b"]
    monkeypatch.setattr(decoding, "decode", None)  # decoded once: the fit reads what is there
    assert folders(comparison(f"--data.root={one}", **options), "random") == found["a"]
    assert folders(comparison("--data.root=nowhere", **options), "random") not in found.values()


def test_a_store_is_named_after_its_teachers(here: Path, trajectories: Path) -> None:
    def distillation(store: Path) -> Path:
        return folders(comparison(teachers={"mtt": {"store": str(store)}}, rows={"mtt": MTT}), "mtt")[0]

    before = distillation(shutil.copytree(trajectories, here / "moved"))
    assert before == distillation(trajectories)
    shutil.rmtree(here / "moved")
    assert before != distillation(here / "moved"), "not there"


def test_settings_are_given_in_an_order(here: Path, trajectories: Path) -> None:
    """Of the config, of all distillations, of the row, of the command: later ones win."""
    rows = {"mtt": {**MTT, "distill": {"config": MTT["distill"], "model": {"syn_steps": 3, "seed": 3}}}}
    wide = {"model": {"syn_steps": 2, "expert_epochs": 1, "network_options": {"norm": "none"}}}
    job = comparison("--distill.model.seed=4", rows=rows, distill=wide, teachers={"mtt": {"store": str(trajectories)}})
    fit = job.fits_of("mtt").distill
    assert fit.options == (
        *("--model.syn_steps=2", "--model.expert_epochs=1", '--model.network_options={"norm": "none"}'),
        *("--model.syn_steps=3", "--model.seed=3", "--model.seed=4"),
    )
    assert fit.command()[: 3 + len(fit.options)] == ["fit", "--config", MTT["distill"], *fit.options]
    assert f"--model.trajectories={trajectories}" in fit.command()


def test_sets_as_files_on_several_networks(here: Path, trajectories: Path) -> None:
    distil(here, trajectories, steps=1, callbacks=[SyntheticSetWriter()])
    networks = {"convnet": {}, "alexnet": {"model": {"network": "alexnet", "network_options": {}}}}
    rows = {"mine": {"set": "set.safetensors", "ema": True}}
    first, second = comparison(networks=networks, rows=rows).fits_of("mine").each()
    assert first.command()[3:6] == ["--data.dataset=digits", "--data.ema=true", "--data.synthetic=set.safetensors"]
    assert second.options[2:] == ("--model.network=alexnet", "--model.network_options={}")
    assert first.folder != second.folder

    def of_file(file: str) -> list[Path]:
        rows = {"mine": {"set": file}, "on": {"distill": {"config": "digits/distill_dm", "model": {"init": file}}}}
        return [folders(comparison(rows=rows), row)[0] for row in rows]

    before = of_file("set.safetensors")
    assert of_file(shutil.copy("set.safetensors", "copy.safetensors")) == before, "equal contents"
    synthetic = SyntheticSet.load("set.safetensors")
    synthetic.images += 1
    synthetic.save("set.safetensors")
    assert not {*before} & {*of_file("set.safetensors")}, "another set in the same file"

    value = {"mean": 0.5, "std": 0.01, "n": 2}
    row = {"label": "mine", "state": "done", "accuracy": {}, "networks": {n: {"last": value} for n in networks}}
    row |= {"peak_memory_MiB": None, "iterations": 40, "images": 40, "images_stored": 10, "share": 0.01}
    results = {
        "title": "t",
        "device": "",
        "rows": [row, {"label": "a|b", "state": "to do"}],
        "networks": list(networks),
    }
    head, line, to_do = full_lines(results)
    assert head[:3] == ["method", "convnet", "alexnet"]
    assert line == ["mine", "50.0 ± 1.0 (2)", "50.0 ± 1.0 (2)", "40", "-", "hard", "10 -> 40", "1 %"]
    assert to_do == ["a|b", "to do"]
    assert "| a\\|b | to do | - | - | - | - | - | - |" in markdown(results)
    row |= {"decoder": None, "numbers_stored": 30720, "bytes_stored": 122880, "evaluation_steps": 1000}
    assert full_lines(results)[0] == head
    row["decoder"] = {"class_path": "ftd_lightning.decoders.Flip", "init_args": {}}
    head, line, _ = full_lines(results)
    assert head[7:] == ["share", "numbers", "bytes", "steps"]
    assert line[7:] == ["1 %", "30,720", "122,880", "1,000"]
    assert "Numbers and bytes: stored for the images" in markdown(results)
    assert "A column for each network" in markdown(results)


@pytest.mark.slow
def test_a_row_of_random_images_with_a_teacher_s_labels(here: Path, trajectories: Path, in_process) -> None:
    rows = {"soft": {"synthetic": "random", "labels": "teacher", "teachers": "mtt"}}
    evaluate = Settings(**SMALL["evaluate"]).having(
        model={"network_options": {"width": 16, "depth": 1}, "augment": "", "measure_every": 100},
        trainer={"max_epochs": 100},
    )
    job = comparison(teachers={"mtt": {"store": str(trajectories)}}, rows=rows, evaluate=vars(evaluate))
    assert compare.run_rows(job, ["soft"], Deadline(None), in_process) == ({}, True)
    (row,) = collect(job, {})["rows"]
    assert (row["labels"], row["images"], row["images_stored"]) == ("soft (teacher)", 10, 10)
    labels, evaluation = map(Path, row["folders"])
    measured = json.loads((evaluation / "evaluation.json").read_text())
    assert measured["lr"] == 0.01, "as for other real images"
    made = SyntheticSet.load(labels / "set.safetensors")
    assert measured["set"]["label_teacher"] == made.metadata["label_teacher"]
    data = DistillationDataModule("digits", max_per_class=14, synthetic="random")
    data.setup()
    assert torch.equal(made.images, data.synthetic_set.images)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": "nowhere.yaml"}, "nowhere.yaml: no such config"),
        ({"rows": {"a": {"synthetic": "best"}}}, "synthetic is one of"),
        ({"rows": {"a": {"ema": True}}}, "names no images"),
        ({"rows": {"a": {"synthetic": "k-center", "teachers": "dtf"}}}, "unknown teachers dtf; there are mtt, ftd"),
        ({"rows": {"a": {"synthetic": "random", "epochs": 3}}}, "epochs"),
        ({"rows": {"a": {"synthetic": "random", "paired_with": "b"}}}, "paired_with: b is not a row; there are a"),
        ({"rows": {"a": {"synthetic": "herding", "labels": "teacher", "teachers": "mtt"}}}, "row a: labels: teacher"),
        ({"dataset": None}, "lacks dataset"),
    ],
)
def test_bad_input_is_one_line(here: Path, refused, changes: dict, said: str) -> None:
    with refused("small.yaml" if "evaluate" not in changes else "", said):
        job = comparison(**changes)
        job.fits_of("random")


def test_rows_that_were_not_asked_for_may_lack_configs(here: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compare, "run_rows", lambda *given: ({}, True))
    rows = {"random": {"synthetic": "random"}, "gone": {"distill": "gone.yaml"}}
    Path("small.yaml").write_text(yaml.safe_dump(content(rows=rows), sort_keys=False))
    cli.main(["compare", "--config", "small.yaml", "--only", "random"])
    results = json.loads(Path("runs/small/compare.json").read_text())
    assert [row["state"] for row in results["rows"]] == ["to do", "failed"]
    assert "| gone | failed: gone.yaml: no such config" in Path("runs/small/compare.md").read_text()
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--config", "small.yaml", "--only", "dcc"])
    assert stop.value.code == 1
    assert "has no row dcc; there are random, gone" in capsys.readouterr().err


def test_a_fit_is_done_when_it_ended_by_itself_and_its_output_is_there(here: Path, refused) -> None:
    fit = Fit("a fit", CONFIGS / "evaluate.yaml", (), here / "run", "evaluation.json")

    def run(code: int | None, *, writes: bool = False):
        def child(command, log, deadline):
            log.write_text("Epoch 1\rEpoch 2\nftd: error: no such thing\nnext\n")
            if writes:
                (fit.folder / "evaluation.json").write_text('{"lr": 1}')
            return code

        return lambda: run_fit(fit, Deadline(None), child)

    with refused(f"a fit: no such thing (see {fit.folder / 'output.txt'})"):
        run(1)()
    with refused("a fit: "):
        run(0)()
    assert not run(None, writes=True)()
    assert not fit.is_done(), "out of time"
    with FileLock(fit.folder / ".lock"), refused(fit.folder, "another process is at work there"):
        run(0)()
    assert run(0, writes=True)()
    assert fit.is_done()
    (fit.folder / "evaluation.json").write_text('{"lr"')
    assert not fit.is_done(), "damaged"
    (fit.folder / "fit.json").write_text('{"done"')
    assert fit.status()["done"] is False


def test_a_child_holds_its_fit_when_the_command_was_killed(tmp_path: Path, refused) -> None:
    log = tmp_path / "output.txt"
    with log.open("ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # as run_child does
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=out)
    with refused(log, "still writes there"):
        run_child(["info"], log, Deadline(None))
    child.communicate()
    assert run_child(["info", "--help"], log, Deadline(None)) == 0


def test_a_result_is_kept_for_its_identity(tmp_path: Path) -> None:
    def make(value):
        return lambda: {"value": value, "pair": (1, 2), "nan": float("nan")}

    identity = {"seed": 1, "sizes": (2, 3)}
    first = kept(tmp_path, identity, make(1))
    assert first == {"value": 1, "pair": [1, 2], "nan": None}
    assert kept(tmp_path, {"sizes": [2, 3], "seed": 1}, make(2)) == first
    assert kept(tmp_path, {**identity, "seed": 2}, make(2))["value"] == 2
    for file in tmp_path.glob("*.json"):
        file.write_text('{"identity"')
    assert kept(tmp_path, identity, make(3))["value"] == 3, "a damaged file is made again"


def test_real_images_say_how_many_they_are_and_whether_they_were_learned(here: Path) -> None:
    job = comparison(rows={"real": {"label": "real", "synthetic": "real"}})
    (fit,) = job.fits_of("real").each()
    fit.folder.mkdir(parents=True)
    (fit.folder / "fit.json").write_text('{"done": true, "seconds": 2.0, "device": "CPU"}')
    counts = {"images": 324, "images_stored": 324, "labels": "hard", "steps_per_epoch": 6}
    counts |= {"numbers_stored": 324 * 64, "training_images": 1800, "test_images": 4, "chance": 0.5}
    (fit.folder / "images.json").write_text(json.dumps(counts))
    last = {"real": {"mean": 0.215, "std": 0.001, "n": 3}}
    for epochs, label in ((10, "real (324, 10 epochs, not trained to its end)"), (60, "real (324, 60 epochs)")):
        measured = {"accuracy": last, "each": [0.2] * 3, "seeds": [1, 2, 3], "epochs": epochs}
        (fit.folder / "evaluation.json").write_text(json.dumps(measured))
        results = collect(job, {})
        assert results["rows"][0]["label"] == label
        assert results["rows"][0]["evaluation_steps"] == 6 * epochs
    assert results["rows"][0]["share"] == 0.18
    said = "Measured on 4 test images: an accuracy is uncertain by 25 points. Chance: 50.0 %."
    assert said in markdown(results)
    assert said in short_table(results)


STEMS = ("compare", "cross", "study", "demo")
SHIPPED = sorted(file for stem in STEMS for file in CONFIGS.parent.rglob(f"{stem}*.yaml"))


def few(file: Path) -> list:
    return [pytest.mark.slow if file.stem in ("compare_all", "compare_w32_ipc1") else pytest.mark.exhaustive]


@pytest.mark.parametrize("file", [pytest.param(file, marks=few(file)) for file in SHIPPED])
def test_every_shipped_comparison_can_be_planned(file: Path, here: Path) -> None:
    job = Comparison.from_file(file)
    fits = [fit for row in job.rows for fit in job.fits_of(row).each()]
    assert all(fit.folder.is_relative_to("runs") for fit in fits)
    assert not [fit for fit in fits if resolved(fit.config, fit.options) is None], "the parser takes all options"
    values = [row.x for row in job.rows.values() if row.x is not None]
    assert values == sorted(values)
    assert bool(values) == (job.plot is not None)


def test_peak_memory_keeps_the_highest(here: Path, trajectories: Path) -> None:
    file = here / "peak_memory.json"
    file.write_text('{"process": 1e9}')
    distil(here, trajectories, steps=1, callbacks=[PeakMemory()])
    assert json.loads(file.read_text()) == {"process": 1e9}
