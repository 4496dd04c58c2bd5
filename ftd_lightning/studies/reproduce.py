"""The record of a reproduction: one JSON file that says what was run, on what, for how long, and what it gave."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml

from ftd_lightning.command_line import parse_command
from ftd_lightning.core.evaluation import mean_and_std
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore
from ftd_lightning.files.safetensors_io import replacing, versions, write_json
from ftd_lightning.modules import FlatTeacher
from ftd_lightning.shipped_configs import read_config
from ftd_lightning.studies.compare import advance, report, threads_of
from ftd_lightning.studies.comparison import Comparison, Published, of, published
from ftd_lightning.studies.fits import TEACHERS, TimeSlice, arguments_by_phase, deciding
from ftd_lightning.studies.tables import text, without_machine_paths

if TYPE_CHECKING:
    from collections.abc import Mapping


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


EPOCHS = "--model.epochs"  # of teachers
IMAGES = {"raw": False, "ema": True}


class Cell(NamedTuple):
    """A cell of the published tables, and how much of its published size is run; None is all of it.

    Attributes:
        dataset: a data set's name, or a folder of shipped configs.
        ipc: images per class.
        method: as in ``distill_METHOD_ipcN``.
        teachers: how many.
        iterations: of the distillation.
        epochs: of the evaluations.
        teacher_epochs: of each teacher; None: as many as the distillation reads, 0: as many as published.
    """

    dataset: str = "cifar10"
    ipc: int = 10
    method: str = "ftd"
    teachers: int | None = None
    iterations: int | None = None
    epochs: int | None = None
    teacher_epochs: int | None = None


@dataclass
class Reproduction:
    """A cell, the sizes that its configs have, and the comparison that runs it."""

    cell: Cell
    configs: Published
    published: dict[str, int]  # teachers, iterations and epochs of the configs as they are
    job: Comparison


def averages_images(config: Path) -> bool:
    """Tell whether a distillation's config keeps a moving average of the images."""
    callbacks = read_config(config).get("trainer", {}).get("callbacks") or []
    return any(str(callback.get("class_path", "")).endswith("SyntheticEMA") for callback in callbacks)


def teacher_length(
    cell: Cell, distill: Mapping[str, Any], teacher: Mapping[str, Any], overrides: Sequence[str]
) -> list[Any]:
    """Give the arguments that make teachers as long as a distillation reads them.

    Their learning rate is constant and their batches follow from (seed, teacher, epoch), so these are the published
    teachers as far as they go: 3, 21 and 41 epochs instead of 50 at 1, 10 and 50 images per class of CIFAR-10.

    Args:
        cell: what is asked for.
        distill: the config of the distillation.
        teacher: that of its teachers.
        overrides: options for the fits, of which those that change what is read count.
    """
    if cell.teacher_epochs == 0:
        return []
    if cell.teacher_epochs is not None:
        return [EPOCHS, cell.teacher_epochs]
    phases = arguments_by_phase(overrides)
    if any(argument.split("=", 1)[0] == EPOCHS for argument in phases["teacher"]):
        return []
    read = distill["model"]["init_args"]
    changed = dict(deciding(phases["distill"]))
    last = int(changed.get("--model.max_start_epoch", read["max_start_epoch"])) - 1
    length = last + int(changed.get("--model.expert_epochs", read["expert_epochs"]))
    published: int = teacher["model"]["init_args"].get("epochs", default_of("epochs"))
    return [EPOCHS, length] if length < published else []


def default_of(name: str) -> Any:
    """Give the default of an argument of ``FlatTeacher``."""
    return inspect.signature(FlatTeacher).parameters[name].default


