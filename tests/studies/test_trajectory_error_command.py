"""``ftd trajectory-error`` as people type it: files, table, refusals."""

import json
from pathlib import Path

import pytest
import torch
from fits import distil, record
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftd_lightning import SyntheticSet, cli
from ftd_lightning.callbacks import SyntheticEMA, SyntheticSetWriter
from ftd_lightning.studies.trajectory_error import QUANTITIES, TAGS


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, trajectories: Path) -> Path:
    """A set distilled from the teachers of ``trajectories``: n 3, m 1, with EMA images."""
    folder = tmp_path_factory.mktemp("set")
    writer = SyntheticSetWriter(str(folder / "set.safetensors"))
    distil(folder, trajectories, steps=5, callbacks=[SyntheticEMA(0.5), writer])
    return writer.path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> None:
    cli.main(["trajectory-error", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that has to fail with exit code 1 and write nothing; give its line."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("ftd: error: ")]
    assert len(lines) == 1
    assert shown.err.strip().splitlines()[-1] == lines[0]
    assert not shown.out
    return lines[0]


def test_curves_are_written_and_shown(here: Path, file: Path, trajectories: Path, capsys) -> None:
    run(file, trajectories, "--teachers", 2, "--output", "out")
    curve = json.loads(Path("out/curve.json").read_text())
    assert (curve["kind"], curve["method"], curve["on"], curve["ema"]) == ("trajectory_error", "mtt", "test", False)
    assert (curve["syn_steps"], curve["expert_epochs"], curve["epochs"]) == (3, 1, [1, 2, 3, 4])
    assert [each["teacher"] for each in curve["each"]] == [0, 1]
    for name in QUANTITIES:
        assert len(curve["mean"][name]) == len(curve["std"][name]) == 4
        assert curve["mean"][name][1] == pytest.approx(sum(each[name][1] for each in curve["each"]) / 2)
    assert curve["set"]["iterations"] == 5
    assert curve["teachers"]["parameters"] > 0
    assert str(trajectories) not in Path("out/curve.json").read_text()

    with Image.open("out/curve.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 10, "not a blank sheet"

    board = EventAccumulator("out").Reload()
    assert set(board.Tags()["scalars"]) == {f"trajectory_error/{tag}" for tag in TAGS.values()}
    shown = board.Scalars("trajectory_error/norm/epsilon_accumulated")
    assert [event.step for event in shown] == curve["epochs"]
    assert [event.value for event in shown] == pytest.approx(curve["mean"]["epsilon"])

    printed = capsys.readouterr().out
    last = next(line for line in printed.splitlines() if line.split()[:1] == ["4"])
    assert f"{curve['mean']['evaluation'][-1]:.4f}" in last
    assert f"{curve['mean']['epsilon'][-1]:.3f}" in last
    assert "curve.json" in printed
    assert not list(here.rglob(".*.part"))


def test_options_change_what_is_measured(here: Path, file: Path, trajectories: Path) -> None:
    variants = {
        "plain": [],
        "train": ["--on", "train"],
        "ema": ["--ema"],
        "longer": ["--syn-steps", 6, "--expert-epochs", 2],
        "named": ["--dataset", "digits"],
    }
    curves = {}
    for name, options in variants.items():
        run(file, trajectories, "--output", name, *options)
        curves[name] = json.loads(Path(name, "curve.json").read_text())
    plain = curves["plain"]["mean"]
    assert curves["named"]["mean"] == plain
    assert curves["train"]["mean"]["epsilon"] == plain["epsilon"], "weights do not know what they are measured on"
    assert curves["train"]["mean"]["teacher_loss"] != plain["teacher_loss"]
    assert curves["ema"]["mean"]["epsilon"] != plain["epsilon"]
    assert curves["longer"]["epochs"] == [2, 4]


def test_a_second_run_takes_the_place_of_the_first(here: Path, file: Path, trajectories: Path) -> None:
    """TensorBoard too shows one curve, and the set's folder is where it goes by default."""
    copy = here / "set.safetensors"
    copy.write_bytes(file.read_bytes())
    run(copy, trajectories)
    run(copy, trajectories, "--expert-epochs", 2, "--against", "trajectory_error/curve.json")
    assert json.loads(Path("trajectory_error/curve.json").read_text())["epochs"] == [2, 4]
    board = EventAccumulator("trajectory_error").Reload()
    assert [event.step for event in board.Scalars("trajectory_error/loss/teacher")] == [2, 4]


def test_bad_input_is_one_line_and_exit_code_1(here: Path, file: Path, trajectories: Path, capsys) -> None:
    cases = [
        (["nowhere.safetensors", trajectories], ["nowhere.safetensors: no such file"]),
        ([file, "nowhere"], ["nowhere: no teachers here"]),
        ([trajectories / "teacher_0000.safetensors", trajectories], ["a synthetic set is needed here"]),
        ([file, trajectories, "--teachers", 3], ["3 teachers are asked for, 2 are recorded"]),
        ([file, trajectories, "--teachers", 0], ["teachers=0 must be at least 1"]),
        ([file, trajectories, "--expert-epochs", 5], ["expert_epochs=5", "4 epochs"]),
        ([file, trajectories, "--dataset", "digit"], ["unknown data set 'digit'", "did you mean 'digits'"]),
        ([file, trajectories, "--against", file], ["a curve.json of ftd trajectory-error is needed"]),
        ([file, trajectories, "--output", file], ["is no folder"]),
    ]
    for arguments, words in cases:
        line = refusal(capsys, *arguments)
        for word in words:
            assert word in line
    assert not list(here.iterdir())


def test_a_set_and_a_store_that_do_not_fit_are_refused(here: Path, file: Path, trajectories: Path, capsys) -> None:
    synthetic = SyntheticSet.load(file)
    other = here / "other.safetensors"
    for key, value in (
        ("network", {**synthetic.metadata["network"], "options": {"width": 8, "depth": 1}}),
        ("dataset", {**synthetic.metadata["dataset"], "val_fraction": 0.5}),
    ):
        SyntheticSet(**{**vars(synthetic), "metadata": {**synthetic.metadata, key: value}}).save(other)
        assert f"its teachers have {key}" in refusal(capsys, other, trajectories)
    wider = record(here / "wider", network_options={"width": 8, "depth": 1})
    assert "its teachers have network" in refusal(capsys, file, wider)
    SyntheticSet(**{**vars(synthetic), "step_size": torch.tensor(1e30)}).save(other)
    assert "weights are not finite" in refusal(capsys, other, trajectories)
    assert not list(here.rglob("curve*"))


def test_wrong_words_end_with_exit_code_2(here: Path, file: Path, trajectories: Path, capsys) -> None:
    for arguments in ([], [file], [file, trajectories, "--on", "moon"], [file, trajectories, "--epoch", 3]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        assert "usage: ftd trajectory-error" in capsys.readouterr().err
