"""``ftd reproduce`` as people type it, its record, and the table that is made of records."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from ftd_lightning import SyntheticSet, TrajectoryStore, cli
from ftd_lightning.studies import fits as fit_steps
from ftd_lightning.studies import reproduce as reproduction
from ftd_lightning.studies import results_table
from ftd_lightning.studies.comparison import Comparison
from ftd_lightning.studies.fits import FitStep, TimeSlice, is_done, read_notes, run_step
from ftd_lightning.studies.reproduce import Cell
from ftd_lightning.studies.tables import without_machine_paths

ROOT = Path(__file__).resolve().parents[2]
CALLBACKS = """[
  {class_path: EvaluateSynthetic, init_args: {every_n_epochs: 1, networks: 1, epochs: 2}},
  {class_path: SyntheticSetWriter},
  {class_path: SyntheticEMA, init_args: {decay: 0.5}},
  {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
   init_args: {save_last: true, save_top_k: 1, every_n_epochs: 1, save_on_train_epoch_end: true}}]"""
SMALL = [
    *("--data.max_per_class=14", "--data.batch_size=16", "--trainer.accelerator=cpu"),
    *("--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false"),
    *("--teacher.model.network_options={width: 4, depth: 1}", "--teacher.model.epochs", "100"),
    *(
        "--distill.model.iterations_per_epoch=2",
        "--distill.model.syn_steps=2",
        f"--distill.trainer.callbacks={CALLBACKS}",
    ),
    *("--evaluate.model.network_options={width: 4, depth: 1}", "--evaluate.model.networks=2"),
]
COMMAND = [
    *("--dataset=digits", "--ipc", "1", "--method", "ftd"),
    *("--teachers", "2", "--iterations", "4", "--epochs", "12"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*overrides: str, **cell) -> Comparison:
    return reproduction.plan(Cell("digits", 1, **cell), overrides).job


def folders(job: Comparison) -> list[Path]:
    """Folders of the teachers, the distillation and the first evaluation."""
    return [step.folder for step in job.steps(job.rows["raw-last"])]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that has to fail with exit code 1; give its line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ftd: error: ")
    return line


@pytest.mark.slow
def test_a_slice_that_runs_out_a_resume_and_a_record(here: Path, monkeypatch, capsys) -> None:
    commands = []
    start = subprocess.Popen

    def noted(command, **options):
        commands.extend([command] if "ftd_lightning" in command else [])
        return start(command, **options)

    monkeypatch.setattr(fit_steps.subprocess, "Popen", noted)

    def over(self):
        return -1 if list(Path("runs").rglob("last.ckpt")) else 1

    with monkeypatch.context() as patch:
        patch.setattr(TimeSlice, "left", over)
        cli.main(["reproduce", *COMMAND, "--stop-after=9", *SMALL])
    assert capsys.readouterr().out.splitlines()[-1] == "not done: run the same command again"
    assert len(commands) == 1
    assert "--ckpt_path" not in commands[0]
    assert not list(Path().rglob("teacher_0001.safetensors")), "ended in the middle of the teachers"
    assert not Path("notebooks").exists()

    root = here / "data"
    cli.main(["reproduce", *COMMAND, *SMALL, f"--data.root={root}"])
    assert commands[1][-2:] == ["--ckpt_path", "last"]
    assert not any("--ckpt_path" in command for command in commands[2:])
    (folder,) = Path("runs/digits").glob("reproduce_*")
    assert folder.name.startswith("reproduce_ftd_ipc1_2teachers_4iterations_evaluated12epochs_")
    (teachers,) = Path("runs/digits/fits").glob("teacher_ftd*")
    (distill,) = Path("runs/digits/fits").glob("distill_ftd_ipc1*")
    assert read_notes(teachers)["slices"] == 2
    assert SyntheticSet.load(distill / "set.safetensors").metadata["iterations"] == 4

    (path,) = Path("notebooks/results").iterdir()
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith(f"done: {path}")
    assert path.name.startswith("digits_ftd_ipc1_2teachers_")
    text = path.read_text()
    assert str(here) not in text
    found = json.loads(text)
    assert found["command"].startswith(
        "make reproduce DATASET=digits IPC=1 METHOD=ftd TEACHERS=2 ITERATIONS=4 EPOCHS=12 "
    )
    assert "--teacher.model.epochs 100" in found["command"]
    assert "after" not in found["command"]
    assert (found["dataset"], found["ipc"], found["method"], found["iterations"]) == ("digits", 1, "ftd", 4)
    assert found["evaluation_epochs"] == 12
    assert found["config"] == {"teachers": 8, "iterations": 500, "epochs": 1000}
    assert (found["teachers"]["count"], found["teachers"]["epochs"], found["teachers"]["accuracy"]["n"]) == (2, 100, 2)
    store = TrajectoryStore(distill / "teachers")
    last = [store.teacher_metadata(k)["accuracies"][-1] for k in range(2)]
    assert found["teachers"]["accuracy"]["mean"] == pytest.approx(sum(last) / 2)
    assert set(found["accuracy"]) == {"raw", "ema"}
    for images in ("raw", "ema"):
        assert set(found["accuracy"][images]) == {"last", "chosen_on_held_out", "best_on_test"}
        rows = {row["name"]: row for row in json.loads((folder / "compare.json").read_text())["rows"]}
        evaluation = json.loads((Path(rows[f"{images}-last"]["folders"][-1]) / "evaluation.json").read_text())
        assert found["accuracy"][images]["last"] == evaluation["accuracy"]["ftd"]
        measured = json.loads((distill / "evaluations.json").read_text())
        on_test = [entry["mean"] for entry in measured if (entry["images"], entry["part"]) == (images, "test")]
        assert found["accuracy"][images]["best_on_test"]["mean"] == max(on_test)
        assert found["accuracy"][images]["last"]["n"] == found["accuracy"][images]["chosen_on_held_out"]["n"] == 2
    assert found["seconds"]["teachers"] == read_notes(teachers)["seconds"]
    assert all(found["seconds"][phase] > 0 for phase in ("teachers", "distillation", "evaluations"))
    assert "thread" in found["device"]
    assert len(found["seeds"]["evaluation"]) == 2
    assert found["settings"]["teacher"]["model"]["init_args"]["rho"] == 0.02
    assert found["settings"]["distill"]["data"]["init_args"]["max_per_class"] == 14
    assert {"ftd_lightning", "torch", "torchvision", "lightning", "kornia", "python"} <= set(found["versions"])
    assert len(found["date"]) == 10

    done = len(commands)
    cli.main(["reproduce", *COMMAND, *SMALL])
    assert len(commands) == done, "what is done is not done again"
    assert [path] == list(Path("notebooks/results").iterdir())
    assert path.read_text() == text
    path.rename(path.with_name("moved.json"))
    (folder / "record.txt").write_text("elsewhere.json\n")
    path.write_text("another's")
    cli.main(["reproduce", *COMMAND, *SMALL])
    assert path.read_text() == "another's"
    assert json.loads(path.with_name(f"{path.stem}_2.json").read_text())["accuracy"] == found["accuracy"]

    path.unlink()
    path.with_name(f"{path.stem}_2.json").unlink()
    (row,) = map(results_table.row, results_table.read_records(Path("notebooks/results")))
    mean = 100 * found["accuracy"]["raw"]["last"]["mean"]
    assert row[:5] == ["digits, 14 per class, convnet depth 1 width 4", "1", "FTD", "2 x 100", "4"]
    assert f"{mean:.1f}" in row[6]
    assert row[-1] == "-"


def test_runs_that_want_the_same_teachers_share_them(here: Path) -> None:
    plain, fewer, iterations = planned(), planned(teachers=3), planned(iterations=7)
    assert folders(plain)[0] == folders(fewer)[0] == folders(iterations)[0]
    assert folders(plain)[0].parent == Path("runs/digits/fits")
    assert len({plain.folder, fewer.folder, iterations.folder}) == 3
    assert len({folders(job)[1] for job in (plain, fewer, iterations)}) == 3
    assert [job.steps(job.rows["raw-last"])[0].target for job in (plain, fewer)] == [8, 3]
    assert folders(planned(method="mtt"))[0] != folders(plain)[0]
    elsewhere, other = planned("--data.root=/elsewhere", "--data.num_workers", "2"), planned("--teacher.model.rho=0.5")
    assert (elsewhere.folder, folders(elsewhere)) == (plain.folder, folders(plain))
    assert other.folder != plain.folder
    assert folders(other)[0] != folders(plain)[0]
    matching = planned("--distill.model.syn_steps=3")
    assert matching.folder != plain.folder
    assert folders(matching)[0] == folders(plain)[0]
    assert folders(matching)[1] != folders(plain)[1]


def length(*overrides: str, **cell) -> str | None:
    """The epochs that a teacher of CIFAR-10 is trained for; None: as its config says."""
    job = reproduction.plan(Cell("cifar10", method="mtt", **cell), overrides).job
    arguments = job.steps(job.rows["raw-last"])[0].arguments
    return arguments[arguments.index("--model.epochs") + 1] if "--model.epochs" in arguments else None


def test_teachers_are_as_long_as_they_are_read(here: Path) -> None:
    assert [length(ipc=ipc) for ipc in (1, 10, 50)] == ["3", "21", "41"]
    assert length("--distill.model.max_start_epoch", "4", ipc=1) == "5"
    assert length(ipc=1, teacher_epochs=9) == "9"
    assert length(ipc=1, teacher_epochs=0) is None


def test_subsets_share_configs_and_an_average_has_rows_of_its_own(here: Path) -> None:
    woof = reproduction.plan(Cell("imagewoof", 10))
    assert woof.job.folder.parent == Path("runs/imagewoof")
    for step in woof.job.steps(woof.job.rows["ema-last"]):
        assert step.config.parent.name == "imagenet"
        at = [index for index, argument in enumerate(step.arguments) if argument == "--data.dataset"]
        assert {step.arguments[index + 1] for index in at} == {"imagewoof"}
    assert list(planned().rows) == ["raw-last", "raw-chosen", "ema-last", "ema-chosen"]
    assert list(planned(method="mtt").rows) == ["raw-last", "raw-chosen"]


@pytest.mark.slow
def test_a_folder_has_one_process_at_a_time_and_a_failed_fit_is_named(here: Path, refused) -> None:
    step = FitStep("a step", Path("nowhere.yaml"), here / "run", (), lambda: True, 1)
    with refused("a step", "exit code 1"):
        run_step(step, TimeSlice(None))
    assert not is_done(step)
    with FileLock(here / "run" / ".lock"), refused(here / "run", "another process is at work there"):
        run_step(step, TimeSlice(None))


def test_bad_input_is_one_line(here: Path, capsys) -> None:
    assert "digits/distill_ftd_ipc7: no such config; there are digits/distill_att_ipc1" in refusal(
        capsys, "--dataset=digits", "--ipc=7", "--method=ftd"
    )
    assert "has no teachers" in refusal(capsys, "--dataset=digits", "--ipc=1", "--method=dm")
    line = refusal(capsys, "--dataset=digit")
    assert "digit: no settings ship for it; there are cifar10" in line
    assert "teachers=0 must be at least 1" in refusal(capsys, "--dataset=digits", "--ipc=1", "--teachers=0")
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "--teacher", "3"])
    assert stop.value.code == 2
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_fit_that_fails_is_told_with_its_reason(here: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "--dataset=digits", "--ipc=1", "--model.epoch=3"])
    assert stop.value.code == 1
    assert "failed    teachers teachers: " in capsys.readouterr().out


def some_record(**changes) -> dict:
    value = {"mean": 0.5, "std": 0.0123, "n": 5}
    full = {"last": value, "chosen_on_held_out": {**value, "mean": 0.48}, "best_on_test": {**value, "mean": 0.51}}
    return {
        "kind": "reproduction",
        "dataset": "cifar10",
        "ipc": 10,
        "method": "ftd",
        "teachers": {"count": 4, "epochs": 50, "network": {"name": "convnet", "options": {"width": 128, "depth": 3}}},
        "iterations": 5000,
        "device": "a GPU",
        "settings": {"distill": {"data": {"init_args": {"dataset": "cifar10", "max_per_class": None}}}},
        "accuracy": {"raw": full, "ema": dict.fromkeys(full)},
        **changes,
    }


def test_the_table_says_what_is_less_than_published(tmp_path: Path, refused) -> None:
    row = dict(zip(results_table.COLUMNS, results_table.row(some_record()), strict=True))
    assert (row["teachers x epochs"], row["iterations"], row["paper"]) == ("4 of 100 x 50", "5000", "66.6")
    assert row["last, raw / EMA"] == "50.0 ± 1.2 (5) / -"
    assert row["best on test (upper bound), raw / EMA"] == "51.0 ± 1.2 (5) / -"
    part = {"distill": {"data": {"init_args": {"dataset": "cifar10", "max_per_class": 500}}}}
    row = dict(zip(results_table.COLUMNS, results_table.row(some_record(settings=part, iterations=300)), strict=True))
    assert (row["data"], row["iterations"], row["paper"]) == ("cifar10, 500 per class", "300 of 5000", "-")

    for name, ipc in (("b", 10), ("a", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(some_record(ipc=ipc)))
    lines = results_table.table(results_table.read_records(tmp_path)).splitlines()
    assert len(lines) == 4
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["46.8", "66.6"]
    (tmp_path / "c.json").write_text("{}")
    with refused(tmp_path / "c.json", "a record of ftd reproduce"):
        results_table.read_records(tmp_path)
    with refused("there is no <!-- results -->"):
        results_table.with_table("nothing", "results", "a table")


def test_the_documents_show_all_records(monkeypatch) -> None:
    """``make results`` writes them."""
    monkeypatch.chdir(ROOT)
    for name, (path, content) in results_table.TABLES.items():
        text = path.read_text()
        assert results_table.with_table(text, name, content()) == text, path
    folder = ROOT / "notebooks" / "results"
    records = [record for kind in ("reproduction", "comparison") for record in results_table.read_records(folder, kind)]
    assert not [r for r in records if without_machine_paths(r) != r], "no record holds a path of a machine"
    assert os.path.expanduser("~") not in json.dumps(records)
