"""A cell of the published tables as a comparison: its rows are the images and iterates of one distillation."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftd_lightning.errors import InputError
from ftd_lightning.modules import FlatTeacher
from ftd_lightning.shipped_configs import read_config
from ftd_lightning.studies.comparison_plan import Comparison, of
from ftd_lightning.studies.fit_names import TEACHERS, arguments_by_phase, deciding
from ftd_lightning.studies.published import Published, published

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
