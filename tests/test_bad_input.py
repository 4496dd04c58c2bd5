"""A hundred kinds of bad input: each ends in one line that names what is wrong, and in exit code 1 (2 for usage)."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import record, small_data
from safetensors.torch import load_file, save_file

from ftd_lightning import SyntheticSet, TrajectoryMatching, cli
from ftd_lightning.files.safetensors_io import KEY

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "digits"
QUIET = ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu", "--data.max_per_class=14"]
QUIET += ["--data.batch_size=32"]
NETWORK = "--model.network_options={width: 4, depth: 1}"
NAN, INF = float("nan"), float("inf")


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


def parts(path: Path) -> tuple[dict, dict]:
    """Read tensors and metadata, without the checksums: as another program writes, or version 0.1 did."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[KEY])
    return load_file(path), {key: value for key, value in metadata.items() if key not in ("checksum", "checksums")}


def rewrite(path: Path, target: Path, change) -> None:
    """Write a changed copy; change(tensors, metadata) may return other metadata, or its JSON text."""
    tensors, metadata = parts(path)
    metadata = change(tensors, metadata) or metadata
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata={KEY: text})


def tensor(name: str, value):
    def change(tensors, metadata):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def meta(**values):
    def change(tensors, metadata):
        for key, value in values.items():
            if value is ...:
                del metadata[key]
            else:
                metadata[key] = value(metadata[key]) if callable(value) else value

    return change


def spoilt(index, value):
    def change(old):
        new = old.clone()
        new[index] = value
        return new

    return change


