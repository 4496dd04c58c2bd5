"""The whole job on the embedded digits: ``python -m ftd_lightning.demo``, or ``make demo``.

Every step is an ordinary ``ftd fit`` that anyone can type; this runs them in a row, and says what they gave. A step
that was interrupted resumes from its last checkpoint, a finished one is not repeated.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ftd_lightning import lightning_cli
from ftd_lightning.data import DistillationDataModule, SyntheticSet
from ftd_lightning.data.files import versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.errors import InputError
from ftd_lightning.studies.picture_sheet import set_picture, write_sheet

CONFIGS = Path("configs/digits")
RUNS = Path("runs/digits")


class Step(NamedTuple):
    """One command of the demo."""

    title: str
    config: str
    run: str  # folder of its logs
    arguments: tuple[str, ...] = ()


def _fit(title: str, config: str) -> Step:
    return Step(title, config, config)


def _evaluation(name: str, title: str, *arguments: str) -> Step:
    run = f"evaluate_{name}"
    return Step(f"Evaluation of {title}", "evaluate", run, ("--trainer.logger.init_args.name", run, *arguments))


def _set(method: str) -> Path:
    return RUNS / f"distill_{method}_ipc1" / "set.safetensors"


STEPS = (
    _fit("Plain teachers (MTT)", "teacher_mtt"),
    _fit("Flat teachers (FTD)", "teacher_ftd"),
    _fit("Distillation with plain teachers (MTT), 1 image per class", "distill_mtt_ipc1"),
    _fit("Distillation with flat teachers (FTD), 1 image per class", "distill_ftd_ipc1"),
    _evaluation("random", "random real images", "--data.synthetic", "random", "--data.ipc", "1"),
    _evaluation("mtt", "the MTT set", "--data.synthetic", str(_set("mtt"))),
    _evaluation("ftd", "the FTD set (EMA images)", "--data.synthetic", str(_set("ftd")), "--data.ema", "true"),
    _evaluation("real", "the whole training set", "--data.synthetic", "real", "--trainer.max_epochs", "60"),
)
ROWS = {"random": "10 random real images", "mtt": "10 images, MTT", "ftd": "10 images, FTD", "real": "all real images"}


def picture(path: Path) -> None:
    """Draw initial, MTT and FTD images one row below the other, with the row's name beside it."""
    mtt, ftd = SyntheticSet.load(_set("mtt")), SyntheticSet.load(_set("ftd"))
    data = DistillationDataModule(synthetic="random", ipc=1)
    data.setup()
    assert data.synthetic_set is not None
    initial = set_picture(data.synthetic_set)
    write_sheet({"initial (real)": initial, "MTT": set_picture(mtt), "FTD": set_picture(ftd, ema=True)}, path)


def table(accuracy: dict[str, Any]) -> str:
    """Lay results out, in per cent.

    Example:
        >>> print(table({"ftd": {"mean": 0.9, "std": 0.01, "n": 5}}).splitlines()[-1])
        10 images, FTD            90.0 +-  1.0   5 networks
    """
    lines = [f"{'trained on':<24}  test accuracy, %", "-" * 52]
    for name, value in accuracy.items():
        mean, std = 100 * value["mean"], 100 * value["std"]
        lines.append(f"{ROWS[name]:<24}  {mean:.1f} +- {std:4.1f}   {value['n']} networks")
    return "\n".join(lines)


def main() -> None:
    """Run all steps and write ``results.json`` and ``images.png`` into ``runs/digits``."""
    if not CONFIGS.is_dir():
        raise InputError(f"{CONFIGS} is not here: run the demo in the project's folder")
    # 8x8 pixels keep no second thread busy, and on a machine with other work two that wait for each other crawl.
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    for number, step in enumerate(STEPS, 1):
        command = ["fit", "--config", str(CONFIGS / f"{step.config}.yaml"), *step.arguments]
        print(f"\n[{number}/{len(STEPS)}] {step.title}\n      ftd {' '.join(command)}", flush=True)
        began = time.perf_counter()
        begun = (RUNS / step.run / "checkpoints" / "last.ckpt").exists()
        lightning_cli.run([*command, "--ckpt_path", "last"] if begun else command)
        seconds[step.title] = round(time.perf_counter() - began, 1)
    accuracy: dict[str, Any] = {}
    for name in ROWS:
        accuracy |= json.loads((RUNS / f"evaluate_{name}" / "evaluation.json").read_text(encoding="utf-8"))["accuracy"]
    results = {
        "accuracy": accuracy,
        "dataset": "digits",
        "ipc": 1,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(RUNS / "results.json", results)
    picture(RUNS / "images.png")
    print(f"\n{table(accuracy)}\n")
    print(f"results   {RUNS / 'results.json'}\nimages    {RUNS / 'images.png'} (initial, MTT, FTD)")
    print(f"curves    {Path(sys.executable).parent / 'tensorboard'} --logdir {RUNS.parent}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"ftd: error: {error}")
