"""The ``ftd`` command as people type it."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ftd_lightning import DistillationDataModule, SyntheticSet, TrajectoryStore, cli, lightning_cli, modules
from ftd_lightning.errors import InputError
from ftd_lightning.functional import Augmentation
from ftd_lightning.rules import DropLargest, RobustStart
from ftd_lightning.shipped_configs import read_config, run_folder_of
from ftd_lightning.studies.comparison import Comparison
from ftd_lightning.studies.reproduce import published

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NO_FITS = ("compare", "cross", "demo", "nas", "study")  # those of ftd compare and ftd nas
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem.split("_")[0] not in NO_FITS)

# Small enough to run in seconds; every value on the command line, as anyone would override it.
QUIET = ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
TEACHERS = ["--model.teachers=2", "--model.epochs=3", "--model.network_options={width: 4, depth: 1}"]
DISTIL = ["--trainer.max_steps=6", "--model.iterations_per_epoch=3", "--model.syn_steps=2", "--model.max_start_epoch=2"]
EVALUATE = ["--trainer.max_epochs=3", "--model.networks=2", "--model.network_options={width: 4, depth: 1}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ftd"])
    return tmp_path


def fit(config: str, *arguments: str) -> lightning_cli.FTDCLI:
    return lightning_cli.run(["fit", "--config", str(CONFIGS / config), *QUIET, *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that has to fail; give its exit code and its last line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, *QUIET])
    return int(stop.value.code or 0), capsys.readouterr().err.strip().splitlines()[-1]


def refusal_of_ours(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Do the same with a command beside Lightning's."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return int(stop.value.code or 0), capsys.readouterr().err.strip().splitlines()[-1]


# By how a config's name begins; the longest counts.
CLASSES = {
    "teacher": "FlatTeacher",
    "evaluate": "SyntheticEvaluation",
    "distill": "TrajectoryMatching",
    "distill_cafe": "FeatureAlignment",
    "distill_dc": "GradientMatching",
    "distill_dm": "DistributionMatching",
    "distill_dsa": "GradientMatching",
    "distill_frepo": "FeatureRegression",
    "distill_kip": "KernelInducingPoints",
    "distill_dd": "BilevelDistillation",
    "distill_bptt": "BilevelDistillation",
    "distill_rat_bptt": "BilevelDistillation",
}


@pytest.mark.parametrize(("given", "measures"), [((), True), (("--trainer.benchmark=false",), False)])
def test_cudnn_measures_unless_told_otherwise(
    here: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], measures: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not measures)
    fit("digits/teacher_ftd.yaml", *TEACHERS, "--trainer.fast_dev_run=1", *given)
    assert torch.backends.cudnn.benchmark is measures


@pytest.mark.parametrize("folder", sorted({path.parent for path in ALL}), ids=lambda path: path.name)
def test_every_shipped_config_builds_its_module(folder: Path, here: Path, merged) -> None:
    """The parser knows every key, and the module takes every value, as Python would give it."""
    for config in (path for path in sorted(folder.glob("*.yaml")) if path in ALL):
        settings = merged(config)
        prefix = max((name for name in CLASSES if config.stem.startswith(name)), key=len)
        module_class = getattr(modules, CLASSES[prefix])
        assert settings["model"]["class_path"].endswith(CLASSES[prefix]), config
        module = module_class(**settings["model"]["init_args"])
        assert module.hparams["seed"] == settings["model"]["init_args"]["seed"] == 0
        assert run_folder_of(config) == (Path("runs") / folder.name, config.stem)


def test_shipped_configs_hold_nothing_of_ours_alone() -> None:
    """What only records is added by ``ftd``; class paths are whole, so that anybody's LightningCLI finds them."""
    for config in ALL:
        content = read_config(config)
        assert set(content) <= {"model", "data", "trainer"}, config
        assert content["model"]["class_path"].startswith("ftd_lightning."), config
        assert content["data"]["class_path"].startswith("ftd_lightning."), config
        callbacks = content["trainer"].pop("callbacks", [])
        assert {callback["class_path"] for callback in callbacks} <= {"ftd_lightning.callbacks.SyntheticEMA"}, config
        assert set(content["trainer"]) <= {"max_epochs", "max_steps"}, config