SOFT = torch.full((10, 10), 0.1)
ZCA = {"kind": "zca", "eps": 0.1, "fitted_on": "x"}
SETS = {
    "images of float16": (tensor("images", lambda t: t.half()), "images is torch.float16, float32 is needed"),
    "images of float64": (tensor("images", lambda t: t.double()), "images is torch.float64"),
    "images of int8": (tensor("images", lambda t: t.to(torch.int8)), "images is torch.int8"),
    "images without channels": (tensor("images", lambda t: t[:, 0]), "images has shape (10, 8, 8)"),
    "no images": (tensor("images", lambda t: t[:0]), "images has shape (0, 1, 8, 8)"),
    "NaN in an image": (tensor("images", spoilt((3, 0, 1, 1), NAN)), "images has values that are not finite"),
    "infinity in an image": (tensor("images", spoilt((3, 0, 1, 1), INF)), "images has values that are not finite"),
    "images missing": (tensor("images", None), "has no tensor 'images'"),
    "averages of another shape": (
        lambda t, m: t.update(ema_images=t["images"][:4].clone()),
        "ema_images has shape (4, 1, 8, 8), (10, 1, 8, 8) is needed",
    ),
    "NaN in an average": (lambda t, m: t.update(ema_images=t["images"] * NAN), "ema_images has values that are not"),
    "labels missing": (tensor("labels", None), "has no tensor 'labels'"),
    "4 labels for 10 images": (tensor("labels", lambda t: t[:4]), "labels are 4, but there are 10 images"),
    "negative labels": (tensor("labels", spoilt(0, -1)), "labels run from -1 to 9"),
    "labels above the classes": (tensor("labels", spoilt(0, 11)), "labels run from 1 to 11, classes from 0 to 9"),
    "float labels": (tensor("labels", lambda t: t.float()), "labels are torch.float32 (10,), classes are int64"),
    "labels of three dimensions": (tensor("labels", torch.zeros(10, 1, 10)), "labels are torch.float32 (10, 1, 10)"),
    "soft labels of other classes": (tensor("labels", torch.full((10, 4), 0.25)), "4 columns, there are 10 classes"),
    "negative soft labels": (tensor("labels", SOFT - torch.eye(10)), "labels are no probabilities"),
    "soft labels of another sum": (tensor("labels", SOFT * 2), "labels are no probabilities"),
    "NaN in soft labels": (tensor("labels", SOFT * NAN), "labels has values that are not finite"),
    "an unknown kind of label": (meta(label_kind="rank"), "label_kind is 'rank'"),
    "class labels that call themselves targets": (meta(label_kind="target"), "a target is float32"),
    "an empty step size": (tensor("step_size", torch.zeros(0)), "step_size is torch.float32 (0,)"),
    "a step size of zero": (tensor("step_size", torch.tensor(0.0)), "step_size is 0, it must be above 0"),
    "a negative step size": (tensor("step_size", torch.tensor(-0.1)), "step_size is -0.1"),
    "a NaN step size": (tensor("step_size", torch.tensor(NAN)), "step_size has values that are not finite"),
    "an infinite step size": (tensor("step_size", torch.tensor(INF)), "step_size has values that are not finite"),
    "a step size of integers": (tensor("step_size", torch.tensor(1)), "step_size is torch.int64"),
    "a negative step size among several": (tensor("step_size", torch.tensor([0.1, -1.0])), "step_size is -1"),
    "no class names": (meta(class_names=...), "class_names is missing from the metadata"),
    "a number for class names": (meta(class_names=3), "class_names is 3, a list of names is needed"),
    "a number among class names": (meta(class_names=lambda n: [*n[:9], 9]), "a list of names is needed"),
    "no transform": (meta(transform=...), "transform is missing from the metadata"),
    "text for a transform": (meta(transform="zca"), "transform is 'zca', a mapping is needed"),
    "a transform of other channels": (
        meta(transform={"kind": "standardization", "mean": [0, 0, 0], "std": [1, 1, 1]}),
        "transform has 3 channels, the images have 1",
    ),
    "a transform without mean": (meta(transform={"kind": "standardization", "std": [1.0]}), "transform.mean is None"),
    "a standard deviation of 0": (
        meta(transform={"kind": "standardization", "mean": [0.0], "std": [0.0]}),
        "transform.std has a 0",
    ),
    "a NaN mean": (meta(transform={"kind": "standardization", "mean": [NAN], "std": [1.0]}), "transform.mean is [nan]"),
    "means for other channels than deviations": (
        meta(transform={"kind": "standardization", "mean": [0.0, 0.0], "std": [1.0]}),
        "another number of means",
    ),
    "a transform of a later version": (meta(transform={"kind": "pca"}), "unknown image transform 'pca'"),
    "a whitening without tensors": (meta(transform=ZCA), "transform.mean is missing"),
    "a whitening of other images": (
        lambda t, m: (
            t.update({"transform.mean": torch.zeros(1, 4), "transform.inverse": torch.eye(4)})
            or {**m, "transform": ZCA}
        ),
        "transform is of 4 values per image, the images have 64",
    ),
    "a whitening that is not square": (
        lambda t, m: (
            t.update({"transform.mean": torch.zeros(1, 64), "transform.inverse": torch.zeros(64, 4)})
            or {**m, "transform": ZCA}
        ),
        "transform.inverse has shape (64, 4), (64, 64) is needed",
    ),
    "a negative eps": (meta(transform={**ZCA, "eps": -1}), "transform.eps is -1"),
    "a newer format": (meta(format=2), "has format 2, written by a newer version"),
    "text for a format": (meta(format="1"), "format is '1'"),
    "metadata that is a list": (lambda t, m: "[1, 2]", "its metadata is no mapping"),
    "metadata that is null": (lambda t, m: "null", "its metadata is no mapping"),
    "metadata that is a number": (lambda t, m: "3", "its metadata is no mapping"),
    "metadata that is text": (lambda t, m: '"set"', "its metadata is no mapping"),
    "metadata that is no JSON": (lambda t, m: "{", "truncated, or not a safetensors file"),
    "metadata nested too deeply": (lambda t, m: "[" * 100_000 + "]" * 100_000, "recursion"),
    "a list for a kind": (meta(kind=["synthetic_set"]), "of another program"),
    "settings that are no mapping": (meta(settings=[1]), "settings is [1], a mapping is needed"),
    "a network without name": (meta(network={"width": 3}), "network is {'width': 3}"),
    "iterations that are no count": (meta(iterations=-3), "iterations is -3, a count is needed"),
    "scores that are no mapping": (meta(scores=[0.5]), "scores is [0.5]"),
    "a number for a method": (meta(method=7), "method is 7, text is needed"),
}


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """Run a command that has to be refused; return its line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code, lines[-1:]
    if code == 1:
        assert lines[-1].startswith("ftd: error: ")
        assert "Traceback" not in "".join(lines)
    return lines[-1] if code == 1 else "\n".join(lines)


@pytest.mark.parametrize("kind", SETS)
def test_sets(kind: str, shelf: Path, here: Path, capsys, refused) -> None:
    """The command and the call give the same line."""
    change, words = SETS[kind]
    rewrite(shelf / "set.safetensors", here / "bad.safetensors", change)
    for command in (["info", "bad.safetensors"], ["export", "bad.safetensors", "out"]):
        line = one_line(capsys, *command)
        assert "bad.safetensors" in line
        if words != "of another program" or command[0] == "info":
            assert words in line
    if words != "of another program":
        with refused("bad.safetensors", words):
            SyntheticSet.load("bad.safetensors")
    assert not (here / "out").exists()


FIT = ["fit", "--config", str(CONFIGS / "evaluate.yaml"), NETWORK, *QUIET, "--trainer.max_epochs=1"]


@pytest.mark.parametrize(
    "kind", ["images of float16", "4 labels for 10 images", "a step size of zero", "a newer format"]
)
def test_sets_are_refused_before_a_fit(kind: str, shelf: Path, here: Path, capsys) -> None:
    change, words = SETS[kind]
    rewrite(shelf / "set.safetensors", here / "bad.safetensors", change)
    assert words in one_line(capsys, *FIT, "--data.synthetic=bad.safetensors")
    assert not (here / "runs").exists() or not list((here / "runs").rglob("*.ckpt"))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


FILES = {
    "text": lambda path, good: path.write_text("not a set"),
    "an empty file": lambda path, good: path.write_bytes(b""),
    "half a file": lambda path, good: path.write_bytes(good[: len(good) // 2]),
    "a pickle": lambda path, good: path.write_bytes(pickle.dumps(Bomb())),
    "a header of terabytes": lambda path, good: path.write_bytes((1 << 60).to_bytes(8, "little") + good[8:]),
    "a flipped bit in a tensor": lambda path, good: path.write_bytes(good[:-3] + bytes([good[-3] ^ 16]) + good[-2:]),
    "a flipped bit in the metadata": lambda path, good: path.write_bytes(good.replace(b"mtt", b"mtu")),
    "a folder": lambda path, good: path.mkdir(),
    "nothing": lambda path, good: None,
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_sets(kind: str, shelf: Path, here: Path, capsys) -> None:
    FILES[kind](here / "bad.safetensors", (shelf / "set.safetensors").read_bytes())
    for command in (["info", "bad.safetensors"], ["export", "bad.safetensors", "out"]):
        assert "bad.safetensors" in one_line(capsys, *command)
    assert not (here / "exploded").exists()


STORES = {
    "text for the epochs": (meta(epochs="4"), "epochs is '4', a count is needed"),
    "more epochs than weights": (meta(epochs=9), "does not hold the epochs that it names"),
    "weights of integers": (
        lambda t, m: t.update({name: value.int() for name, value in t.items()}),
        "epoch_0000 is torch.int32",
    ),
    "an epoch of another length": (tensor("epoch_0002", lambda t: t[:100]), "epoch_0002 is torch.float32 (100,)"),
    "an epoch missing": (tensor("epoch_0002", None), "does not hold the epochs that it names"),
    "NaN in every epoch": (
        lambda t, m: t.update({name: spoilt(0, NAN)(value) for name, value in t.items()}),
        "has values that are not finite",
    ),
    "weights of another network": (
        lambda t, m: t.update({name: value[:500] for name, value in t.items()}),
        "its teachers have 500 weights",
    ),
    "text for the network": (meta(network="convnet"), "network is 'convnet'"),
    "no network": (meta(network=...), "network is missing from the metadata"),
    "a NaN rho": (meta(rho=NAN), "rho is nan"),
    "metadata that is a list": (lambda t, m: "[]", "its metadata is no mapping"),
    "a newer format": (meta(format=7), "written by a newer version"),
    "accuracies above 1": (meta(accuracies=[3.0]), "accuracies is [3.0]"),
}
DISTIL = ["fit", "--config", str(CONFIGS / "distill_mtt_ipc1.yaml"), *QUIET, "--model.max_start_epoch=1"]
DISTIL += ["--model.syn_steps=1", "--trainer.max_steps=2", "--model.iterations_per_epoch=2"]


@pytest.mark.parametrize("kind", STORES)
def test_stores(kind: str, shelf: Path, here: Path, capsys) -> None:
    change, words = STORES[kind]
    (here / "store").mkdir()
    for name in ("teacher_0000.safetensors", "teacher_0001.safetensors"):
        rewrite(shelf / "trajectories" / name, here / "store" / name, change)
    line = one_line(capsys, *DISTIL, "--model.trajectories=store")
    assert words in line
    assert "store" in line
    assert not list(here.rglob("set.safetensors"))


def yaml_file(text: str | bytes):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


MODEL = "model: {class_path: FlatTeacher}\n"
YAMLS = {
    "bytes": (yaml_file(b"model: \x80\x81\n"), "is not UTF-8"),
    "latin-1": (yaml_file("model: é\n".encode("latin-1")), "is not UTF-8"),
    "UTF-16": (yaml_file("model: x\n".encode("utf-16")), "is not UTF-8"),
    "a null byte": (yaml_file("model: \0\n"), "is no plain YAML"),
    "a value that contains itself": (yaml_file("model: &a [*a]\n"), "is no plain YAML"),
    "a mapping that contains itself": (yaml_file("&a\nmodel: *a\n"), "is no plain YAML"),
    "a Python object": (yaml_file("model: !!python/object/apply:os.system ['touch exploded']\n"), "is no plain YAML"),
    "syntax": (yaml_file("model: {class_path: [\n"), "is no plain YAML"),
    "a tab": (yaml_file("model:\n\tclass_path: x\n"), "is no plain YAML"),
    "a list": (yaml_file("- model\n"), "is no config"),
    "text": (yaml_file("teachers\n"), "is no config"),
    "a base, which 0.1 read": (yaml_file("base: gone.yaml\n" + MODEL), "base is no longer read"),
}


@pytest.mark.parametrize("kind", YAMLS)
@pytest.mark.parametrize("option", ["--config", "-c"])
def test_configs(kind: str, option: str, here: Path, capsys) -> None:
    write, words = YAMLS[kind]
    write(here / "bad.yaml")
    line = one_line(capsys, "fit", option, "bad.yaml")
    assert "bad.yaml" in line
    assert words in line
    assert not (here / "exploded").exists()


def test_verbs_that_a_module_lacks(here: Path, capsys) -> None:
    for verb in ("validate", "predict"):
        line = one_line(capsys, verb, *DISTIL[1:], "--model.trajectories=gone")
        assert line.endswith(f"TrajectoryMatching has no {verb}: it has fit")


def saved(value):
    return lambda path: torch.save(value, path)


CHECKPOINTS = {
    "best": (lambda path: None, "best", "name the file, or last"),
    "missing": (lambda path: None, "bad.ckpt", "no such checkpoint"),
    "on the web": (lambda path: None, "https://example.com/bad.ckpt", "download the checkpoint first"),
    "a folder": (lambda path: path.mkdir(), "bad.ckpt", "no such checkpoint"),
    "code": (saved(Bomb()), "bad.ckpt", "would run code when read"),
    "another dictionary": (saved({"a": 1}), "bad.ckpt", "is not a checkpoint of Lightning"),
    "a tensor": (saved(torch.zeros(3)), "bad.ckpt", "is not a checkpoint of Lightning"),
    "text": (lambda path: path.write_text("checkpoint"), "bad.ckpt", "cannot be read as a checkpoint"),
    "half a file": (
        lambda path: (saved({"state_dict": {}})(path), path.write_bytes(path.read_bytes()[:200])),
        "bad.ckpt",
        "cannot be read as a checkpoint",
    ),
}
TEACH = [
    "fit",
    "--config",
    str(CONFIGS / "teacher_mtt.yaml"),
    NETWORK,
    *QUIET,
    "--model.teachers=1",
    "--model.epochs=1",
]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(kind: str, here: Path, capsys) -> None:
    write, path, words = CHECKPOINTS[kind]
    write(here / "bad.ckpt")
    line = one_line(capsys, *TEACH, f"--ckpt_path={path}")
    assert path in line
    assert words in line
    assert not (here / "exploded").exists()
    assert not (here / "runs").exists()


VALUES = {
    "teacher_mtt": [
        ("model.lr", -1, "above 0"),
        ("model.lr", ".nan", "above 0 and finite"),
        ("model.lr", ".inf", "above 0 and finite"),
        ("model.rho", -1, "at least 0"),
        ("model.rho", ".nan", "at least 0 and finite"),
        ("model.alpha", -0.5, "at least 0"),
        ("model.momentum", 2, "must lie in [0, 1)"),
        ("model.weight_decay", -1, "at least 0"),
        ("model.teachers", 0, "at least 1"),
        ("model.epochs", -3, "at least 1"),
        ("model.seed", -1, "at least 0"),
        ("model.network_options", "{width: 0, depth: 2}", "width=0"),
        ("model.network_options", "{width: -4, depth: 2}", "width=-4"),
        ("model.network_options", "{width: 4, depth: 0}", "depth=0"),
        ("model.network_options", "{width: 4, dept: 1}", "dept"),
        ("data.image_size", 100000, "at most 1024"),
        ("data.val_fraction", 0.999, "must lie in [0, 0.9]"),
        ("data.val_fraction", -0.1, "must lie in [0, 0.9]"),
        ("data.zca_eps", -1, "above 0"),
        ("data.batch_size", 0, "at least 1"),
        ("data.max_per_class", 0, "at least 1"),
        ("seed_everything", -1, "must be from 0"),
        ("trainer.precision", "bf16-true", "bf16-true"),
        ("trainer.accumulate_grad_batches", 2, "accumulat"),
        ("trainer.gradient_clip_val", 1, "clipping"),
        ("trainer.accelerator", "gpu", "gpu"),
    ],
    "distill_mtt_ipc1": [
        ("model.lr_images", -1, "must lie in [0, 1e+12]"),
        ("model.lr_images", 1e30, "must lie in [0, 1e+12]"),
        ("model.lr_step_size", -1, "must lie in [0, 1e+12]"),
        ("model.step_size_init", 0, "above 0"),
        ("model.syn_steps", 0, "at least 1"),
        ("model.syn_batch", 0, "at least 1"),
        ("model.momentum", ".nan", "must lie in [0, 1)"),
        ("model.augment", "flop", "no operation 'flop'"),
        ("trainer.max_steps", -5, "max_steps"),
    ],
    "evaluate": [
        ("model.lr", -1, "above 0"),
        ("model.networks", 0, "at least 1"),
        ("model.rho", "-.inf", "at least 0 and finite"),
        ("data.synthetic", "gone.safetensors", "gone.safetensors: no such file"),
    ],
}
CASES = [(config, *case) for config, cases in VALUES.items() for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "option", "value", "words"), CASES, ids=lambda value: str(value)[:24])
def test_values(config: str, option: str, value, words: str, shelf: Path, here: Path, capsys) -> None:
    """Before anything is trained."""
    arguments = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), *QUIET]
    if config.startswith("distill"):
        arguments += [f"--model.trajectories={shelf / 'trajectories'}", "--model.max_start_epoch=1"]
    elif config == "evaluate":
        arguments += ["--data.synthetic=random"]
    line = one_line(capsys, *arguments, f"--{option}={value}")
    assert words in line
    assert not list(here.rglob("*.ckpt"))
    assert not list(here.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_the_checkpoint_of_another_module_or_of_other_settings(here: Path, capsys) -> None:
    cli.main([*TEACH])
    path = "runs/digits/teacher_mtt/checkpoints/last.ckpt"
    line = one_line(capsys, *FIT, "--data.synthetic=random", f"--ckpt_path={path}")
    assert "is a checkpoint of ftd_lightning" in line
    assert "SyntheticEvaluation" in line
    for given in ("last", path):
        line = one_line(capsys, *TEACH, "--model.lr=0.5", "--data.val_fraction=0.3", f"--ckpt_path={given}")
        assert "lr=0.5, but the checkpoint was made with 0.05" in line


def test_what_the_operating_system_refuses(shelf: Path, here: Path, capsys) -> None:
    """Permissions do not bind every user, so other refusals stand for a read-only or full disk."""
    (here / "file").write_text("")
    good = str(shelf / "set.safetensors")
    assert "file: " in one_line(capsys, "export", good, "file/sub")
    assert "loop" in (os.symlink("loop", "loop") or one_line(capsys, "export", good, "loop"))
    assert "/proc/x" in one_line(capsys, "export", good, "/proc/x")
    torch.save(torch.rand(10, 1, 8, 8), "images.pt")
    torch.save(torch.arange(10), "labels.pt")
    words = ["import", "images.pt", "labels.pt", "file/set.safetensors", "--dataset=digits", "--pictures"]
    assert "file" in one_line(capsys, *words, "--step-size=0.1")
    assert "file" in one_line(capsys, *TEACH, "--trainer.logger.init_args.save_dir=file")
    assert "file" in one_line(capsys, *TEACH, "--data.zca=true", "--data.cache_dir=file")
    (here / "runs" / "digits" / "evaluate" / "evaluation.json").mkdir(parents=True)
    longer = [argument for argument in FIT if "max_epochs" not in argument]
    line = one_line(capsys, *longer, "--trainer.max_epochs=60", "--data.synthetic=random")
    assert "evaluation.json: is a folder" in line


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error(shelf: Path) -> None:
    command = f"{sys.executable} -m ftd_lightning info --json {shelf / 'trajectories'} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminal_that_is_not_utf_8(shelf: Path, here: Path) -> None:
    rewrite(shelf / "set.safetensors", here / "named.safetensors", meta(class_names=lambda n: [*n[:9], "grün ± x"]))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "ftd_lightning", "info", "named.safetensors"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"gr?n +- x" in done.stdout


REAL = [
    (["info", "gone.safetensors"], 1),
    (["export", "gone.safetensors", "out"], 1),
    (["compare", "--config", "gone.yaml"], 1),
    (["fit", "--config", "bad.yaml"], 1),
    (["fit", "--config", str(CONFIGS / "teacher_mtt.yaml"), "--ckpt_path=gone.ckpt"], 1),
    (["fit", "--config", str(CONFIGS / "teacher_mtt.yaml"), "--seed_everything=-1"], 1),
    (["fit", "--config", str(CONFIGS / "teacher_mtt.yaml"), "--trainer.max_steps=-5"], 1),
    (["fit", "--config", str(CONFIGS / "distill_mtt_ipc1.yaml"), "--model.trajectories=gone"], 1),
    (["exprot"], 2),
    (["nas", "--out", "out", "--data.max_per_class", "14"], 1),
    (["rank", "gone.safetensors"], 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), REAL, ids=lambda value: str(value)[:30])
def test_real_commands(arguments: list[str], code: int, here: Path) -> None:
    (here / "bad.yaml").write_text("model: {class_path: [\n")
    command = [sys.executable, "-m", "ftd_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("ftd: error: ")


def test_json_of_info_holds_no_nan(shelf: Path, here: Path, capsys) -> None:
    rewrite(shelf / "set.safetensors", here / "odd.safetensors", meta(note=NAN))
    cli.main(["info", "odd.safetensors", "--json"])
    shown = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert shown["metadata"]["note"] is None


def test_the_number_of_kinds() -> None:
    kinds = sum(map(len, (SETS, FILES, STORES, YAMLS, CHECKPOINTS, CASES)))
    assert kinds >= 100


@pytest.mark.parametrize(
    ("real", "words"),
    [
        ((torch.zeros(32, 1, 8, 8), torch.zeros(5, dtype=torch.int64)), "labels are 5, but there are 32 images"),
        ((torch.zeros(8, 8), torch.zeros(8, dtype=torch.int64)), "images has shape (8, 8)"),
        ((torch.full((2, 1, 8, 8), NAN), torch.arange(2)), "images has values that are not finite"),
        ((torch.zeros(2, 1, 8, 8), torch.tensor([0, -1])), "labels run from -1 to 0"),
        ((torch.zeros(2, 1, 8, 8), [0, 1]), "not a pair of tensors"),
    ],
)
def test_real_images_of_ones_own(real, words: str, shelf: Path, refused) -> None:
    with refused("real: ", words):
        TrajectoryMatching(str(shelf / "trajectories"), real=real)


def test_a_set_in_memory_is_checked_when_it_is_written(here: Path, refused) -> None:
    for change, words in (
        ({"labels": torch.arange(4)}, "labels are 4"),
        ({"step_size": torch.tensor(0.0)}, "step_size"),
    ):
        fields = {"images": torch.zeros(10, 1, 8, 8), "labels": torch.arange(10), **change}
        with refused("set.safetensors: not written: ", words):
            SyntheticSet(**fields).save("set.safetensors")
    assert not (here / "set.safetensors").exists()
