"""The configs of CAFE and CAFE+DSA: the settings they hold, and that they run."""

import sys
from pathlib import Path

import pytest

from ftd_lightning import SyntheticSet, cli, lightning_cli
from ftd_lightning.studies.reproduce import published

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DSA = "color_crop_cutout_flip_scale_rotate"

# Columns: initial images, DSA strategy. All else is the released script's, for every data set and ipc.
STARTS = {"cafe": ("noise", ""), "cafe_dsa": ("real", {"strategy": DSA})}
SCRIPT = {
    "network": "convnet",
    "network_options": {"width": 128, "depth": 3},
    "rounds": 2001,
    "loops": {"kind": "dynamic", "outer_max": 50, "inner_max": 50, "lambda_1": 0.04, "lambda_2": 0.03, "window": 10},
    "query": 128,
    "level_weights": None,
    "discrimination": 0.01,
    "batch_real": 256,
    "lr_images": 0.1,
    "lr_milestones": [1200, 1600, 1800],
    "momentum": 0.5,
    "lr_network": 0.01,
}
SETS = [("cifar10", ipc) for ipc in (1, 10, 50)] + [("cifar100", ipc) for ipc in (1, 10, 50)]
DIGITS = {"cafe": ("noise", "", "cafe"), "cafe_dsa": ("real", "crop_scale_rotate", "cafe+dsa")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ftd"])
    return tmp_path


@pytest.mark.parametrize(("dataset", "ipc"), SETS)
@pytest.mark.parametrize("method", STARTS)
def test_settings_are_those_of_the_released_script(method: str, dataset: str, ipc: int, here: Path, merged) -> None:
    configs = published(dataset, ipc, method)
    config = merged(configs.distill.config, *configs.distill.options())
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert config["model"]["class_path"].endswith("FeatureAlignment")
    assert {name: model[name] for name in SCRIPT} == SCRIPT
    assert (model["init"], model["augment"], model["ipc"]) == (*STARTS[method], ipc)
    assert trainer["max_steps"] == model["rounds"] * model["loops"]["outer_max"], (
        "rounds end the fit, whatever their length"
    )
    assert (config["data"]["init_args"]["dataset"], config["data"]["init_args"]["zca"]) == (dataset, False)


@pytest.mark.parametrize("method", DIGITS)
def test_the_digits_run(method: str, here: Path) -> None:
    init, augment, name = DIGITS[method]
    small = [
        "--trainer.max_steps=5",
        "--model.iterations_per_epoch=5",
        "--model.loops.outer_max=2",
        "--model.loops.inner_max=1",
    ]
    small += ["--data.max_per_class=14", "--model.network_options={width: 4, depth: 1}"]
    quiet = ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    unmeasured = "[SyntheticSetWriter, {class_path: EvaluateSynthetic, init_args: {every_n_epochs: 0}}]"
    measured = [f"--trainer.callbacks={unmeasured}", "--trainer.limit_val_batches=0"]
    config = CONFIGS / "digits" / f"distill_{method}.yaml"
    run = lightning_cli.run(["fit", "--config", str(config), *small, *quiet, *measured])
    found = SyntheticSet.load(here / "runs" / "digits" / f"distill_{method}" / "set.safetensors")
    assert run.model.round == 2
    assert found.images.shape == (10, 1, 8, 8)
    settings = found.metadata["settings"]
    assert (found.metadata["method"], settings["init"], settings["augment"]["strategy"]) == (name, init, augment)
    assert found.metadata["network"]["options"] == {"width": 4, "depth": 1}


@pytest.mark.parametrize(
    ("option", "message"),
    [("--model.query=0", "query=0 must be at least 1"), ("--model.augment=blur", "no operation 'blur'")],
)
def test_a_mistake_is_one_line(option: str, message: str, here: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(CONFIGS / "digits" / "distill_cafe.yaml"), option])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