def test_an_unknown_key_of_a_config_is_found(here: Path, capsys) -> None:
    (here / "typo.yaml").write_text("model: {class_path: FlatTeacher, init_args: {epoch: 3}}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", "typo.yaml"])
    assert stop.value.code == 2
    assert "epoch" in capsys.readouterr().err


# The DSA of the rivals resamples as its authors' code does; that of teachers and students as torch's default of then.
CORNERS = {"teacher_ftd": True, "distill_ftd_ipc1": True, "distill_dsa": False, "distill_dm": False}


@pytest.mark.parametrize("name", CORNERS)
def test_augmentation_from_yaml_has_the_defaults_of_its_module(name: str, here: Path, merged) -> None:
    config = CONFIGS / "digits" / f"{name}.yaml"

    def augment(*arguments: str):
        settings = merged(config, *arguments)["model"]
        module_class = getattr(modules, settings["class_path"].rsplit(".", 1)[-1])
        return module_class(**settings["init_args"]).augment

    aligned = CORNERS[name]
    assert augment() == Augmentation("crop_scale_rotate", "single", aligned)
    assert augment("--model.augment=flip") == Augmentation("flip", "single", aligned)
    assert augment("--model.augment", "") == Augmentation("", "single", aligned)
    assert augment(f"--model.augment.align_corners={not aligned}") == Augmentation(
        "crop_scale_rotate", "single", not aligned
    )


def test_rules_from_yaml_are_objects(here: Path, merged) -> None:
    job = Comparison.from_file(Path("digits/compare"))
    for name, rules in (("mtt+robust", [RobustStart(0.1)]), ("pp", [DropLargest(0.1)])):
        given = job.rows[name].distill
        settings = merged(CONFIGS / "digits" / f"{given.config}.yaml", *given.options())["model"]["init_args"]
        assert list(modules.TrajectoryMatching(**settings).rules) == rules


# Columns of the published tables: n, m, max start epoch, syn batch, lr of the pixels, lr of the step size, initial step
# size, EMA decay, GSAM's alpha, ZCA. FTD: its Table 7, ZCA from its published commands or else MTT's; ImageNet subsets
# from the authors' answer. MTT: as given by its author, who has no EMA and no GSAM.
IMAGENET = ("imagenette", "imagewoof", "imagefruit", "imagemeow", "imagesquawk", "imageyellow")
FTD = {
    ("cifar10", 1): (50, 2, 2, None, 100, 1e-7, 0.01, 0.9999, 0.3, True),
    ("cifar10", 10): (30, 2, 20, None, 100, 1e-5, 0.001, 0.9995, 0.3, True),
    ("cifar10", 50): (30, 2, 40, None, 1000, 1e-5, 0.01, 0.999, 1, False),
    ("cifar100", 1): (40, 3, 20, None, 1000, 1e-5, 0.01, 0.9995, 1, True),
    ("cifar100", 10): (20, 2, 40, None, 1000, 1e-5, 0.01, 0.9995, 1, True),
    ("cifar100", 50): (80, 2, 40, 1000, 1000, 1e-5, 0.01, 0.999, 1, True),
    ("tiny-imagenet", 1): (30, 2, 10, None, 10000, 1e-4, 0.01, 0.999, 1, False),
    ("tiny-imagenet", 10): (20, 2, 40, 500, 10000, 1e-4, 0.01, 0.999, 1, False),
    **{(name, ipc): (20, 2, 10, 64, 10000, 1e-4, 0.01, 0.999, 1, False) for name in IMAGENET for ipc in (1, 10)},
}
MTT = {
    ("cifar10", 1): (50, 2, 2, None, 100, 1e-7, 0.01, None, None, True),
    ("cifar10", 10): (30, 2, 20, None, 100, 1e-5, 0.001, None, None, True),
    ("cifar10", 50): (30, 2, 40, None, 1000, 1e-5, 0.001, None, None, False),
    ("cifar100", 1): (20, 3, 20, None, 1000, 1e-5, 0.01, None, None, True),
    ("cifar100", 10): (20, 2, 20, None, 1000, 1e-5, 0.01, None, None, False),
    ("cifar100", 50): (80, 2, 40, 125, 1000, 1e-5, 0.01, None, None, True),
    ("tiny-imagenet", 1): (10, 2, 10, None, 10000, 1e-4, 0.01, None, None, False),
    ("tiny-imagenet", 10): (20, 2, 40, 200, 10000, 1e-4, 0.01, None, None, False),
    ("tiny-imagenet", 50): (20, 2, 40, 300, 10000, 1e-4, 0.01, None, None, False),
    # A batch of 20 for ipc 10; at ipc 1 there are 10 images, and every step takes all of them.
    **{(name, ipc): (20, 2, 10, 20, 10000, 1e-6, 0.01, None, None, False) for name in IMAGENET for ipc in (1, 10)},
}
PUBLISHED = {("ftd", *key): row for key, row in FTD.items()} | {("mtt", *key): row for key, row in MTT.items()}
DEPTH = {"cifar10": 3, "cifar100": 3, "tiny-imagenet": 4, **dict.fromkeys(IMAGENET, 5)}


