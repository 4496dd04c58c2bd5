"""The record of a reproduction: one JSON file that says what was run, on what, for how long, and what it gave."""

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.data import SyntheticSet, TrajectoryStore
from ftd_lightning.data.files import versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.studies.fit_steps import read_notes
from ftd_lightning.training.evaluation_protocol import mean_and_std

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftd_lightning.studies.reproduction_plan import Reproduction

KIND = "reproduction"
ABSOLUTE = re.compile(r"(?<![\w.~/-])[/~][^\s,'\"\]}]*")


def without_machine_paths(value: Any) -> Any:
    """Cut absolute paths down to their last part: where a file lay on a machine is no part of a result.

    Example:
        >>> without_machine_paths({"command": "--data.root=/srv/images --data.zca true", "store": "runs/x"})
        {'command': '--data.root=images --data.zca true', 'store': 'runs/x'}
    """
    if isinstance(value, dict):
        return {key: without_machine_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine_paths(part) for part in value]
    return ABSOLUTE.sub(lambda found: Path(found[0]).name, value) if isinstance(value, str) else value


def command(job: Reproduction, overrides: Sequence[str]) -> str:
    """Format the command as people type it."""
    given = {key.upper(): value for key, value in job.cell._asdict().items() if value is not None}
    options = [f"{key}={value}" for key, value in given.items()]
    overrides = without_machine_paths(overrides)
    return shlex.join(["make", "reproduce", *options, *([f"ARGS={shlex.join(overrides)}"] if overrides else [])])


def _seconds(folder: Path, target: int) -> float | None:
    """Wall time of a step; of a store that went further, the share of those teachers. None where nobody took it."""
    finished = {int(count): seconds for count, seconds in read_notes(folder)["finished"].items()}
    further = [count for count in finished if count >= target]
    return round(finished[min(further)] * target / min(further), 1) if further else None


def _best_on_test(folder: Path, images: str) -> dict[str, Any] | None:
    """The highest mean test accuracy that was seen while distilling; None where none was."""
    file = folder / "evaluations.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    seen = [entry for entry in entries if (entry["images"], entry["part"]) == (images, "test")]
    if not seen:
        return None
    best = max(seen, key=lambda entry: entry["mean"])
    return {key: best[key] for key in ("mean", "std", "n", "iteration")}


def _teachers(job: Reproduction) -> dict[str, Any]:
    store = TrajectoryStore(job.folder / "trajectories")
    each = [store.teacher_metadata(index) for index in range(len(store))]
    last = [metadata["accuracies"][-1] for metadata in each]
    known = [value for value in last if value is not None]
    held_out = job.settings["teacher"]["data"]["init_args"].get("val_fraction", 0) > 0
    return {
        "count": len(store),
        "epochs": store.epochs,
        "accuracy": mean_and_std(torch.tensor(known)) if known else None,
        "each": last,
        "measured_on": "held-out training images" if held_out else "training images as augmented",
        "seeds": [metadata["seed"] for metadata in each],
        "network": store.metadata["network"],
    }


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: settings[key] for key in ("seed_everything", "model", "data")}
    data = {key: value for key, value in settings["data"]["init_args"].items() if key != "root"}
    trainer = {key: settings["trainer"][key] for key in ("precision", "devices", "strategy", "callbacks")}
    return {**kept, "data": {**settings["data"], "init_args": data}, "trainer": trainer}


def make_record(job: Reproduction, overrides: Sequence[str]) -> dict[str, Any]:
    """Gather the record of a finished reproduction.

    Args:
        job: what was run.
        overrides: options of its command that went to the fits.

    Returns:
        What the file holds. Accuracies are fractions on the real test images: those of "last" and
        "chosen_on_held_out" of fresh networks after their last epoch, "best_on_test" the highest that was seen while
        distilling, which knows what it is measured on and is an upper bound only. None where there is no such set.
    """
    distill, evaluations = job.distill_step(), job.evaluations()
    synthetic = SyntheticSet.load(distill.folder / "set.safetensors")
    files = {key: step.folder / "evaluation.json" for key, step in evaluations.items()}
    results = {key: json.loads(file.read_text(encoding="utf-8")) for key, file in files.items()}
    accuracy = {
        images: {
            **{
                name: next(iter(results[images, iterate]["accuracy"].values()), None)
                if (images, iterate) in results
                else None
                for name, iterate in (("last", "last"), ("chosen_on_held_out", "chosen"))
            },
            "best_on_test": _best_on_test(distill.folder, images),
        }
        for images in ("raw", "ema")
    }
    best = distill.folder / "best.safetensors"
    chosen = SyntheticSet.load(best).metadata["iterations"] if best.is_file() else None
    times = [_seconds(step.folder, step.target) for step in dict.fromkeys(evaluations.values())]
    folders = {job.teacher_folder, distill.folder, *(step.folder for step in evaluations.values())}
    record = {
        "kind": KIND,
        "command": command(job, overrides),
        "dataset": job.cell.dataset,
        "ipc": job.cell.ipc,
        "method": job.cell.method,
        "teachers": _teachers(job),
        "iterations": synthetic.metadata["iterations"],
        "chosen_iteration": chosen,
        "skipped_steps": synthetic.metadata.get("skipped_steps", 0),
        "evaluation_epochs": results["raw", "last"]["epochs"],
        "config": job.published,
        "accuracy": accuracy,
        "seconds": {
            "teachers": _seconds(job.teacher_folder, job.teachers),
            "distillation": _seconds(distill.folder, job.iterations),
            "evaluations": round(sum(value or 0.0 for value in times), 1),
        },
        "device": "; ".join(sorted({name for folder in folders for name in read_notes(folder)["devices"]})),
        "seeds": {
            "distillation": job.settings["distill"]["model"]["init_args"]["seed"],
            "data": job.settings["distill"]["data"]["init_args"]["seed"],
            "evaluation": results["raw", "last"]["seeds"],
        },
        "settings": {phase: _settings(settings) for phase, settings in job.settings.items()},
        "versions": {**versions(), **{name: version(name) for name in ("torchvision", "kornia")}},
        "date": datetime.now(UTC).date().isoformat(),
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
