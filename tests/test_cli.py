"""The ``ftd`` command as people type it."""

import contextlib
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning_utilities.core import rank_zero as rank_zero_module

from ftd_lightning import DistillationDataModule, SyntheticSet, TrajectoryStore, __version__, cli, lightning_cli
from ftd_lightning.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Small enough to run in seconds; every value on the command line, as anyone would override it.
QUIET = ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
TEACHERS = ["--model.teachers=2", "--model.epochs=3", "--model.network_options={width: 4, depth: 1}"]
DISTIL = ["--trainer.max_steps=6", "--model.iterations_per_epoch=3", "--model.syn_steps=2", "--model.max_start_epoch=2"]
EVALUATE = ["--trainer.max_epochs=3", "--model.networks=2", "--model.network_options={width: 4, depth: 1}"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ftd"])
    return tmp_path


def fit(config: str, *arguments: str) -> lightning_cli.FTDCLI:
    return lightning_cli.run(["fit", "--config", config, *QUIET, *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that has to fail; give its exit code and its last line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    shown = capsys.readouterr().err.strip()
    assert "Traceback" not in shown
    return int(stop.value.code or 0), shown.splitlines()[-1]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with contextlib.suppress(SystemExit):  # of --print_config
        cli.main(arguments)
    return capsys.readouterr().out


def test_configs_are_found_by_name_and_merged_in_order(here: Path, capsys) -> None:
    (here / "mine.yaml").write_text("model: {init_args: {epochs: 4, teachers: 7}}\n")
    for shipped in ("digits/teacher_ftd", str(CONFIGS / "digits" / "teacher_ftd.yaml")):
        for option in (["--config", shipped], [f"--config={shipped}"], ["-c", shipped]):
            shown = printed(capsys, "fit", *option, "-c", "mine.yaml", "--model.rho=0.25", "--print_config")
            settings = yaml.safe_load(shown)
            values = settings["model"]["init_args"]
            assert [values[key] for key in ("lr", "epochs", "teachers", "rho")] == [0.05, 4, 7, 0.25]
            logger = settings["trainer"]["logger"]["init_args"]
            assert (logger["save_dir"], logger["name"]) == ("runs/digits", "teacher_ftd")
    (here / "digits").mkdir()
    (here / "digits" / "teacher_ftd.yaml").write_text("model: {class_path: FlatTeacher, init_args: {lr: 0.5}}\n")
    settings = yaml.safe_load(printed(capsys, "fit", "--config", "digits/teacher_ftd", "--print_config"))
    assert settings["model"]["init_args"]["lr"] == 0.5, "a path wins over a shipped name"
    assert settings["trainer"]["logger"]["init_args"]["save_dir"] == "runs"


def test_configs_lists_prints_and_copies(capsys) -> None:
    listed = [line.split()[0] for line in printed(capsys, "configs").splitlines() if line]
    assert set(listed) == {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.yaml")}
    found = printed(capsys, "configs", "cifar10/", "DATM", "distill").splitlines()
    assert [line.split()[0][-8:].split("_")[-1] for line in found] == ["ipc1", "ipc10", "ipc50", "ipc500", "ipc1000"]
    listed = printed(capsys, "configs", "cifar10", "datm", "ipc1").split()
    assert [word for word in listed if "/" in word] == ["cifar10/distill_datm_ipc1"]
    text = printed(capsys, "configs", "digits/teacher_mtt")
    assert text == (CONFIGS / "digits" / "teacher_mtt.yaml").read_text()
    copy = ("configs", "digits/teacher_mtt", "--to", "own/mine.yaml")
    cli.main(copy)
    assert Path("own/mine.yaml").read_text() == text
    assert refusal(capsys, *copy)[0] == 1
    assert refusal(capsys, *copy[:-1], "a\0b") == (1, "ftd: error: a path must not contain a null byte")
    Path("latin.yaml").write_bytes("# é\n".encode("latin-1"))
    code, line = refusal(capsys, "configs", "latin.yaml")
    assert (code, "UTF-8" in line) == (1, True)
    code, line = refusal(capsys, "configs", "digits/techer_mtt")
    assert (code, line.partition("; ")[2][:32]) == (1, "did you mean digits/teacher_mtt,")


def test_any_value_can_be_overridden(merged) -> None:
    arguments = ["--model.ipc", "3", "--data.zca", "false", "--trainer.max_steps", "7"]
    config = CONFIGS / "cifar10" / "distill_ftd_ipc10.yaml"
    shown = merged(config, *arguments, "--trainer.callbacks+=ModelSummary")
    assert (shown["model"]["init_args"]["ipc"], shown["data"]["init_args"]["zca"]) == (3, False)
    assert shown["trainer"]["max_steps"] == 7
    assert [one["class_path"].rsplit(".", 1)[-1] for one in shown["trainer"]["callbacks"]] == [
        "SyntheticEMA",
        "ModelSummary",
    ]


@pytest.mark.slow
def test_the_three_steps() -> None:
    """Teachers, distillation, evaluation: three ordinary fits, joined by two artefacts on disk."""
    saving = [fit("digits/teacher_ftd", *TEACHERS).trainer.checkpoint_callback]
    store = TrajectoryStore("runs/digits/teacher_ftd/trajectories")
    assert (len(store), store.epochs) == (2, 3)
    assert Path("runs/digits/teacher_ftd/config.yaml").is_file()
    saving.append(fit("digits/distill_ftd_ipc1", *DISTIL).trainer.checkpoint_callback)
    synthetic = SyntheticSet.load("runs/digits/distill_ftd_ipc1/set.safetensors")
    assert synthetic.images.shape == (10, 1, 8, 8)
    assert synthetic.ema_images is not None
    evaluation = fit("digits/evaluate", *EVALUATE)
    assert evaluation.model.results["lr"] == pytest.approx(float(synthetic.step_size))
    # With save_top_k 0 Lightning writes it when the fit is over, and a killed one would quietly begin anew.
    saving.append(evaluation.trainer.checkpoint_callback)
    assert [(callback.save_last, callback.save_top_k) for callback in saving] == [(True, 1)] * 3
    assert Path("runs/digits/evaluate/evaluation.json").is_file()
    # Finished runs can be extended: a distillation as long as its teachers are those that it began with.
    checkpoint = "runs/digits/distill_ftd_ipc1/checkpoints/last.ckpt"
    longer = [a for a in DISTIL if "max_steps" not in a]
    fit("digits/distill_ftd_ipc1", *longer, "--trainer.max_steps=9", f"--ckpt_path={checkpoint}")
    assert SyntheticSet.load("runs/digits/distill_ftd_ipc1/set.safetensors").metadata["iterations"] == 9
    more = [a for a in TEACHERS if "teachers" not in a]
    fit("digits/teacher_ftd", *more, "--model.teachers=3", "--ckpt_path=last")
    assert len(TrajectoryStore("runs/digits/teacher_ftd/trajectories")) == 3


@pytest.mark.slow
def test_a_fit_tells_its_outcome_and_is_done_once(capsys, caplog) -> None:
    caplog.set_level("INFO", logger=rank_zero_module.log.name)
    unmeasured = "--trainer.callbacks=[{class_path: EvaluateSynthetic, init_args: {every_n_epochs: 0}}]"
    distil, evaluate = [*DISTIL, unmeasured], [*EVALUATE, "--trainer.max_epochs=60", "--model.lr=0.1"]
    store, made = "runs/digits/teacher_ftd/trajectories", "runs/digits/distill_ftd_ipc1/set.safetensors"
    for config, arguments, outcome, follows in (
        ("teacher_ftd", TEACHERS, store, f"fit --config digits/distill_ftd_ipc1 --model.trajectories {store}"),
        ("distill_ftd_ipc1", distil, made, f"fit --config digits/evaluate --data.synthetic {made}"),
        ("evaluate", evaluate, "runs/digits/evaluate/evaluation.json", f"export {made} FOLDER"),
    ):
        cli.main(["fit", f"--config=digits/{config}", *QUIET, *arguments])
        (wrote,) = [line for line in caplog.messages if line.startswith("wrote")]
        assert wrote.startswith(f"wrote {outcome}: ")
        assert capsys.readouterr().out == f"next: ftd {follows}\n"
        assert not [line for line in caplog.messages if "Tip:" in line]
        caplog.clear()
        files = {path: path.stat().st_mtime_ns for path in Path().rglob("*.safetensors")}
        fit(f"digits/{config}", *arguments)
        assert capsys.readouterr().out == f"{wrote.replace('wrote', 'done already:')}\nnext: ftd {follows}\n"
        caplog.clear()
        assert files == {path: path.stat().st_mtime_ns for path in Path().rglob("*.safetensors")}
    assert SyntheticSet.load(made).metadata["loss"] > 0
    fit("digits/distill_ftd_ipc1", *distil, "--trainer.max_steps=7", "--ckpt_path=last")
    capsys.readouterr()
    fit("digits/evaluate", *evaluate)  # of another set
    assert capsys.readouterr().out == f"next: ftd {follows}\n"


def test_the_next_fit_after_a_backbone_takes_it_as_its_network(capsys) -> None:
    cli.main(["fit", "--config=digits/teacher_backbone", *QUIET, *TEACHERS])
    (follows,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    store = "runs/digits/teacher_backbone/trajectories"
    assert follows == f"next: ftd fit --config digits/distill_backbone_ipc1 --model.network {store}"


def test_a_result_is_that_of_trained_networks(capsys) -> None:
    arguments = [*EVALUATE, "--trainer.max_epochs=60", "--model.lr=0.1", "--data.synthetic=random", "--data.ipc=2"]
    results = fit("digits/evaluate", *arguments).model.results
    folder, config = Path("runs/digits/evaluate"), "digits/evaluate"
    files = {name: (folder / name).read_bytes() for name in ("evaluation.json", "evaluation.md", "config.yaml")}
    for verb in ("test", "predict"):
        code, line = refusal(capsys, verb, "--config", config, *QUIET, *arguments)
        assert code == 1
        assert line.startswith("ftd: error: this SyntheticEvaluation is not trained")
    cli.main(["predict", "--config", config, *QUIET, *arguments, "--ckpt_path=last"])
    assert capsys.readouterr().out.endswith("ftd: wrote runs/digits/evaluate/predictions.npy\n")
    assert {name: (folder / name).read_bytes() for name in files} == files
    cli.main(["test", "--config", config, *QUIET, *arguments, "--ckpt_path=last"])
    assert {name: (folder / name).read_bytes() for name in files} == files
    logits, images = np.load(folder / "predictions.npy"), DistillationDataModule(seed=0)
    images.setup()
    assert logits.shape == (len(images.test.labels), 10)
    assert (logits.argmax(1) == images.test.labels.numpy()).mean() > min(results["each"])


BAD = [
    ("--data.dataset=digit", "did you mean 'digits'?"),
    ("--data.dataset=cifar10 --data.download=false --data.max_per_class=null", "data.root"),
    ("--model.network=convent", "did you mean 'convnet'?"),
    ("--model.trajectories=nowhere", "nowhere: no teachers here"),
    ("--model.max_start_epoch=4", "reaches epoch 5, but 4 were recorded"),
    ("--model.ipc=100", "class 0 has 13 images to train on; this works: [13,13,"),
    ("--model.ipc=0", "ipc=0"),
    ('--model.network=convnet --model.network_options={"width":8}', "its teachers are convnet("),
    ("--data.zca=true", "teachers have transform"),
    ("--trainer.fast_dev_run=-3", "-3"),  # Lightning's own refusal
]


def test_bad_input_is_one_line_and_exit_code_1(trajectories: Path, capsys) -> None:
    data = ["--data.max_per_class=14", "--data.batch_size=32", f"--model.trajectories={trajectories}"]
    command = ["fit", "--config", "digits/distill_mtt_ipc1", "--model.max_start_epoch=3", *data, *QUIET]
    for arguments, words in BAD:
        code, line = refusal(capsys, *command, *arguments.split())
        assert (code, words in line) == (1, True), line
    assert not list(Path().rglob("*.safetensors"))
    code, line = refusal(capsys, "fit", "--config", "nowhere.yaml")
    assert (code, line) == (1, "ftd: error: nowhere.yaml: no such config; ftd configs lists those that ship")


MISSPELT = [
    ("--model.epoch=3", "FlatTeacher has no option 'epoch': did you mean epochs?"),
    ("--data.imagesize=8", "DistillationDataModule has no option 'imagesize': did you mean image_size?"),
    ("--trainer.maxsteps=3", "unknown argument '--trainer.maxsteps': did you mean --trainer.max_steps or "),
    ("--modle.epochs=3", "unknown argument '--modle.epochs': did you mean --model.epochs?"),
    ("--model=ftd_lightning.FlatTeachr", "ftd_lightning has no 'FlatTeachr': did you mean FlatTeacher?"),
    ("--trainer.callbacks+=SyntheticEM", "unknown class 'SyntheticEM': did you mean SyntheticEMA"),
    ("--model.epochs=three", "model.epochs: Expected a <class 'int'>. Got value: three; see ftd --help"),
    ("--trainer.precision=3", "trainer.precision: Expected a typing.Literal[64, 32, 16], "),
]


WRONG = [
    ("fit --config a.yaml", "unknown argument '--trainer.max_epoch': did you mean --trainer.max_e"),
    ("exprot", "unknown command 'exprot': did you mean export?"),
    ("export a b --emma", "unknown argument '--emma': did you mean --ema?"),
    ("compare --config=a.yaml --stop-after=x", "stop_after: Expected a <class 'float'>, not x; see ftd compare --help"),
    ("nas --out o --epoch 3", "unknown argument '--epoch': did you mean --epochs?"),
]


def test_wrong_words_end_with_exit_code_2(here: Path, capsys) -> None:
    (here / "a.yaml").write_text("trainer: {max_epoch: 3}\n")
    config = str(CONFIGS / "digits" / "teacher_mtt.yaml")
    parser = lightning_cli.run(["--config", config], start=False).parser
    capsys.readouterr()
    cases = [(parser.parse_args, ["--config", config, option], words) for option, words in MISSPELT]
    for run, arguments, words in [*cases, *((cli.main, line.split(), words) for line, words in WRONG)]:
        with pytest.raises(SystemExit) as stop:
            run(arguments)
        shown = capsys.readouterr().err
        assert (stop.value.code, shown.count("\n")) == (2, 1), shown
        assert shown.startswith(f"ftd: error: {words}"), shown


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Raised while an InputError is handled, an error is ours; raised *from* it, it is the parser's wrapping."""

    def broken(*args, **kwargs):
        try:
            raise InputError("refused")
        except InputError:
            raise KeyError("a bug")  # noqa: B904  the point

    def wrapping(*args, **kwargs):
        raise ValueError("of the parser") from InputError("epochs=0 must be at least 1")

    monkeypatch.setattr(lightning_cli, "FTDCLI", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["fit"])
    monkeypatch.setattr(lightning_cli, "FTDCLI", wrapping)
    assert refusal(capsys, "fit") == (1, "ftd: error: epochs=0 must be at least 1")
    with pytest.raises(ValueError, match="of the parser"):
        cli.main(["--debug", "fit"])


def test_help_of_every_command(capsys) -> None:
    shown = printed(capsys, "--help")
    assert all(f"  {name} " in shown for name in [*cli.VERBS, *cli.COMMANDS])
    for name in cli.COMMANDS:
        assert f"usage: ftd {name}" in printed(capsys, name, "--help")


def test_own_callbacks_loggers_and_plugins_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--trainer.callbacks=[{class_path: TQDMProgressBar}, {class_path: TrajectoryRecorder}]",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=elsewhere",
        "--trainer.plugins=[lightning.pytorch.plugins.io.TorchCheckpointIO]",
    ]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    trainer = fit("digits/teacher_mtt", *TEACHERS, *arguments).trainer
    assert type(trainer.progress_bar_callback).__name__ == "TQDMProgressBar"
    assert type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    assert list(Path("elsewhere").rglob("metrics.csv"))
    assert torch.backends.cudnn.benchmark  # unless told otherwise


@pytest.mark.slow
def test_save_dir_takes_the_place_of_the_folder_of_runs() -> None:
    fit("digits/teacher_mtt", *TEACHERS, "--trainer.logger.save_dir", "D")
    assert len(TrajectoryStore("D/teacher_mtt/trajectories")) == 2


@pytest.mark.slow
def test_both_programs_say_their_version() -> None:
    for command in ([sys.executable, "-m", "ftd_lightning"], [str(Path(sys.executable).parent / "ftd")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == f"ftd {__version__}", done.stderr


ALLOCATED = """
import os, torch
from ftd_lightning import cli, functional, optim

def on_heap():
    block = torch.empty(1 << 28, dtype=torch.uint8)
    heap = next(line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
    low, high = (int(end, 16) for end in heap.split("-"))
    return low <= block.data_ptr() < high

found = [on_heap()]
for exported in ("65536", ""):
    os.environ.pop("MALLOC_MMAP_MAX_", None)
    os.environ.update({"MALLOC_MMAP_MAX_": exported} if exported else {})
    cli.main(["--version"])
    found.append(on_heap())
print(found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_the_command_and_no_import_keeps_freed_memory() -> None:
    """Large blocks lie on the heap then, unless the user decides; by default each is mapped by itself."""
    run = subprocess.run([sys.executable, "-c", ALLOCATED], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[False, False, True]"
