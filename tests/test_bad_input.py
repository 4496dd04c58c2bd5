"""Bad input of every kind ends in one line that names it, and in exit code 1 (2 for usage)."""

import json
import os
from pathlib import Path

import pytest
import torch
from fits import record, rewrite, small_data

from ftd_lightning import SyntheticSet, TrajectoryMatching, cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
QUIET = ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu", "--data.max_per_class=14"]
QUIET += ["--data.batch_size=32"]
NETWORK = "--model.network_options={width: 4, depth: 1}"
EVALUATE = ["fit", "--config", str(CONFIGS / "evaluate.yaml"), NETWORK, *QUIET]
DISTILL = ["fit", "--config", str(CONFIGS / "distill_mtt_ipc1.yaml"), *QUIET, "--model.max_start_epoch=1"]
TEACH = ["fit", "--config", str(CONFIGS / "teacher_mtt.yaml"), NETWORK, *QUIET]
TEACH += ["--model.teachers=1", "--model.epochs=1"]
NAN = float("nan")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good set and a good store, from which bad ones are made."""
    folder = tmp_path_factory.mktemp("shelf")
    record(folder)
    data = small_data(synthetic="random")
    data.setup()
    real = data.synthetic_set
    SyntheticSet(
        real.images,
        real.labels,
        torch.tensor(0.1),
        class_names=data.class_names,
        transform=data.transform,
        metadata={**data.describe(), "method": "mtt", "settings": {"syn_steps": 2, "expert_epochs": 1}},
    ).save(folder / "set.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensor(name: str, value):
    """Give a change of one tensor: a function of the old one, or a new one."""
    return lambda tensors, metadata: tensors.update({name: value(tensors[name]) if callable(value) else value})


def without(name: str):
    """Give a change that removes a tensor or an entry of the metadata."""

    def change(tensors, metadata):
        del (tensors if name in tensors else metadata)[name]

    return change


def meta(**values):
    """Give a change of entries of the metadata."""
    return lambda tensors, metadata: metadata.update(values)


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that has to be refused; return its line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1, (arguments, lines[-1:])
    assert lines[-1].startswith("ftd: error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


ZCA = {"kind": "zca", "eps": 0.1, "fitted_on": "x"}
SETS = [
    (tensor("images", lambda t: t.half()), "images is torch.float16"),
    (tensor("images", lambda t: t[:, 0]), "images has shape (10, 8, 8)"),
    (tensor("images", lambda t: t * NAN), "images has values that are not finite"),
    (without("images"), "images"),
    (tensor("ema_images", torch.zeros(4, 1, 8, 8)), "ema_images has shape (4, 1, 8, 8)"),
    (tensor("labels", lambda t: t[:4]), "labels are torch.int64 (4,)"),
    (tensor("labels", lambda t: t - 1), "labels run from -1 to 8"),
    (tensor("labels", lambda t: t.float()), "labels are torch.float32 (10,)"),
    (tensor("labels", torch.full((10, 10), 0.2)), "probabilities"),
    (meta(label_kind="rank"), "label_kind is 'rank'"),
    (tensor("step_size", torch.tensor(0.0)), "step_size is 0"),
    (tensor("step_size", torch.zeros(0)), "step_size is torch.float32 (0,)"),
    (without("class_names"), "class_names"),
    (meta(class_names=3), "class_names is 3"),
    (without("transform"), "transform"),
    (meta(transform={"kind": "standardization", "mean": [0, 0, 0], "std": [1, 1, 1]}), "transform has 3 channels"),
    (meta(transform={"kind": "standardization", "mean": [0.0], "std": [0.0]}), "transform.std has a 0"),
    (meta(transform={"kind": "pca"}), "'pca'"),
    (meta(transform=ZCA), "transform.mean is missing"),
    (
        lambda t, m: (
            t.update({"transform.mean": torch.zeros(1, 4), "transform.inverse": torch.eye(4)})
            or {**m, "transform": ZCA}
        ),
        "transform is of 4 values per image",
    ),
    (meta(format=2), "of a newer"),
    (lambda t, m: "[1, 2]", "mapping"),
    (lambda t, m: "{", "not a safetensors file"),
    (meta(settings=[1]), "settings is [1]"),
    (meta(iterations=-3), "iterations is -3"),
    (meta(method=7), "method is 7"),
]


def test_sets(shelf: Path, here: Path, capsys, refused) -> None:
    """The command and the call give the same line, and nothing is written."""
    for number, (change, words) in enumerate(SETS):
        name = f"bad{number}.safetensors"
        rewrite(shelf / "set.safetensors", here / name, change)
        for command in (["info", name], ["export", name, "out"]):
            line = one_line(capsys, *command)
            assert name in line
            assert words in line
        with refused(name, words):
            SyntheticSet.load(name)
    line = one_line(capsys, *EVALUATE, "--data.synthetic=bad0.safetensors")
    assert SETS[0][1] in line
    assert not (here / "out").exists()
    assert not list(here.rglob("*.ckpt"))


FILES = {
    "empty": lambda path, good: path.write_bytes(b""),
    "half": lambda path, good: path.write_bytes(good[: len(good) // 2]),
    "terabytes": lambda path, good: path.write_bytes((1 << 60).to_bytes(8, "little") + good[8:]),
    "damaged": lambda path, good: path.write_bytes(good[:-3] + bytes([good[-3] ^ 16]) + good[-2:]),
    "folder": lambda path, good: path.mkdir(),
    "nothing": lambda path, good: None,
}


def test_files_that_are_not_sets(shelf: Path, here: Path, capsys) -> None:
    good = (shelf / "set.safetensors").read_bytes()
    for kind, write in FILES.items():
        write(here / f"{kind}.safetensors", good)
        for command in (["info", f"{kind}.safetensors"], ["export", f"{kind}.safetensors", "out"]):
            assert f"{kind}.safetensors" in one_line(capsys, *command)


STORES = [
    (meta(epochs="4"), "epochs is '4'"),
    (meta(epochs=9), "does not hold the epochs"),
    (tensor("epoch_0002", lambda t: t[:100]), "epoch_0002 is"),
    (lambda t, m: t.update({name: value * NAN for name, value in t.items()}), "not finite"),
    (without("network"), "network"),
    (meta(format=7), "of a newer"),
]


@pytest.mark.slow
def test_stores(shelf: Path, here: Path, capsys) -> None:
    for number, (change, words) in enumerate(STORES):
        store = here / f"store{number}"
        store.mkdir()
        for name in ("teacher_0000.safetensors", "teacher_0001.safetensors"):
            rewrite(shelf / "trajectories" / name, store / name, change)
        line = one_line(capsys, *DISTILL, f"--model.trajectories={store}")
        assert words in line
        assert store.name in line
    assert not list(here.rglob("set.safetensors"))


def test_configs(here: Path, capsys) -> None:
    for content, words in (
        (b"model: \x80\x81\n", "UTF-8"),
        (b"model: {class_path: [\n", "YAML"),
        (b"- model\n", "config"),
    ):
        (here / "bad.yaml").write_bytes(content)
        line = one_line(capsys, "fit", "-c", "bad.yaml")
        assert "bad.yaml" in line
        assert words in line


@pytest.mark.slow
def test_checkpoints(here: Path, capsys) -> None:
    (here / "folder.ckpt").mkdir()
    torch.save({"a": 1}, "other.ckpt")
    (here / "half.ckpt").write_bytes((here / "other.ckpt").read_bytes()[:200])
    for path, words in (
        ("gone.ckpt", "no such checkpoint"),
        ("folder.ckpt", "no such checkpoint"),
        ("other.ckpt", "not a checkpoint of Lightning"),
        ("half.ckpt", "cannot be read as a checkpoint"),
    ):
        line = one_line(capsys, *TEACH, f"--ckpt_path={path}")
        assert path in line
        assert words in line
    assert not list(here.glob("runs/**/*.ckpt"))


VALUES = [
    (TEACH, "model.lr", ".nan", "above 0 and finite"),
    (TEACH, "model.network_options", "{width: 4, dept: 1}", "dept"),
    (TEACH, "trainer.precision", "bf16-true", "bf16-true"),
    (TEACH, "trainer.accumulate_grad_batches", 2, "accumulat"),
    (TEACH, "trainer.gradient_clip_val", 1, "unclipped"),
    (TEACH, "trainer.accelerator", "gpu", "gpu"),
    (DISTILL, "trainer.max_steps", -5, "max_steps"),
    (DISTILL, "model.augment", "flop", "flop"),
    (EVALUATE, "data.synthetic", "gone.safetensors", "gone.safetensors: no such file"),
]


@pytest.mark.slow
def test_values_are_refused_before_anything_is_trained(shelf: Path, here: Path, capsys) -> None:
    for command, option, value, words in VALUES:
        store = [f"--model.trajectories={shelf / 'trajectories'}"] * (command is DISTILL)
        assert words in one_line(capsys, *command, *store, f"--{option}={value}"), option
    for verb in ("validate", "predict"):
        line = one_line(capsys, verb, *DISTILL[1:], "--model.trajectories=gone")
        assert f"TrajectoryMatching has no {verb}" in line
    assert not list(here.rglob("*.ckpt"))
    assert not list(here.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_the_checkpoint_of_another_module_or_of_other_settings(here: Path, capsys) -> None:
    cli.main([*TEACH])
    path = "runs/digits/teacher_mtt/checkpoints/last.ckpt"
    line = one_line(capsys, *EVALUATE, "--data.synthetic=random", f"--ckpt_path={path}")
    assert "is a checkpoint of a FlatTeacher" in line
    assert "SyntheticEvaluation" in line
    torch.save({**torch.load(path, weights_only=True), "optimizer_states": [{}]}, "odd.ckpt")
    assert "the checkpoint does not fit these settings" in one_line(capsys, *TEACH, "--ckpt_path=odd.ckpt")
    for given in ("last", path):
        line = one_line(capsys, *TEACH, "--model.lr=0.5", f"--ckpt_path={given}")
        assert "lr=0.5, but the checkpoint was made with 0.05" in line


def test_what_the_operating_system_refuses(shelf: Path, here: Path, capsys) -> None:
    """Permissions do not bind every user, so other refusals stand for a read-only or full disk."""
    (here / "file").write_text("")
    os.symlink("loop", "loop")
    good = str(shelf / "set.safetensors")
    for target, named in (("file/sub", "file"), ("loop", "loop"), ("/proc/x", "/proc/x: ")):
        assert named in one_line(capsys, "export", good, target)
    assert "file" in one_line(capsys, *TEACH, "--trainer.logger.init_args.save_dir=file")
    (here / "runs" / "digits" / "evaluate" / "evaluation.json").mkdir(parents=True)
    line = one_line(capsys, *EVALUATE, "--trainer.max_epochs=2", "--data.synthetic=random")
    assert "evaluation.json: " in line


@pytest.mark.slow
def test_processes(shelf: Path, here: Path, command) -> None:
    """Exit codes and streams of the program; a terminal that is not UTF-8."""
    for arguments, code in ((["info", "gone.safetensors"], 1), (["fit", "-c", "gone.yaml"], 1), (["exprot"], 2)):
        done = command(*arguments)
        assert done.returncode == code, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("ftd: error: ")
        assert "Traceback" not in done.stderr
    rewrite(shelf / "set.safetensors", here / "named.safetensors", meta(class_names=["grün ± x", *"abcdefghi"]))
    done = command("info", "named.safetensors", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "gr?n ? x" in done.stdout


def test_json_of_info_holds_no_nan(shelf: Path, here: Path, capsys) -> None:
    rewrite(shelf / "set.safetensors", here / "odd.safetensors", meta(note=NAN))
    cli.main(["info", "odd.safetensors", "--json"])
    shown = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert shown["metadata"]["note"] is None


def test_tensors_in_memory(shelf: Path, here: Path, refused) -> None:
    for real, words in (
        ((torch.zeros(32, 1, 8, 8), torch.zeros(5, dtype=torch.int64)), "labels are torch.int64 (5,)"),
        ((torch.zeros(2, 1, 8, 8), [0, 1]), "not a pair of tensors"),
    ):
        with refused("real: ", words):
            TrajectoryMatching(str(shelf / "trajectories"), real=real)
    with refused("set.safetensors: not written: ", "labels are"):
        SyntheticSet(torch.zeros(10, 1, 8, 8), torch.arange(4)).save("set.safetensors")
    assert not (here / "set.safetensors").exists()