@pytest.mark.parametrize(("method", "dataset", "ipc"), PUBLISHED)
def test_settings_are_the_published_ones(method: str, dataset: str, ipc: int, here: Path, merged) -> None:
    configs = published(dataset, ipc, method)
    config = merged(configs.distill.config, *configs.distill.options())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    averages = [callback["init_args"]["decay"] for callback in trainer["callbacks"] or []]
    teacher = merged(configs.teacher.config, *configs.teacher.options())
    settings = teacher["model"]["init_args"]
    keys = ("syn_steps", "expert_epochs", "max_start_epoch", "syn_batch", "lr_images", "lr_step_size", "step_size_init")
    alpha = settings["alpha"] if settings["rho"] else None
    found = (*(model[key] for key in keys), averages[0] if averages else None, alpha, data["zca"])
    assert found == PUBLISHED[method, dataset, ipc]
    assert (model["ipc"], model["momentum"], trainer["max_steps"], data["dataset"]) == (ipc, 0.5, 5000, dataset)
    assert (settings["teachers"], settings["epochs"], settings["lr"], settings["momentum"]) == (100, 50, 0.01, 0)
    assert settings["rho"] == {"ftd": 0.01, "mtt": 0.0}[method]
    assert settings["network_options"] == {"width": 128, "depth": DEPTH[dataset]}
    assert teacher["data"]["init_args"]["batch_size"] == 256
    for key in ("dataset", "zca", "val_fraction", "seed"):
        assert teacher["data"]["init_args"][key] == data[key]


# As the authors' code has them: initial images, strategy, lr of the pixels, updates of the images by images per class.
DSA = "color_crop_cutout_flip_scale_rotate"
MATCHING = {
    "dc": ("noise", "", 0.1, {1: 1001, 10: 10010, 50: 50050}),
    "dsa": ("real", DSA, 0.1, {1: 1001, 10: 10010, 50: 50050}),
    "dm": ("real", DSA, 1.0, {1: 20001, 10: 20001, 50: 20001}),
}
CELLS = [(method, dataset, ipc) for method in MATCHING for dataset in ("cifar10", "cifar100") for ipc in (1, 10, 50)]


@pytest.mark.parametrize(("method", "dataset", "ipc"), [*CELLS, *(("dm", "tiny-imagenet", ipc) for ipc in (1, 10))])
def test_settings_of_class_matching_are_the_published_ones(method, dataset, ipc, here: Path, merged) -> None:
    configs = published(dataset, ipc, method)
    config = merged(configs.distill.config, *configs.distill.options())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    strategy = model["augment"] and model["augment"]["strategy"]
    found = (model["init"], strategy, model["lr_images"])
    assert (*found, trainer["max_steps"]) == (*MATCHING[method][:3], MATCHING[method][3][ipc])
    keys = ("ipc", "batch_real", "momentum", "lr_network")
    assert tuple(model[key] for key in keys) == (ipc, 256, 0.5, 0.01)
    assert (data["dataset"], data["zca"]) == (dataset, False)
    assert model["network_options"] == {"width": 128, "depth": DEPTH[dataset]}
    if method != "dm":  # the table of loops is the module's
        assert (model["outer_loops"], model["inner_epochs"]) == (None, None)
    evaluation = merged(configs.evaluate)["model"]["init_args"]
    assert evaluation["network_options"] == model["network_options"]


