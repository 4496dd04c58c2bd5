"""The stages of a bare machine with a GPU, on the digits: records, resuming, failures, what is carried both ways."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from benchmarks import stage_steps, stages, transfer

from ftd_lightning import SyntheticSet
from ftd_lightning.files.transforms import Whitening

pytestmark = pytest.mark.exhaustive  # a tool of the project
TESTS = Path(__file__).resolve().parent


def state_of(folder):
    return json.loads((folder / "stages.json").read_text())


def steps_of(folder):
    return state_of(folder)["steps"]


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return stage_steps.Job(folder, tmp_path / "out", True, None, {"dry_run": True, "steps": {}})


def wheel_with(folder, files, name="thing-1.0-py3-none-any.whl"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return folder


def whitened_set(path, whitening, value):
    images = torch.full((2, 3, 4, 4), float(value))
    SyntheticSet(images, torch.tensor([0, 1]), class_names=["a", "b"], transform=whitening).save(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_dry_run_does_all_stages_once(tmp_path):
    """Started as a file, without a path to the library; the second call only packs again."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    wheels = wheel_with(tmp_path / "wheels", {"thing.py": "", "thing-1.0.dist-info/METADATA": "Name: thing"})
    command = [sys.executable, TESTS / "benchmarks" / "stages.py", "1", "2", "3", "4", "--dry-run", "--minutes", "50"]
    command += ["--wheels", wheels, "--out", "home", "--work", "work"]
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    before = state_of(tmp_path / "work")
    assert {step["state"] for step in before["steps"].values()} == {"done"}
    assert list(before["steps"]) == stages.names_of("1234")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"stages.json", "records.tar.gz", "sets.tar"}

    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    after = state_of(tmp_path / "home")
    assert after["steps"].pop("sets")["calls"] == 1 + before["steps"].pop("sets")["calls"]
    assert after["steps"] == before["steps"]

    transfer.main([str(tmp_path / "home"), str(tmp_path / "joined")])
    records = [before["steps"][f"reproduction_{stage}"]["found"]["record"] for stage in "23"]
    for record in records:
        content = json.loads((tmp_path / "joined" / record).read_text())
        assert content["accuracy"]["raw"]["last"]["n"] == 2
    sets = [path for path in (tmp_path / "joined").rglob("*.safetensors") if path.name in transfer.SETS]
    assert len(sets) >= 2
    for path in sets:
        assert path.read_bytes() == (tmp_path / "work" / path.relative_to(tmp_path / "joined")).read_bytes()


def test_a_failing_stage_is_noted_and_the_next_goes_on(tmp_path, capsys):
    data = tmp_path / "half"
    data.mkdir()
    (data / "unpack.py").write_text("raise SystemExit('data_batch_4 is not there')")
    arguments = ["2", "3", "4", "--dry-run", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "home")]
    assert stages.main([*arguments, "--data", str(data)]) == 1
    steps = steps_of(tmp_path / "home")
    assert steps["images"]["state"] == steps["reproduction_2"]["state"] == steps["reproduction_3"]["state"] == "failed"
    assert "data_batch_4 is not there" in steps["images"]["reason"]
    assert "needs images" in steps["reproduction_2"]["reason"]
    assert steps["sets"]["state"] == "done"
    assert "data_batch_4 is not there" in capsys.readouterr().out
    with tarfile.open(tmp_path / "home" / "records.tar.gz") as tar:
        assert {"stages.json", "logs/images.txt"} <= set(tar.getnames())


def test_halves_of_the_images_come_one_by_one(tmp_path):
    for name, content in (("first", "unpack.py"), ("second", "part")):
        (tmp_path / name).mkdir()
        text = "import pathlib; assert (pathlib.Path(__file__).parent / 'part').is_file()"
        (tmp_path / name / content).write_text(text)
    arguments = ["--dry-run", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "home"), "--data"]
    stages.main(["4", *arguments, str(tmp_path / "first")])
    job = stage_steps.Job(tmp_path / "work", tmp_path / "home", True, None, state_of(tmp_path / "work"))
    with pytest.raises(stage_steps.StepError, match="AssertionError"):
        stage_steps.images(job, 100)
    stages.main(["4", *arguments, str(tmp_path / "second")])
    assert stage_steps.images(job, 100) == {"dataset": "cifar10"}


def test_a_step_ends_with_its_time_and_the_next_call_goes_on(job):
    def endless(job, seconds):
        stage_steps.call(job, "endless", ["-c", "import time; time.sleep(600)"], 0.5)

    stages.run_step(job, "step", endless, (), float("inf"))
    assert job.state["steps"]["step"]["state"] == "unfinished"
    stages.run_step(job, "step", lambda job, seconds: {"figure": 1}, (), float("inf"))
    assert {"state": "done", "calls": 2, "reason": None, "found": {"figure": 1}}.items() <= steps_of(job.work)[
        "step"
    ].items()
    stages.run_step(job, "late", lambda job, seconds: {}, (), 0.0)
    assert steps_of(job.out)["late"]["reason"] == "no time left in this call"


def test_errors_of_any_kind_are_noted(job):
    stages.run_step(job, "step", lambda job, seconds: {"a": 1 / 0}, (), float("inf"))
    assert steps_of(job.work)["step"]["reason"] == "ZeroDivisionError: division by zero"


def test_stages_share_the_minutes():
    assert stages.share(["3"], 7) == 7
    shares, left = [], 10.0
    for index in range(4):
        shares.append(stages.share("1234"[index:], left))
        left -= shares[-1]
    assert left == pytest.approx(0)
    assert shares[1] / shares[3] == pytest.approx(stages.MINUTES["2"] / stages.MINUTES["4"])