def plan(cell: Cell, overrides: Sequence[str] = ()) -> Reproduction:
    """Find what a command asks for.

    Args:
        cell: what to reproduce.
        overrides: options for the fits.

    Raises:
        InputError: for settings that do not ship, or a method without teachers.
    """
    configs = published(cell.dataset, cell.ipc, cell.method)
    if configs.teacher is None:
        raise InputError(f"{configs.distill}: its method has no teachers; ftd reproduce is for those that do")
    teacher, distill, evaluate = map(read_config, (configs.teacher, configs.distill, configs.evaluate))
    sizes = {
        "teachers": teacher["model"]["init_args"].get("teachers", default_of("teachers")),
        "iterations": distill["trainer"]["max_steps"],
        "epochs": evaluate["trainer"]["max_epochs"],
    }
    asked = {name: getattr(cell, name) or size for name, size in sizes.items()}
    length = teacher_length(cell, distill, teacher, overrides)
    common = {
        "distill": str(configs.distill),
        "distill_arguments": [*configs.ipc, "--trainer.max_steps", asked["iterations"]],
        "evaluate_arguments": ["--trainer.max_epochs", asked["epochs"]],
        "teachers": "teachers",
    }
    kinds = [name for name, ema in IMAGES.items() if not ema or averages_images(configs.distill)]
    rows = {
        f"{name}-{iterate}": {"label": f"{name}, {iterate}", "ema": IMAGES[name], "iterate": iterate, **common}
        for name in kinds
        for iterate in ("last", "chosen")
    }
    name = f"reproduce_{cell.method}_ipc{cell.ipc}_{asked['teachers']}teachers"
    name += f"_{asked['iterations']}iterations" if asked["iterations"] != sizes["iterations"] else ""
    name += f"_{cell.teacher_epochs or 'published'}teacherepochs" if cell.teacher_epochs is not None else ""
    name += f"_evaluated{asked['epochs']}epochs" if asked["epochs"] != sizes["epochs"] else ""
    if changed := deciding(overrides):
        name += "_" + hashlib.blake2b(json.dumps(changed).encode(), digest_size=3).hexdigest()
    runs = Path("runs") / cell.dataset
    given: dict[str, Any] = {
        "title": f"{cell.dataset}, {cell.ipc} images per class, {cell.method.upper()}",
        "dataset": read_config(configs.evaluate)["data"]["init_args"]["dataset"],
        "ipc": cell.ipc,
        "run": str(runs / name),
        "fits": str(runs / "fits"),
        "arguments": list(configs.arguments),
        "teachers": {"teachers": {"config": str(configs.teacher), "arguments": [TEACHERS, asked["teachers"], *length]}},
        "evaluate": str(configs.evaluate),
        "rows": rows,
    }
    if configs.arguments:  # of a subset of ImageNet: an evaluation names its data set after the shared arguments
        given["dataset"] = cell.dataset
    job = of(given, configs.distill.parent / "reproduce.yaml", overrides, name="ftd reproduce")
    return Reproduction(cell, configs, sizes, job)


RECORDS = Path("notebooks/results")


def reproduce(
    *,
    dataset: str = "cifar10",
    ipc: int = 10,
    method: str = "ftd",
    teachers: int | None = None,
    iterations: int | None = None,
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    stop_after: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train teachers, distil and evaluate with the published settings of a data set, and append a record.

    Resumes where it stopped. Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or
    --evaluate. in front (--teacher.model.epochs 10) go to the fits of that phase.

    Args:
        dataset: a data set's name, or a folder of shipped configs (cifar10-part).
        ipc: images per class.
        method: ftd or mtt.
        teachers: how many; by default as the config says.
        iterations: of the distillation; by default as the config says.
        epochs: of the evaluations; by default as the config says.
        teacher_epochs: of each teacher; by default as many as the distillation reads, 0 for as many as published.
        stop_after: minutes; the same command continues.
        overrides: further options, for the fits.

    Raises:
        InputError: for settings that do not ship.
        SystemExit: with code 1 if a fit fails.
    """
    cell = Cell(dataset, ipc, method, teachers, iterations, epochs, teacher_epochs)
    reproduction = plan(cell, overrides)
    job = reproduction.job
    with threads_of(job):
        failures, in_time = advance(job, list(job.rows.values()), TimeSlice(stop_after))
        results = report(job, failures)
    print(f"\n{results['title']}\n\n{text(results)}\n")
    for reason in dict.fromkeys(failures.values()):
        print(f"failed    {reason}")
    if not in_time:
        print("not done: run the same command again")
        return
    if failures:
        sys.exit(1)
    written = job.folder / "record.txt"  # names the record of this run
    if not written.is_file() or not Path(written.read_text(encoding="utf-8").strip()).is_file():
        record = make_record(reproduction, results, overrides)
        path = free_name(RECORDS, f"{dataset}_{job.folder.name.removeprefix('reproduce_')}")
        # Its name first: a kill between the two leaves a name without a file, and the next command writes it.
        with replacing(written) as part:
            part.write_text(f"{path}\n", encoding="utf-8")
        write_record(path, record)
    print(f"done: {written.read_text(encoding='utf-8').strip()}; make results puts it into the tables")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd reproduce``."""
    reproduce(**parse_command(reproduce, "reproduce", arguments))
