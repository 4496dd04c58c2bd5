"""The record of a reproduction: one JSON file that says what was run, on what, for how long, and what it gave."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ftd_lightning.data import SyntheticSet, TrajectoryStore
from ftd_lightning.data.files import versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.studies.machine_paths import without_machine_paths
from ftd_lightning.studies.reproduction import IMAGES
from ftd_lightning.training.evaluation_protocol import mean_and_std

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ftd_lightning.studies.reproduction import Reproduction

KIND = "reproduction"


def command(reproduction: Reproduction, overrides: Sequence[str]) -> str:
    """Format the command as people type it."""
    given = {key.upper(): value for key, value in reproduction.cell._asdict().items() if value is not None}
    options = [f"{key}={value}" for key, value in given.items()]
    overrides = without_machine_paths(overrides)
    return shlex.join(["make", "reproduce", *options, *([f"ARGS={shlex.join(overrides)}"] if overrides else [])])


def _best_on_test(folder: Path, images: str) -> dict[str, Any] | None:
    """The highest mean test accuracy that was seen while distilling; None where none was."""
    file = folder / "evaluations.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    seen = [entry for entry in entries if (entry["images"], entry["part"]) == (images, "test")]
    if not seen:
        return None
    best = max(seen, key=lambda entry: entry["mean"])
    return {key: best[key] for key in ("mean", "std", "n", "iteration")}


def _teachers(store: TrajectoryStore, settings: Mapping[str, Any]) -> dict[str, Any]:
    each = [store.teacher_metadata(index) for index in range(len(store))]
    last = [metadata["accuracies"][-1] for metadata in each]
    known = [value for value in last if value is not None]
    held_out = settings["data"]["init_args"].get("val_fraction", 0) > 0
    return {
        "count": len(store),
        "epochs": store.epochs,
        "accuracy": mean_and_std(torch.tensor(known)) if known else None,
        "each": last,
        "measured_on": "held-out training images" if held_out else "training images as augmented",
        "seeds": [metadata["seed"] for metadata in each],
        "network": store.metadata["network"],
    }


def _settings(folder: Path) -> dict[str, Any]:
    """Read all settings of a fit, but those of the machine."""
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    kept = {key: settings[key] for key in ("seed_everything", "model", "data")}
    data = {key: value for key, value in settings["data"]["init_args"].items() if key != "root"}
    trainer = {key: settings["trainer"][key] for key in ("precision", "devices", "strategy", "callbacks")}
    return {**kept, "data": {**settings["data"], "init_args": data}, "trainer": trainer}


def make_record(
    reproduction: Reproduction, results: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Gather the record of a finished reproduction.

    Args:
        reproduction: what was run.
        results: what it gave, the content of its ``compare.json``.
        overrides: options of its command that went to the fits.

    Returns:
        What the file holds. Accuracies are fractions on the real test images: those of "last" and
        "chosen_on_held_out" of fresh networks after their last epoch, "best_on_test" the highest that was seen while
        distilling, which knows what it is measured on and is an upper bound only. None where there is no such set.
    """
    cell, job = reproduction.cell, reproduction.job
    rows = {row["name"]: row for row in results["rows"]}
    first = job.rows["raw-last"]
    teacher, distill = job.steps(first)[:2]
    evaluation = job.evaluation_step(first, "")
    made = SyntheticSet.read_metadata(distill.folder / "set.safetensors")
    best = distill.folder / "best.safetensors"
    chosen = SyntheticSet.read_metadata(best)["iterations"] if best.is_file() else None

    def accuracy(name: str) -> dict[str, Any] | None:
        return rows[name]["accuracy"]["last"] if name in rows else None

    settings = {
        phase: _settings(step.folder)
        for phase, step in (("teacher", teacher), ("distill", distill), ("evaluate", evaluation))
    }
    seconds = rows["raw-last"]["seconds"]
    evaluations = {row["folders"][-1]: row["seconds"]["evaluation"] for row in rows.values()}
    record = {
        "kind": KIND,
        "command": command(reproduction, overrides),
        "dataset": cell.dataset,
        "ipc": cell.ipc,
        "method": cell.method,
        "teachers": _teachers(TrajectoryStore(distill.folder / "teachers"), settings["teacher"]),
        "iterations": made["iterations"],
        "chosen_iteration": chosen,
        "skipped_steps": made.get("skipped_steps", 0),
        "evaluation_epochs": rows["raw-last"]["epochs"],
        "config": reproduction.published,
        "accuracy": {
            images: {
                "last": accuracy(f"{images}-last"),
                "chosen_on_held_out": accuracy(f"{images}-chosen") if chosen is not None else None,
                "best_on_test": _best_on_test(distill.folder, images),
            }
            for images in IMAGES
        },
        "seconds": {
            "teachers": seconds["teachers"],
            "distillation": seconds["distillation"],
            "evaluations": round(sum(evaluations.values()), 1),
        },
        "device": results["device"],
        "seeds": {
            "distillation": settings["distill"]["model"]["init_args"]["seed"],
            "data": settings["distill"]["data"]["init_args"]["seed"],
            "evaluation": rows["raw-last"]["seeds"],
        },
        "settings": settings,
        "versions": {**versions(), **{name: version(name) for name in ("torchvision", "kornia")}},
        "date": results["date"],
    }
    cleaned: dict[str, Any] = without_machine_paths(record)
    return cleaned


def free_name(folder: Path, name: str) -> Path:
    """Name a file that is not there yet: no record takes the place of another."""
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}_{number}.json", number + 1
    return path


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, atomically."""
    write_json(path, record)