def test_configs_are_found_by_name_and_merged_in_order(here: Path, capsys) -> None:
    (here / "mine.yaml").write_text("model: {init_args: {epochs: 4, teachers: 7}}\n")
    for shipped in ("digits/teacher_ftd", "digits/teacher_ftd.yaml", str(CONFIGS / "digits" / "teacher_ftd.yaml")):
        for option in (["--config", shipped], [f"--config={shipped}"], ["-c", shipped], [f"-c{shipped}"]):
            with contextlib.suppress(SystemExit):
                cli.main(["fit", *option, "-c", "mine.yaml", "--model.rho=0.25", "--print_config"])
            settings = yaml.safe_load(capsys.readouterr().out)
            values = settings["model"]["init_args"]
            assert [values[key] for key in ("lr", "epochs", "teachers", "rho")] == [0.05, 4, 7, 0.25]
            logger = settings["trainer"]["logger"]["init_args"]
            assert (logger["save_dir"], logger["name"]) == ("runs/digits", "teacher_ftd")
    (here / "digits").mkdir()
    (here / "digits" / "teacher_ftd.yaml").write_text("model: {class_path: FlatTeacher, init_args: {lr: 0.5}}\n")
    with contextlib.suppress(SystemExit):
        cli.main(["fit", "--config", "digits/teacher_ftd", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["init_args"]["lr"] == 0.5, "a path wins over a shipped name"
    assert settings["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    (here / "old.yaml").write_text("base: first.yaml\nmodel: {init_args: {epochs: 4}}\n")
    code, line = refusal(capsys, "fit", "--config", "old.yaml")
    assert code == 1
    assert line.startswith("ftd: error: old.yaml: base is no longer read; pass the config that it builds on before it")


def test_configs_lists_prints_and_copies(here: Path, capsys) -> None:
    cli.main(["configs"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert sorted(listed) == sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml"))
    cli.main(["configs", "cifar10/", "datm_ipc"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [f"cifar10/distill_datm_ipc{ipc}" for ipc in (1, 10, 50, 500, 1000)]
    cli.main(["configs", "digits/teacher_mtt"])
    text = capsys.readouterr().out
    assert text == (CONFIGS / "digits" / "teacher_mtt.yaml").read_text()
    cli.main(["configs", "digits/teacher_mtt", "--to", "own/mine.yaml"])
    assert Path("own/mine.yaml").read_text() == text
    code, line = refusal_of_ours(capsys, "configs", "digits/teacher_mtt", "--to", "own/mine.yaml")
    assert (code, line) == (1, "ftd: error: own/mine.yaml: is there already; name another file")
    Path("latin.yaml").write_bytes("# é\n".encode("latin-1"))
    code, line = refusal_of_ours(capsys, "configs", "latin.yaml")
    assert (code, "is not UTF-8" in line) == (1, True)
    code, line = refusal_of_ours(capsys, "configs", "digits/teacher_mtx")
    assert (code, line.partition("; ")[2][:32]) == (1, "did you mean digits/teacher_mtt,")


@pytest.mark.slow
def test_save_dir_takes_the_place_of_the_folder_of_runs(here: Path) -> None:
    fit("digits/teacher_mtt.yaml", *TEACHERS, "--trainer.logger.save_dir", "D")
    assert len(TrajectoryStore("D/teacher_mtt/trajectories")) == 2


def test_any_value_can_be_overridden(here: Path, merged) -> None:
    config = str(CONFIGS / "cifar10" / "distill_ftd_ipc10.yaml")
    arguments = ["--model.ipc", "3", "--data.zca", "false", "--trainer.max_steps", "7"]
    shown = merged(config, *arguments, "--trainer.callbacks+=ModelSummary")
    assert shown["model"]["init_args"]["ipc"] == 3
    assert shown["data"]["init_args"]["zca"] is False
    assert shown["trainer"]["max_steps"] == 7
    assert shown["trainer"]["callbacks"][-1]["class_path"].endswith("ModelSummary")
    assert len(shown["trainer"]["callbacks"]) == 2


@pytest.mark.slow
def test_the_three_steps(here: Path) -> None:
    """Teachers, distillation, evaluation: three ordinary fits, joined by two artefacts on disk."""
    saving = [fit("digits/teacher_ftd.yaml", *TEACHERS).trainer.checkpoint_callback]
    store = TrajectoryStore("runs/digits/teacher_ftd/trajectories")
    assert (len(store), store.epochs) == (2, 3)
    assert Path("runs/digits/teacher_ftd/config.yaml").is_file()
    saving.append(fit("digits/distill_ftd_ipc1.yaml", *DISTIL).trainer.checkpoint_callback)
    synthetic = SyntheticSet.load("runs/digits/distill_ftd_ipc1/set.safetensors")
    assert synthetic.images.shape == (10, 1, 8, 8)
    assert synthetic.ema_images is not None
    evaluation = fit("digits/evaluate.yaml", *EVALUATE)
    assert evaluation.model.results["lr"] == pytest.approx(float(synthetic.step_size))
    # With save_top_k 0 Lightning writes it when the fit is over, and a killed one would quietly begin anew.
    saving.append(evaluation.trainer.checkpoint_callback)
    assert [(callback.save_last, callback.save_top_k) for callback in saving] == [(True, 1)] * 3
    assert Path("runs/digits/evaluate/evaluation.json").is_file()
    # Finished runs can be extended: a distillation as long as its teachers are those that it began with.
    checkpoint = "runs/digits/distill_ftd_ipc1/checkpoints/last.ckpt"
    longer = [a for a in DISTIL if "max_steps" not in a]
    fit("digits/distill_ftd_ipc1.yaml", *longer, "--trainer.max_steps=9", f"--ckpt_path={checkpoint}")
    assert SyntheticSet.load("runs/digits/distill_ftd_ipc1/set.safetensors").metadata["iterations"] == 9
    more = [a for a in TEACHERS if "teachers" not in a]
    fit("digits/teacher_ftd.yaml", *more, "--model.teachers=3", "--ckpt_path=last")
    assert len(TrajectoryStore("runs/digits/teacher_ftd/trajectories")) == 3


def test_a_result_is_that_of_trained_networks(here: Path, capsys) -> None:
    arguments = [*EVALUATE, "--trainer.max_epochs=60", "--model.lr=0.1", "--data.synthetic=random", "--data.ipc=2"]
    results = fit("digits/evaluate.yaml", *arguments).model.results
    folder, config = Path("runs/digits/evaluate"), str(CONFIGS / "digits" / "evaluate.yaml")
    files = {name: (folder / name).read_bytes() for name in ("evaluation.json", "evaluation.md", "config.yaml")}
    for verb in ("test", "predict"):
        code, line = refusal(capsys, verb, "--config", config, *arguments)
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


@pytest.fixture
def teachers(here: Path, trajectories: Path) -> list[str]:
    """A distillation of recorded teachers, and of the part of the digits that they saw."""
    config = str(CONFIGS / "digits" / "distill_mtt_ipc1.yaml")
    data = ["--data.max_per_class=14", "--data.batch_size=32"]
    return ["fit", "--config", config, f"--model.trajectories={trajectories}", "--model.max_start_epoch=3", *data]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.dataset=digit"], ["unknown data set 'digit'", "did you mean 'digits'?"]),
        (["--data.dataset=cifar10", "--data.download=false", "--data.max_per_class=null"], ["CIFAR-10", "data.root"]),
        (["--data.val_fraction=2"], ["val_fraction=2"]),
        (["--model.network=convent"], ["unknown network 'convent'", "did you mean 'convnet'?"]),
        (["--model.trajectories=nowhere"], ["nowhere: no teachers here"]),
        (["--model.max_start_epoch=4"], ["max_start_epoch=4", "reaches epoch 5, but 4 were recorded"]),
        (["--model.ipc=100"], ["100 images per class are asked for", "class 0"]),
        (["--model.ipc=0"], ["ipc=0"]),
        (["--model.augment=flop"], ["no operation 'flop'"]),
        (
            ["--model.network=convnet", "--model.network_options={width: 8}"],
            ["its teachers are convnet(", "convnet(width=8)"],
        ),
        (["--data.zca=true"], ["teachers have transform", "zca"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(teachers: list[str], capsys, arguments, words) -> None:
    code, line = refusal(capsys, *teachers, *arguments)
    assert code == 1
    assert line.startswith("ftd: error: ")
    for word in words:
        assert word in line
    assert not list(Path().rglob("*.safetensors"))


def test_broken_teachers_are_named(teachers: list[str], trajectories: Path, here: Path, capsys) -> None:
    folder = here / "store"
    folder.mkdir()
    whole = (trajectories / "teacher_0000.safetensors").read_bytes()
    for content, word in ((whole[:-100], "truncated"), (b"not at all", "not a safetensors file")):
        (folder / "teacher_0000.safetensors").write_bytes(content)
        code, line = refusal(capsys, *teachers, f"--model.trajectories={folder}")
        assert code == 1
        assert "teacher_0000.safetensors" in line
        assert word in line


def test_wrong_words_end_with_exit_code_2(here: Path, capsys) -> None:
    config = str(CONFIGS / "digits" / "teacher_mtt.yaml")
    told = "ftd: error: FlatTeacher has no option 'epoch': did you mean 'epochs'?\n"
    for arguments, words in ((["fit", "--config", config, "--model.epoch=3"], told), (["fot"], "fot")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        assert shown == words if words == told else words in shown
    code, line = refusal(capsys, "fit", "--config", "nowhere.yaml")
    assert (code, line) == (1, "ftd: error: nowhere.yaml: no such config; ftd configs lists those that ship")


def test_other_errors_keep_their_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(lightning_cli, "FTDCLI", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fit"])


def test_a_bug_behind_a_refused_input_is_a_bug(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Raised while an InputError is handled, an error is ours; raised *from* it, it is the parser's wrapping."""

    def broken(*args, **kwargs):
        try:
            raise InputError("refused")
        except InputError:
            raise KeyError("a bug")  # noqa: B904  the point

    monkeypatch.setattr(lightning_cli, "FTDCLI", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["fit"])

    def wrapping(*args, **kwargs):
        raise ValueError("of the parser") from InputError("epochs=0 must be at least 1")

    monkeypatch.setattr(lightning_cli, "FTDCLI", wrapping)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit"])
    assert (stop.value.code, capsys.readouterr().err) == (1, "ftd: error: epochs=0 must be at least 1\n")
    with pytest.raises(ValueError, match="of the parser"):
        cli.main(["--debug", "fit"])


def test_what_lightning_refuses_is_one_line(here: Path, capsys) -> None:
    code, line = refusal(
        capsys, "fit", "--config", str(CONFIGS / "digits" / "teacher_mtt.yaml"), "--trainer.fast_dev_run=-3"
    )
    assert code == 1
    assert line.startswith("ftd: error: ")
    assert "-3" in line


def test_help_names_every_command(capsys) -> None:
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown
        assert command.summary in shown
    for name in (
        "fit",
        "validate",
        "test",
        "predict",
        "compare",
        "export",
        "import",
        "info",
        "label",
        "nas",
        "rank",
        "reproduce",
    ):
        assert name in cli.COMMANDS
    for command in [name for name, command in cli.COMMANDS.items() if command.module]:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert f"ftd {command}" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["exprot"])
    assert stop.value.code == 2
    assert "did you mean export?" in capsys.readouterr().err


def test_own_callbacks_loggers_and_plugins_are_left_alone(here: Path) -> None:
    arguments = [
        "--trainer.callbacks=[{class_path: TQDMProgressBar}, {class_path: TrajectoryRecorder}]",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=elsewhere",
        "--trainer.plugins=[lightning.pytorch.plugins.io.TorchCheckpointIO]",
    ]
    trainer = fit("digits/teacher_mtt.yaml", *TEACHERS, *arguments).trainer
    assert type(trainer.progress_bar_callback).__name__ == "TQDMProgressBar"
    assert type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    assert list(Path("elsewhere").rglob("metrics.csv"))


def test_both_commands_say_their_version() -> None:
    from ftd_lightning import __version__

    for command in ([sys.executable, "-m", "ftd_lightning"], [str(Path(sys.executable).parent / "ftd")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == f"ftd {__version__}", done.stderr


def test_a_seed_on_the_command_line_gives_other_teachers(here: Path) -> None:
    fit("digits/teacher_mtt.yaml", *TEACHERS)
    first = TrajectoryStore("runs/digits/teacher_mtt/trajectories").trajectory(0)
    own_folder = "--trainer.logger.init_args.name=other"
    fit("digits/teacher_mtt.yaml", *TEACHERS, own_folder, "--model.seed=1")
    other = TrajectoryStore("runs/digits/other/trajectories").trajectory(0)
    assert not torch.equal(first[0], other[0])