def timed_teachers(job, *, seconds, count, epochs):
    record = {"seconds": {"teachers": seconds}, "teachers": {"count": count, "epochs": epochs}}
    (job.work / "record.json").write_text(json.dumps(record))
    job.state["steps"]["reproduction_2"] = {"state": "done", "found": {"record": "record.json"}}


def test_teachers_are_as_many_as_half_of_the_minutes_allow(job, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    job.dry_run = False
    timed_teachers(job, seconds=150, count=100, epochs=3)  # half a second an epoch
    plan = stage_steps.plan_teachers(job, 600)
    assert plan["epochs"] == 21, "what a distillation at 10 images per class reads"
    assert plan["seconds_each"] == pytest.approx(10.5)
    assert plan["teachers"] == int(300 / 10.5)
    assert stage_steps.plan_teachers(job, 1e6)["teachers"] == 100, "as published"
    assert stage_steps.plan_teachers(job, 1)["teachers"] == 1


def test_without_a_timed_teacher_the_plan_says_so(job, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(stage_steps.StepError, match="no teacher was timed"):
        stage_steps.plan_teachers(job, 600)
    job.teachers = 7
    assert stage_steps.plan_teachers(job, 600) == {"teachers": 7}


def test_without_pytest_the_step_says_so(job, monkeypatch):
    monkeypatch.setattr(stage_steps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(stage_steps.StepError, match="pytest and pytest_timeout not installed"):
        stage_steps.gpu_tests(job, 10)


def test_a_working_folder_serves_one_kind_of_run(tmp_path):
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "home")]
    assert stages.main(["4", "--dry-run", *folders]) == 0
    with pytest.raises(SystemExit, match="is that of a dry run"):
        stages.main(["4", *folders])


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--minutes", "nan"], ["--teachers", "0"]])
def test_bad_numbers_are_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        stages.main(["4", "--dry-run", "--work", str(tmp_path / "work"), *wrong])
    assert f"{wrong[0]} must be" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_wheels_are_found_by_what_is_started(job, tmp_path):
    files = {"thing/__init__.py": "FIGURE = 3", "thing-1.0.data/purelib/other.py": "FIGURE = 4"}
    files |= {"thing-1.0.data/scripts/run.py": "", "thing-1.0.dist-info/METADATA": "Name: thing\nVersion: 1.0"}
    wheels = wheel_with(tmp_path / "wheels", files)
    assert transfer.unpack_wheels(wheels, job.work / "site") == ["thing-1.0-py3-none-any.whl"]
    assert transfer.unpack_wheels(wheels, job.work / "site") == []
    code = "import thing, other, importlib.metadata as m; print(thing.FIGURE, other.FIGURE, m.version('thing'))"
    assert stage_steps.call(job, "wheels", ["-c", code], 100).split() == ["3", "4", "1.0"]
    assert not list((job.work / "site").rglob("run.py"))


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("thing-1.0-cp27-cp27m-any.whl", {"thing.py": ""}, "not for this Python"),
        ("thing-1.0-py3-none-win_amd64.whl", {"thing.py": ""}, "and machine"),
        ("thing-1.0-py3-none-any.whl", {"../thing.py": ""}, "lies outside of it"),
    ],
)
def test_wheels_that_do_not_fit_are_refused(tmp_path, name, files, message):
    with pytest.raises(transfer.TransferError, match=message):
        transfer.unpack_wheels(wheel_with(tmp_path / "wheels", files, name), tmp_path / "site")


def test_broken_and_missing_wheels_are_refused(tmp_path):
    with pytest.raises(transfer.TransferError, match="no wheels"):
        transfer.unpack_wheels(tmp_path, tmp_path / "site")
    (tmp_path / "thing-1.0-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(transfer.TransferError, match="is broken"):
        transfer.unpack_wheels(tmp_path, tmp_path / "site")


def test_a_large_file_is_split_and_joined(tmp_path):
    content = os.urandom(2500)
    (tmp_path / "file").write_bytes(content)
    pieces = transfer.split(tmp_path / "file", 1000)
    assert [(piece.name, piece.stat().st_size) for piece in pieces] == [
        ("file.00", 1000),
        ("file.01", 1000),
        ("file.02", 500),
    ]
    assert not (tmp_path / "file").exists()
    assert transfer.join(tmp_path, "file", tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == content
    pieces[1].unlink()
    with pytest.raises(transfer.TransferError, match=r"file\.01 is missing"):
        transfer.join(tmp_path, "file", tmp_path / "joined")


def test_sets_share_their_whitening_and_come_back_byte_for_byte(tmp_path):
    whitening = Whitening.fit(torch.rand(60, 3, 4, 4))
    work, large = tmp_path / "work", 48 * 48 * 4
    names = ["runs/a/set.safetensors", "runs/b/best.safetensors"]
    for value, name in enumerate(names):
        whitened_set(work / name, whitening, value)
    whitened_set(work / "runs" / "teachers.safetensors", whitening, 2)
    sets = transfer.pack_sets(work, tmp_path / "sets.tar", room=10**6, large=large)
    assert sets == {"packed": names, "left_out": []}
    with tarfile.open(tmp_path / "sets.tar") as tar:
        assert [entry.size for entry in tar.getmembers()].count(large) == 1
    assert transfer.restore_sets(tmp_path / "sets.tar", tmp_path / "back") == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (work / name).read_bytes()
    little = transfer.pack_sets(work, tmp_path / "little.tar", room=70_000, large=large)
    assert little["left_out"] == names
