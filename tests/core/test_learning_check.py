"""Networks that learned nothing are said to be so."""

import json
import math
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, small_data
from torch import nn

from ftd_lightning import SyntheticEvaluation, cli
from ftd_lightning.core.results import Fit, failure, fits

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits" / "evaluate.yaml"


def test_two_standard_errors_of_guessing() -> None:
    error = math.sqrt(0.1 * 0.9 / 100)
    assert failure(Fit(2.0, 0.1 + 2 * error - 1e-9, 0.1, 100)) is not None
    assert failure(Fit(2.0, 0.1 + 2 * error + 1e-9, 0.1, 100)) is None
    assert failure(Fit(0.1, 1.0, 0.5, 2)) is None, "two images, both right"
    assert failure(Fit(0.1, 1.0, 1.0, 5)) is None, "one class: nothing to guess"
    assert failure(Fit(math.inf, 1.0, 0.1, 100)) == "its loss is not finite"


def test_fits_are_those_of_the_batches() -> None:
    network = nn.Linear(2, 3)
    images, labels = torch.randn(7, 2), torch.tensor([0, 1, 1, 2, 1, 0, 1])
    (fit,) = fits([network], zip(images.split(3), labels.split(3), strict=True), torch.device("cpu"))
    logits = network(images).detach()
    assert fit.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert fit.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert (fit.guessing, fit.images) == (4 / 7, 7)
    soft = nn.functional.one_hot(labels, 3).float()
    (again,) = fits([network], [(images, soft)], torch.device("cpu"))
    assert again == pytest.approx(fit)


def test_a_network_that_diverged_stands_in_table_and_json(tmp_path: Path) -> None:
    module = SyntheticEvaluation(network_options=SMALL, networks=2, augment="", lr=0.1)
    data = small_data(synthetic="random", ipc=2)
    trainer = make_trainer(tmp_path, max_epochs=60)
    trainer.fit(module, datamodule=data)
    with torch.no_grad():
        next(module.networks[1].parameters()).fill_(float("nan"))
    with pytest.warns(UserWarning, match="1 of 2 networks did not learn the set"):
        trainer.test(module, datamodule=data, verbose=False)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["failed"] == {"1": "its loss is not finite"}
    assert "1 of 2 networks did not learn the set" in (tmp_path / "evaluation.md").read_text()


def test_where_all_failed_the_command_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data.synthetic=random", "--trainer.max_epochs=2", "--model.network_options={width: 4, depth: 1}"]
    arguments += ["--model.lr=1e-9", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(CONFIG), *arguments])
    assert stop.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("ftd: error: 5 of 5 networks did not learn")
    assert (tmp_path / "runs" / "digits" / "evaluate" / "evaluation.json").is_file()
