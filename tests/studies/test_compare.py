"""``ftd compare``: rows, what they share, what a stop and a failure leave, and what is written."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fits import distil, record
from PIL import Image

import ftd_lightning
from ftd_lightning import DistillationDataModule, SyntheticSet, TrajectoryStore, cli
from ftd_lightning.callbacks import SyntheticSetWriter
from ftd_lightning.callbacks.progress import PeakMemory
from ftd_lightning.data import decoding as decoded_cache
from ftd_lightning.studies import compare
from ftd_lightning.studies import compare as comparison_run
from ftd_lightning.studies import comparison as comparison_plan
from ftd_lightning.studies import fits as fit_steps
from ftd_lightning.studies import tables as comparison_table
from ftd_lightning.studies.fits import TimeSlice, read_notes
from ftd_lightning.studies.plots import plot_points
from ftd_lightning.studies.tables import short_table

ROOT = Path(__file__).resolve().parents[2]
CALLBACKS = """[
  {class_path: SyntheticSetWriter}, {class_path: EvaluateSynthetic, init_args: {every_n_epochs: 0}},
  {class_path: lightning.pytorch.callbacks.ModelCheckpoint,
   init_args: {save_last: true, save_top_k: 1, every_n_epochs: 1, save_on_train_epoch_end: true}}]"""
SMALL = [
    *("--data.max_per_class", 14, "--data.batch_size", 32, "--trainer.accelerator", "cpu"),
    *("--trainer.enable_model_summary", False, "--trainer.enable_progress_bar", False),
    *("--distill.model.iterations_per_epoch", 2, "--distill.model.syn_steps", 2, "--distill.model.expert_epochs", 1),
    *("--distill.model.max_start_epoch", 3, "--distill.trainer.max_steps", 40),
    *("--distill.trainer.callbacks", CALLBACKS),
    *("--evaluate.model.network_options", {"width": 4, "depth": 1}, "--evaluate.model.networks", 2),
    *("--evaluate.trainer.max_epochs", 12, "--evaluate.model.measure_every", 4),
]


def write(path: Path, **changes) -> Path:
    """Write a comparison of rows that share an evaluation and teachers; None takes a key away."""
    config = ROOT / "configs" / "digits"
    mtt = {"distill": str(config / "distill_mtt_ipc1.yaml"), "teachers": "mtt"}
    content = {
        "title": "small",
        "dataset": "digits",
        "run": "runs/small",
        "teachers": {"mtt": str(config / "teacher_mtt.yaml"), "ftd": str(config / "teacher_ftd.yaml")},
        "evaluate": str(config / "evaluate.yaml"),
        "rows": {
            "mtt": {"label": "MTT", **mtt, "x": 0.2},
            "mtt+wide": {**mtt, "evaluate_arguments": ["--model.networks", 3]},
            "random": {"synthetic": "random", "x": 0.1},
        },
        **changes,
    }
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.slow
def test_a_stop_a_failing_row_and_the_results(here: Path, trajectories: Path, monkeypatch, capsys) -> None:
    commands, start = [], subprocess.Popen

    def noted(command, **options):
        commands.extend([command] if "ftd_lightning" in command else [])
        return start(command, **options)

    monkeypatch.setattr(fit_steps.subprocess, "Popen", noted)
    distill = str(ROOT / "configs" / "digits" / "distill_mtt_ipc1.yaml")
    mtt = {"distill": distill, "teachers": "mtt"}
    rows = {
        "broken": {**mtt, "distill_arguments": ["--model.prune_by", "guess"]},
        "mtt": {"label": "MTT", **mtt, "x": 0.2},
        "random": {"synthetic": "random", "x": 0.1},
        "whole": {"synthetic": "real", "reference": True},
    }
    teachers = {"mtt": {"store": str(trajectories)}}
    study = write(here / "study.yaml", arguments=SMALL, teachers=teachers, rows=rows, plot={"x": "value"})
    command = ["compare", "--config", str(study)]

    with monkeypatch.context() as patch:
        patch.setattr(TimeSlice, "left", lambda self: -1 if list(Path("runs").rglob("last.ckpt")) else 1)
        cli.main([*command, "--only", "mtt", "--stop-after=9"])
    assert capsys.readouterr().out.splitlines()[-1] == "not done: run the same command again"
    assert len(commands) == 1
    assert {row["state"] for row in json.loads(Path("runs/small/compare.json").read_text())["rows"]} == {"to do"}

    commands.clear()
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 1
    assert [arguments[-2:] == ["--ckpt_path", "last"] for arguments in commands] == [False, True, False, False, False]
    results = json.loads(Path("runs/small/compare.json").read_text())
    assert (results["title"], results["dataset"], results["ipc"]) == ("small", "digits", 1)
    found = {row["name"]: row for row in results["rows"]}
    assert [row["state"] for row in results["rows"]] == ["failed", "done", "done", "done"]
    assert "prune_by" in found["broken"]["reason"]
    assert "\n" not in found["broken"]["reason"]

    folder = next(path for path in map(Path, found["mtt"]["folders"]) if path.name.startswith("distill"))
    assert read_notes(folder)["slices"] == 2
    assert SyntheticSet.load(folder / "set.safetensors").metadata["iterations"] == 40
    seconds = found["mtt"]["seconds"]
    assert seconds["teachers"] is None, "nobody timed a store that was given"
    assert seconds["distillation"] == read_notes(folder)["seconds"] > 0
    assert seconds["evaluation"] > 0
    assert found["mtt"]["peak_memory_MiB"]["process"] > 50
    for name in ("mtt", "random", "whole"):
        accuracy = found[name]["accuracy"]
        assert set(accuracy) == {"last", "chosen_on_held_out", "best_on_test"}
        assert all(set(value) == {"mean", "std", "n"} and value["n"] == 2 for value in accuracy.values())
        assert accuracy["best_on_test"]["mean"] >= max(accuracy["last"]["mean"], accuracy["chosen_on_held_out"]["mean"])
    assert found["mtt"]["seeds"] == found["random"]["seeds"] == found["whole"]["seeds"]
    assert {name: row.get("labels") for name, row in found.items()} == {
        "broken": None,
        **dict.fromkeys(["mtt", "random", "whole"], "hard"),
    }
    images = {name: (row.get("images"), row.get("share")) for name, row in found.items()}
    assert images == {"broken": (None, None), "mtt": (10, 1 / 14), "random": (10, 1 / 14), "whole": (130, 13 / 14)}

    assert results["plot"]["x"] == "value"
    assert [(point["x"], point["label"]) for point in results["plot"]["points"]] == [(0.1, "random"), (0.2, "MTT")]
    assert [line["label"] for line in results["plot"]["references"]] == [
        "whole (130, 12 epochs, not trained to their end)"
    ]
    assert np.asarray(Image.open("runs/small/study.png")).shape == (480, 660, 4)
    pictures = {name: np.asarray(Image.open(f"runs/small/{name}.png")) for name in ("mtt", "random", "whole")}
    assert not np.array_equal(pictures["mtt"], pictures["random"])
    assert not Path("runs/small/broken.png").exists()
    sheet = np.asarray(Image.open("runs/small/images.png"))
    height = 2 + 20 + 98  # the names of the classes, and a row of pictures
    assert sheet.shape == (2 * height, 96 + 2 + 10 * 98, 3)
    assert np.array_equal(sheet[height:, 96:], pictures["random"])

    lines = Path("runs/small/compare.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| MTT |"))
    mean = 100 * found["mtt"]["accuracy"]["last"]["mean"]
    assert f"| {mean:.1f} ± " in line
    assert line.endswith("| hard | 10 | 7.14 % |")
    assert any(line.startswith("| broken | failed: broken: distillation: ") for line in lines)
    shown = capsys.readouterr().out
    assert "MTT     " in shown
    assert "best on test (upper bound)" in shown
    assert str(here) not in Path("runs/small/compare.json").read_text()

    commands.clear()
    cli.main([*command, "--only", "mtt", "random", "whole"])
    assert commands == [], "what is done is not done again"


def steps(file: Path, row: str, *further: str) -> list[Path]:
    job = comparison_plan.load(file, further)
    return [step.folder for step in job.steps(job.rows[row])]


def test_rows_share_what_is_the_same(here: Path) -> None:
    file = write(here / "small.yaml", fits="runs/fits")
    mtt, wide = steps(file, "mtt"), steps(file, "mtt+wide")
    assert [folder.name.rsplit("_", 1)[0] for folder in mtt] == ["teacher_mtt", "distill_mtt_ipc1", "evaluate"]
    assert mtt[:2] == wide[:2]
    assert mtt[2] != wide[2]
    other = write(here / "other.yaml", run="runs/other", fits="runs/fits", title=None)
    assert steps(other, "mtt") == mtt
    assert steps(file, "mtt", "--data.root", "/elsewhere", "--trainer.accelerator=cpu") == mtt
    # What teachers start a distillation counts, and so on; what comes after does not.
    for word, same in (("--teacher.model.epochs=9", 0), ("--distill.model.ipc=2", 1), ("--evaluate.model.seed=1", 2)):
        found = steps(file, "mtt", word)
        assert [a == b for a, b in zip(found, mtt, strict=True)] == [True] * same + [False] * (3 - same)
    job = comparison_plan.load(file)
    _, distill, evaluation = job.steps(job.rows["mtt"])
    assert distill.arguments[-3:-1] == ("--model.trajectories", str(mtt[1] / "teachers"))
    assert evaluation.arguments[-2:] == ("--data.synthetic", str(mtt[1] / "set.safetensors"))


def test_a_setting_in_several_spellings_is_one_fit(here: Path, monkeypatch) -> None:
    file = write(here / "small.yaml")
    own = steps(file, "mtt")  # its teachers' config says lr: 0.05
    for words in (["--teacher.model.lr=0.05"], ["--teacher.model.lr", "0.050"], ["--teacher.model.lr", "5e-2"]):
        assert steps(file, "mtt", *words) == own
    assert steps(file, "mtt", "--teacher.model.momentum=0.0") == own, "a default"
    assert steps(file, "mtt", "--teacher.model.lr=0.06") != own
    for version, same in (("9.1.0", False), ("9.1.7.dev0", True)):
        before = steps(file, "mtt")
        monkeypatch.setattr(ftd_lightning, "__version__", version)
        found = zip(steps(file, "mtt"), before, strict=True)
        assert [now == then for now, then in found] == [same] * 3


def test_a_fit_is_named_after_the_pictures_in_a_folder(here: Path, image_folder, monkeypatch) -> None:
    one, other = (image_folder(here / name, ["cat", "dog"], seed=seed) for seed, name in enumerate("ab"))
    shutil.copytree(one, here / "copy", copy_function=shutil.copy)
    file = write(here / "small.yaml", dataset="folder", rows={"random": {"synthetic": "random"}}, teachers=None)
    found = {root.name: steps(file, "random", "--data.root", str(root)) for root in (one, other, here / "copy")}
    assert found["a"] == found["copy"] != found["b"]
    monkeypatch.setattr(decoded_cache, "decode", None)  # decoded once: the fit reads what is there
    assert steps(file, "random", f"--data.root={one}") == found["a"]
    assert steps(file, "random", "--data.root=nowhere") not in found.values()


def test_a_store_is_named_after_its_teachers(here: Path, trajectories: Path) -> None:
    mtt = {"distill": str(ROOT / "configs" / "digits" / "distill_mtt_ipc1.yaml"), "teachers": "mtt"}

    def distillation(store: Path) -> Path:
        teachers = {"mtt": {"store": str(store)}}
        return steps(write(here / "s.yaml", teachers=teachers, rows={"mtt": mtt}), "mtt")[0]

    before = distillation(shutil.copytree(trajectories, here / "moved"))
    assert before == distillation(trajectories)
    next((here / "moved").glob("teacher_*1.safetensors")).unlink()
    assert before != distillation(here / "moved")


def test_a_damaged_result_is_made_again(here: Path) -> None:
    file = write(here / "small.yaml")
    job = comparison_plan.load(file)
    step = job.evaluation_step(job.rows["random"], "")
    step.folder.mkdir(parents=True)
    whole = {"accuracy": {"random": {"mean": 0.5}}, "each": [0.5], "seeds": [1], "epochs": 3}
    noted = {"finished": {"1": 2.0}, "seconds": 2.0}
    for content, notes, done in (
        (whole, noted, True),
        *((broken, noted, False) for broken in ([], None, "text", {})),
        *((whole, broken, False) for broken in ([], None, "text", {"finished": None})),
    ):
        (step.folder / "evaluation.json").write_text(json.dumps(content))
        (step.folder / "wall_time.json").write_text(json.dumps(notes))
        assert fit_steps.is_done(step) is done
    (step.folder / "wall_time.json").write_text('{"finished": {"1"')
    assert not fit_steps.is_done(step)


def test_a_changed_config_begins_anew_but_a_comment_does_not(here: Path) -> None:
    (here / "mine.yaml").write_text("model: {class_path: SyntheticEvaluation}\n")
    file = write(here / "small.yaml", evaluate="mine.yaml")
    before = steps(file, "random")
    (here / "mine.yaml").write_text("# said\nmodel: {class_path: SyntheticEvaluation}\n")
    assert steps(file, "random") == before
    (here / "mine.yaml").write_text("model: {class_path: SyntheticEvaluation, init_args: {lr: 0.5}}\n")
    assert steps(file, "random") != before


def test_a_store_that_holds_more_lends_as_many_as_are_wanted(here: Path) -> None:
    config = str(ROOT / "configs" / "digits" / "teacher_mtt.yaml")
    few, more = ({"mtt": {"config": config, "arguments": ["--model.teachers", count]}} for count in (1, 2))
    row = {"distill": str(ROOT / "configs" / "digits" / "distill_mtt_ipc1.yaml"), "teachers": "mtt"}
    found = {}
    for count, teachers in ((1, few), (2, more)):
        job = comparison_plan.load(write(here / "s.yaml", teachers=teachers, rows={"mtt": row}))
        found[count] = job.steps(job.rows["mtt"])
    assert found[1][0].folder == found[2][0].folder, "they are the first ones of the same"
    assert found[1][1].folder != found[2][1].folder
    found[2][0].folder.mkdir(parents=True)
    record(here).rename(found[2][0].folder / "trajectories")
    assert found[2][0].finished()
    for count, (_, distill, _) in found.items():
        distill.prepare()
        distill.prepare()
        assert len(TrajectoryStore(distill.folder / "teachers")) == count


def test_sets_as_files_on_several_networks(here: Path, trajectories: Path) -> None:
    distil(here, trajectories, steps=1, callbacks=[SyntheticSetWriter()])
    networks = {"convnet": [], "alexnet": ["--model.network", "alexnet", "--model.network_options", {}]}
    file = write(here / "s.yaml", networks=networks, rows={"mine": {"set": "set.safetensors", "ema": True}})
    job = comparison_plan.load(file)
    first, second = job.steps(job.rows["mine"])
    assert first.arguments[2:4] == ("--data.ema", "true")
    assert second.arguments[4:8] == ("--model.network", "alexnet", "--model.network_options", "{}")
    assert first.folder != second.folder
    synthetic = SyntheticSet.load("set.safetensors")
    synthetic.images += 1
    synthetic.save("set.safetensors")
    assert job.steps(job.rows["mine"])[0].folder != first.folder, "another set in the same file"

    value = {"mean": 0.5, "std": 0.01, "n": 2}
    row = {"label": "mine", "state": "done", "accuracy": {}, "networks": {n: {"last": value} for n in networks}}
    row |= {"seconds": dict.fromkeys(["teachers", "distillation", "evaluation"]), "peak_memory_MiB": None}
    results = {"rows": [{**row, "iterations": 40, "images": 10, "share": 0.01}], "networks": list(networks)}
    head, line = comparison_table.table(results)
    assert head[:3] == ["method", "convnet", "alexnet"]
    assert line == ["mine", "50.0 ± 1.0 (2)", "50.0 ± 1.0 (2)", "-", "-", "-", "40", "-", "hard", "10", "1 %"]


def test_random_images_are_labelled_in_a_step_of_their_own(here: Path, trajectories: Path) -> None:
    teachers = {"mtt": {"store": str(trajectories)}, "ftd": {"store": "elsewhere"}}
    soft = {"synthetic": "random", "labels": "teacher", "teachers": "mtt"}
    rows = {"random": {"synthetic": "random"}, "soft": soft, "ftd": {**soft, "teachers": "ftd"}}
    networks = {"convnet": [], "alexnet": ["--model.network", "alexnet", "--model.network_options", {}]}
    file = write(here / "s.yaml", teachers=teachers, rows=rows, ipc=3)
    labels, evaluation = (job := comparison_plan.load(file)).steps(job.rows["soft"])
    command = labels.command
    written = str(labels.folder / "set.safetensors")
    assert command[:4] == ["label", written, "--config", str(ROOT / "configs" / "digits" / "evaluate.yaml")]
    assert command[-4:] == ["--data.ipc", "3", "--data.trajectories", str(trajectories)]
    assert evaluation.arguments[-2:] == ("--data.synthetic", written)
    assert len(job.steps(job.rows["random"])) == 1
    assert job.steps(job.rows["ftd"])[0].folder != labels.folder, "labels of other teachers"
    assert job.steps(job.rows["ftd"])[1].folder != evaluation.folder
    # One set, by the first network, for all that it is evaluated on.
    several = comparison_plan.load(write(here / "s.yaml", teachers=teachers, rows=rows, ipc=3, networks=networks))
    first, *others = several.steps(several.rows["soft"])
    assert first.folder == labels.folder
    assert {step.arguments[-1] for step in others} == {written}
    assert len(others) == 2


def test_labels_and_images_have_columns_that_old_records_fill_too() -> None:
    kinds = {key: {"mean": 0.5, "std": 0.01, "n": 2} for key in ("last", "chosen_on_held_out", "best_on_test")}
    old = {"label": "a", "state": "done", "accuracy": kinds, "peak_memory_MiB": None, "images": 10, "share": 0.01}
    old |= {"seconds": dict.fromkeys(["teachers", "distillation", "evaluation"])}
    soft = {**old, "labels": "soft (learned)", "images": 40, "images_stored": 10}
    to_do = {"label": "c", "state": "to do"}
    results = {"title": "t", "rows": [old, soft, to_do], "teachers": {}, "device": ""}
    head, *lines = comparison_table.table(results)
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert [(row["labels"], row["images"]) for row in found] == [
        ("hard", "10"),
        ("soft (learned)", "10 -> 40"),
        ("-", "-"),
    ]
    above, _ = comparison_table.markdown(results).split("| method |", 1)
    assert "No row has a teacher at evaluation" in above


@pytest.mark.slow
def test_a_row_of_random_images_with_a_teacher_s_labels(here: Path, trajectories: Path) -> None:
    teachers = {"mtt": {"store": str(trajectories)}}
    rows = {"soft": {"synthetic": "random", "labels": "teacher", "teachers": "mtt"}}
    enough = ["--evaluate.model.network_options", {"width": 16, "depth": 1}, "--evaluate.model.augment", ""]
    enough += ["--evaluate.trainer.max_epochs", 100, "--evaluate.model.measure_every", 100]
    study = write(here / "study.yaml", arguments=[*SMALL, *enough], teachers=teachers, rows=rows)
    cli.main(["compare", "--config", str(study)])
    (row,) = json.loads(Path("runs/small/compare.json").read_text())["rows"]
    assert row["state"] == "done"
    assert (row["labels"], row["images"], row["images_stored"]) == ("soft (teacher)", 10, 10)
    assert row["teacher_at_evaluation"] is False
    assert row["seconds"]["distillation"] > 0
    labels, evaluation = map(Path, row["folders"])
    measured = json.loads((evaluation / "evaluation.json").read_text())
    assert measured["lr"] == 0.01, "as for other real images"
    made = SyntheticSet.load(labels / "set.safetensors")
    assert measured["set"]["label_teacher"] == made.metadata["label_teacher"]
    data = DistillationDataModule("digits", max_per_class=14, synthetic="random")
    data.setup()
    assert torch.equal(made.images, data.synthetic_set.images)
    lines = Path("runs/small/compare.md").read_text().splitlines()
    assert [line.endswith("| soft (teacher) | 10 | 7.14 % |") for line in lines if line.startswith("| soft |")] == [
        True
    ]


def test_a_plot_takes_rows_that_are_done_by_rising_x() -> None:
    last = {"accuracy": {"last": {"mean": 0.5, "std": 0.1, "n": 5}}, "state": "done"}
    rows = [{"label": str(x), "x": x, **last} for x in (0.1, 0.005, 0.03)]
    rows += [{"label": "to come", "x": 0.01, "state": "to do"}, {"label": "MTT", "reference": True, **last}]
    found = plot_points(rows)
    assert [point["x"] for point in found["points"]] == [0.005, 0.03, 0.1]
    assert found["references"] == [{"label": "MTT", "mean": 0.5, "std": 0.1}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": "nowhere.yaml"}, "nowhere.yaml: no such config"),
        ({"rows": {"a": {"distill": "gone.yaml"}}}, "gone.yaml: no such config"),
        ({"rows": {"a": {"synthetic": "best"}}}, "synthetic is one of"),
        ({"rows": {"a": {"synthetic": "random", "distill": "b"}}}, "synthetic and distill"),
        ({"rows": {"a": {"ema": True}}}, "names no set"),
        ({"rows": {"a": {"synthetic": "random", "iterate": "chosen"}}}, "iterate is one of last, chosen, of a row"),
        ({"rows": {"a": {"distill": "b", "iterate": "best"}}}, "iterate is one of last, chosen"),
        (
            {"rows": {"a": {"synthetic": "random", "distill_minutes": 3}}},
            "distill_minutes belongs to a row that distils",
        ),
        ({"rows": {"a": {"distill": "b", "distill_minutes": "3m"}}}, "row a: distill_minutes='3m' is no number of min"),
        ({"distill_minutes": 0}, "distill_minutes=0 is no number of minutes above 0"),
        ({"rows": {"a": {"set": "gone.safetensors"}}}, "gone.safetensors is not there"),
        ({"rows": {"a": {"synthetic": "k-center", "teachers": "dtf"}}}, "unknown teachers dtf; there are mtt, ftd"),
        ({"rows": {"a": {"synthetic": "random", "epochs": 3}}}, "row a: unknown epochs"),
        ({"rows": {"a/b": {"synthetic": "random"}}}, "names a file too"),
        ({"teachers": {"mtt": {"arguments": []}}}, "give either config or store"),
        ({"row": {}}, "unknown row"),
        ({"dataset": None}, "lacks dataset"),
        ({"rows": ["random"]}, "rows is no mapping"),
        ({"networks": ["convnet"]}, "networks is no mapping"),
        ({"networks": []}, "networks is no mapping"),
        ({"teachers": "mtt"}, "teachers is no mapping"),
        ({"plot": {"y": "rho"}}, "plot names no x"),
        ({"plot": "rho"}, "plot names no x"),
        ({"rows": {"a": {"synthetic": "random", "x": "5e-3"}}}, "row a: x='5e-3' is no number"),
        ({"rows": {"a": {"synthetic": "random", "x": True}}}, "row a: x=True is no number"),
        ({"rows": {"a": {"synthetic": "random", "x": float("nan")}}}, "row a: x=nan is no number"),
        ({"rows": {"a": {"synthetic": "herding"}}}, "row a: herding goes by the features of a teacher"),
        ({"rows": {"a": {"synthetic": "k-center"}}}, "row a: k-center goes by the features of a teacher"),
        (
            {"rows": {"a": {"synthetic": "random", "labels": "teacher"}}},
            "row a: labels: teacher is for a row of random",
        ),
        (
            {"rows": {"a": {"synthetic": "herding", "labels": "teacher", "teachers": "mtt"}}},
            "row a: labels: teacher is for a row of random",
        ),
        (
            {"rows": {"a": {"synthetic": "random", "labels": "soft", "teachers": "mtt"}}},
            "row a: labels: teacher is for a row of random",
        ),
        (
            {"rows": {"a": {"synthetic": "random", "labels": "teacher", "teachers": "mtt", "ema": True}}},
            "row a: random images have no average",
        ),
    ],
)
def test_bad_input_is_one_line(here: Path, refused, changes: dict, said: str) -> None:
    with refused(said):
        comparison_plan.load(write(here / "small.yaml", **changes))


def test_rows_that_were_not_asked_for_may_lack_configs(here: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "advance", lambda *given: ({}, True))
    rows = {"random": {"synthetic": "random"}, "gone": {"distill": "gone.yaml"}}
    rows["pupil"] = {"synthetic": "herding", "teachers": "away"}
    file = write(here / "small.yaml", rows=rows, teachers={"away": "away.yaml"})
    cli.main(["compare", "--config", str(file), "--only", "random"])
    results = json.loads(Path("runs/small/compare.json").read_text())
    assert [row["state"] for row in results["rows"]] == ["to do", "failed", "failed"]
    assert "gone.yaml: no such config" in results["rows"][1]["reason"]
    assert "away.yaml: no such config" in results["rows"][2]["reason"]
    assert results["teachers"]["away"]["seconds"] is None
    written = Path("runs/small/compare.md").read_text()
    assert "- teachers away: failed: " in written
    assert "| gone | failed: " in written


@pytest.mark.parametrize(
    ("rounds", "iterations", "max_steps", "finished"),
    [(4, 9, 100, True), (3, 9, 100, False), (3, 100, 100, True), (3, 9, -1, False), (None, 9, 100, False)],
)
def test_a_method_that_counts_rounds_is_finished_by_either(
    rounds, iterations, max_steps, finished, here: Path, trajectories: Path
) -> None:
    distil(here, trajectories, steps=1, callbacks=[SyntheticSetWriter()])
    synthetic = SyntheticSet.load("set.safetensors")
    synthetic.metadata |= {"iterations": iterations} | ({} if rounds is None else {"rounds": rounds})
    row = {"distill": str(ROOT / "configs" / "digits" / "distill_cafe.yaml")}
    job = comparison_plan.load(write(here / "small.yaml", rows={"cafe": row}))
    step = job.distill_step(job.rows["cafe"])
    step.folder.mkdir(parents=True)
    synthetic.save(step.folder / "set.safetensors")
    saved = {"model": {"init_args": {"rounds": 4}}, "trainer": {"max_steps": max_steps}}
    (step.folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert step.finished() is finished


def test_a_budget_of_minutes_ends_a_distillation(here: Path, trajectories: Path) -> None:
    distil(here, trajectories, steps=1, callbacks=[SyntheticSetWriter()])
    synthetic = SyntheticSet.load("set.safetensors")
    row = {"distill": str(ROOT / "configs" / "digits" / "distill_dm.yaml")}
    rows = {"short": row, "long": {**row, "distill_minutes": 90.5}}
    job = comparison_plan.load(write(here / "small.yaml", rows=rows, distill_minutes=0.5))
    short, long = (job.distill_step(job.rows[name]) for name in rows)
    for step, spelt in ((short, "00:00:00:30"), (long, "00:01:30:30")):
        assert step.arguments[step.arguments.index("--trainer.max_time") + 1] == spelt
    assert short.folder != long.folder
    short.folder.mkdir(parents=True)
    synthetic.save(short.folder / "set.safetensors")
    (short.folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {}}, "trainer": {"max_steps": 9}}))
    for seconds, finished in ((29.9, False), (30.0, True)):
        fit_steps.write_notes(short.folder, {**fit_steps.read_notes(short.folder), "seconds": seconds})
        assert short.finished() is finished


@pytest.mark.slow
def test_rows_with_equal_minutes_say_how_far_they_came(here: Path, trajectories: Path) -> None:
    """Ended by its time, a distillation is done: it is evaluated, and not begun again."""
    row = {"distill": str(ROOT / "configs" / "digits" / "distill_dm.yaml")}
    steps = SMALL.index("--distill.model.iterations_per_epoch"), SMALL.index("--distill.trainer.callbacks")
    arguments = [*SMALL[: steps[0]], "--distill.trainer.max_steps", 20001, *SMALL[steps[1] :]]
    study = write(here / "study.yaml", arguments=arguments, rows={"dm": row}, distill_minutes=0.1)
    for _ in range(2):
        cli.main(["compare", "--config", str(study)])
        (found,) = json.loads(Path("runs/small/compare.json").read_text())["rows"]
        assert found["state"] == "done"
        assert 0 < found["iterations"] < 20001
        assert found["seconds"]["distillation"] >= 6
    folder = next(path for path in map(Path, found["folders"]) if path.name.startswith("distill"))
    assert read_notes(folder)["slices"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is named without threads")
def test_threads_are_those_of_the_children(here: Path, monkeypatch) -> None:
    names = []
    monkeypatch.setattr(compare, "advance", lambda *given: (names.append(fit_steps.device_name()) or {}, True))
    monkeypatch.delenv("OMP_NUM_THREADS")
    other = torch.get_num_threads() + 3
    for threads in (other, 1):
        cli.main(["compare", "--config", str(write(here / "small.yaml", threads=threads)), "--only", "random"])
    assert names[0].endswith(f", {other} threads")
    assert names[1].endswith(", 1 thread")
    assert fit_steps.device_name().endswith(f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
    monkeypatch.setenv("OMP_NUM_THREADS", f"{other},2")
    assert fit_steps.device_name() == names[0], "of the outermost level"


def test_what_was_done_before_is_said_and_counted(here: Path, monkeypatch, capsys) -> None:
    job = comparison_plan.load(write(here / "small.yaml"))
    rows = [job.rows["random"], job.rows["mtt"]]
    (evaluation,), (teachers, *_) = map(job.steps, rows)
    for step, seconds in ((evaluation, 19.2), (teachers, 118.0)):
        step.folder.mkdir(parents=True)
        fit_steps.write_notes(step.folder, {**fit_steps.read_notes(step.folder), "seconds": seconds})
    teachers.checkpoint.parent.mkdir()
    teachers.checkpoint.touch()
    monkeypatch.setattr(comparison_run, "run_step", lambda step, time_slice, quiet: True)
    monkeypatch.setattr(comparison_run, "is_done", lambda step: step.folder == evaluation.folder)
    assert comparison_run.advance(job, rows, TimeSlice(None), quiet=True) == ({}, True)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")] == [
        "[1/4] random: evaluation: done before, in 19 s",
        "[2/4] teachers mtt: goes on after 118 s",
        "[3/4] mtt: distillation",
        "[4/4] mtt: evaluation",
    ]


def test_real_images_say_how_many_they_are_and_whether_they_were_learned(here: Path) -> None:
    job = comparison_plan.load(write(here / "small.yaml", rows={"real": {"label": "real", "synthetic": "real"}}))
    step = job.evaluation_step(job.rows["real"], "")
    step.folder.mkdir(parents=True)
    fit_steps.write_notes(step.folder, {**fit_steps.read_notes(step.folder), "finished": {"1": 1.0}})
    counts = {"images": 324, "steps_per_epoch": 6, "training_images": 1800, "test_images": 4, "chance": 0.5}
    (step.folder / "images.json").write_text(json.dumps(counts))
    last = {"real": {"mean": 0.215, "std": 0.001, "n": 3}}
    for epochs, label in ((10, "real (324, 10 epochs, not trained to their end)"), (60, "real (324, 60 epochs)")):
        measured = {"accuracy": last, "each": [0.2] * 3, "seeds": [1, 2, 3], "epochs": epochs}
        (step.folder / "evaluation.json").write_text(json.dumps(measured))
        results = comparison_table.gather(job, {})
        assert results["rows"][0]["label"] == label
    assert results["rows"][0]["share"] == 0.18
    said = "Measured on 4 test images: an accuracy is uncertain by 25 points. Chance: 50.0 %."
    assert said in comparison_table.markdown(results)
    assert said in short_table(results)


def test_notes_are_of_the_columns_that_there_are() -> None:
    results = {"title": "t", "rows": [], "teachers": {}, "device": ""}
    one, several = (
        comparison_table.markdown({**results, "networks": networks}) for networks in ([], ["convnet", "alexnet"])
    )
    for arguments, where in (
        ("Best on test: ", [one]),
        ("Chosen on held-out: ", [one]),
        ("A column for each network", [several]),
        ("Seconds of a distillation include measuring it on the way (EvaluateSynthetic)", [one, several]),
        ("measuring on the way included", [one, several]),
    ):
        assert [said for said in (one, several) if arguments in said] == where


PUBLISHED = {
    "dc": ["--model.augment", "", "--trainer.max_epochs", 300],
    "cafe": ["--model.augment", "", "--trainer.max_epochs", 600],
    **{name: ["--model.augment.align_corners", False] for name in ("dsa", "dm", "cafe+dsa")},
}


@pytest.mark.parametrize("name", ["cifar10/compare_ipc10", "cifar10/cross_architecture_ipc50", "digits/compare"])
def test_methods_without_teachers_are_evaluated_as_published(name: str) -> None:
    rows = comparison_plan.load(ROOT / "configs" / f"{name}.yaml", only=["dc"]).rows
    found = {method: rows[method].given["evaluate_arguments"] for method in PUBLISHED if method in rows}
    assert {"dc", "cafe"} <= set(found)
    end = 2 if name.startswith("digits") else None  # where all rows train for as long
    assert found == {method: PUBLISHED[method][:end] for method in found}


def test_bad_words_are_refused(here: Path, refused, capsys) -> None:
    file = write(here / "small.yaml")
    with refused("has no row dcc; there are mtt, mtt+wide, random"):
        comparison_plan.load(file, only=["dcc"])
    with refused("gone.yaml: no such config"):
        comparison_plan.load(here / "gone.yaml")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--config", str(file), "--minute", "3"])
    assert stop.value.code == 2
    assert "--minute" in capsys.readouterr().err
    assert not Path("runs").exists()


SHIPPED = sorted(path for name in ("compare", "cross", "study") for path in (ROOT / "configs").rglob(f"{name}_*.yaml"))
SHIPPED.append(ROOT / "configs" / "digits" / "compare.yaml")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_comparisons_name_configs_that_are_there(file: Path) -> None:
    job = comparison_plan.load(file)
    assert job.given["dataset"] == file.parent.name
    stem = file.stem if file.stem != "compare" else "compare_ipc1"
    assert job.folder == Path("runs") / file.parent.name / stem
    values = [row.given["x"] for row in job.rows.values() if "x" in row.given]
    assert values == sorted(values)
    assert bool(values) == ("plot" in job.given)


def test_peak_memory_keeps_the_highest(here: Path, trajectories: Path) -> None:
    (here / "peak_memory.json").write_text('{"process": 1e9}')
    distil(here, trajectories, steps=1, callbacks=[PeakMemory()])
    assert json.loads((here / "peak_memory.json").read_text()) == {"process": 1e9}
    (here / "peak_memory.json").unlink()
    held = torch.ones(1 << 22)
    distil(here, trajectories, steps=1, callbacks=[PeakMemory()])
    assert json.loads((here / "peak_memory.json").read_text())["process"] > held.nbytes / (1 << 20)
