"""What the YAML file of a comparison may hold: all that can be known of it without reading a config."""

from __future__ import annotations

import hashlib
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore
from ftd_lightning.files.safetensors_io import read_json
from ftd_lightning.files.trajectory_store import store_data_file, teacher_file
from ftd_lightning.modules.class_matching import PUBLISHED_LOOPS
from ftd_lightning.shipped_configs import SHIPPED, find_config, read_config, shipped_names
from ftd_lightning.studies.fits import (
    PHASES,
    TEACHERS,
    FitNames,
    FitStep,
    arguments_by_phase,
    as_arguments,
    read_notes,
    teacher_count,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


KEYS = {
    *("title", "cost", "dataset", "ipc", "run", "fits", "threads", "arguments"),
    *("teachers", "evaluate", "networks", "rows", "plot", "paired_with", "distill_minutes"),
}
ROW_KEYS = {
    *("label", "synthetic", "labels", "distill", "set", "teachers", "ema", "x", "reference"),
    *("distill_arguments", "distill_minutes", "iterate", "evaluate", "evaluate_arguments", "paired_with"),
}
SOURCES = ("synthetic", "distill", "set")
TEACHER_KEYS = {"config", "arguments", "store"}
BY_FEATURES = ("herding", "k-center")
ITERATES = ("last", "chosen")  # on held-out images, while it was distilled
MAPPINGS = ("rows", "networks", "teachers")


def check_bases(where: str, rows: Mapping[str, Any], base: object) -> None:
    """Check what rows are compared with.

    Args:
        where: what errors call the comparison.
        rows: of its file.
        base: the row that all are compared with by default, or None.

    Raises:
        InputError: for a name that is no row, or a row that is compared with itself.
    """
    for name, row in {"": {"paired_with": base}, **rows}.items():
        given = row.get("paired_with") if isinstance(row, dict) else None
        if given is not None and given not in rows:
            raise InputError(f"{where}: paired_with: {given} is no row; there are {', '.join(map(str, rows))}")
        if given is not None and given == name:
            raise InputError(f"{where}: row {name}: is paired with itself")


def _known(where: str, given: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{where}: names no settings")
    unknown = sorted(str(key) for key in {*given} - keys)
    if unknown:
        raise InputError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(sorted(keys))}")
    return given


def _check_minutes(where: str, given: dict[str, Any]) -> None:
    minutes = given.get("distill_minutes")
    if minutes is None:
        return
    number = not isinstance(minutes, bool) and isinstance(minutes, int | float)
    if not number or not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"{where}: distill_minutes={minutes!r} is no number of minutes above 0")


def _check_row(where: str, given: dict[str, Any], teachers: dict[str, Any]) -> None:
    sources = [key for key in SOURCES if key in given]
    if len(sources) != 1:
        raise InputError(f"{where}: names {' and '.join(sources) or 'no set'}; give one of {', '.join(SOURCES)}")
    if given.get("synthetic", "real") not in BASELINES:
        raise InputError(f"{where}: synthetic is one of {', '.join(BASELINES)}; give a file as set")
    if "set" in given and not Path(given["set"]).is_file():
        raise InputError(f"{where}: its set {given['set']} is not there")
    if given.get("iterate", "last") not in ITERATES or ("iterate" in given and "distill" not in given):
        raise InputError(f"{where}: iterate is one of {', '.join(ITERATES)}, of a row that distils")
    if "distill_minutes" in given and "distill" not in given:
        raise InputError(f"{where}: distill_minutes belongs to a row that distils")
    _check_minutes(where, given)
    name = given.get("teachers")
    if name is not None and name not in teachers:
        raise InputError(f"{where}: unknown teachers {name}; there are {', '.join(teachers) or 'none'}")
    if given.get("synthetic") in BY_FEATURES and name is None:
        raise InputError(f"{where}: {given['synthetic']} goes by the features of a teacher; give its teachers")
    if "labels" in given and (given["labels"] != "teacher" or given.get("synthetic") != "random" or name is None):
        raise InputError(f"{where}: labels: teacher is for a row of random images (synthetic: random) with teachers")
    if "labels" in given and given.get("ema"):
        raise InputError(f"{where}: random images have no average, leave out ema")
    x = given.get("x", 0)
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        hint = " (YAML reads 5e-3 as a word; write 5.0e-3)" if isinstance(x, str) else ""
        raise InputError(f"{where}: x={x!r} is no number{hint}")


def check(file: str, given: Any) -> None:
    """Check what was read of a comparison's file.

    Args:
        file: its name, for errors.
        given: what YAML read.

    Raises:
        InputError: for a key, a row or teachers that are not known, or values of another kind.
    """
    _known(file, given, KEYS)
    missing = [key for key in ("dataset", "run", "evaluate", "rows") if not given.get(key)]
    if missing:
        raise InputError(f"{file}: lacks {', '.join(missing)}")
    for key in MAPPINGS:
        if not isinstance(given.get(key) or {}, dict) or given.get(key) == []:
            raise InputError(f"{file}: {key} is no mapping of names")
    _check_minutes(file, given)
    if "plot" in given and (not isinstance(given["plot"], dict) or "x" not in given["plot"]):
        raise InputError(f"{file}: plot names no x, which is the name of its axis: plot: {{x: rho}}")
    teachers = given.get("teachers") or {}
    for name, entry in teachers.items():
        entry = _known(
            f"{file}: teachers {name}", entry if isinstance(entry, dict) else {"config": entry}, TEACHER_KEYS
        )
        if ("config" in entry) == ("store" in entry):
            raise InputError(f"{file}: teachers {name}: give either config or store")
    for name, entry in given["rows"].items():
        where = f"{file}: row {name}"
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise InputError(f"{where}: names a file too: letters, digits and _ . + - only")
        _check_row(where, _known(where, entry, ROW_KEYS), teachers)
    check_bases(file, given["rows"], given.get("paired_with"))


IMAGENET = "imagenet"  # the folder that the subsets share


class Published(NamedTuple):
    """Configs of a distillation and of what it needs.

    Attributes:
        distill: file of the distillation.
        evaluate: file of the evaluation.
        teacher: file of the teachers; None for a method without.
        arguments: of all three, for what the files leave to the command line.
        ipc: arguments of the distillation alone.
    """

    distill: Path
    evaluate: Path
    teacher: Path | None
    arguments: tuple[str, ...]
    ipc: tuple[str, ...]


def _first(names: Iterable[str]) -> Path | None:
    known = set(shipped_names())
    return next((SHIPPED / f"{name}.yaml" for name in names if name in known), None)


def published(dataset: str, ipc: int, method: str) -> Published:
    """Find the shipped configs of a method on a data set.

    Args:
        dataset: a data set's name, or a folder of shipped configs (cifar10-part).
        ipc: images per class.
        method: as in ``distill_METHOD`` or ``distill_METHOD_ipcN``.

    Raises:
        InputError: if there are none, naming those that there are.

    Example:
        >>> published("imagewoof", 10, "ftd").arguments
        ('--data.dataset', 'imagewoof')
    """
    folders = {name.partition("/")[0] for name in shipped_names()}
    folder = IMAGENET if dataset in SUBSETS else dataset
    if folder not in folders:
        raise InputError(f"{dataset}: no settings ship for it; there are {', '.join(sorted(folders))}")
    whole = f"{folder}/distill_{method}_ipc{ipc}"
    distill = _first([whole, f"{folder}/distill_{method}"])
    if distill is None and folder == "cifar100":  # rivals have the settings of CIFAR-10 there
        distill = _first([f"cifar10/distill_{method}"])
    if distill is None:
        there = ", ".join(name for name in shipped_names() if name.startswith(f"{folder}/distill_"))
        raise InputError(f"{whole}: no such config; there are {there}")
    named = read_config(distill)["data"]["init_args"]["dataset"]
    other = dataset in DATASETS and dataset != named
    return belonging(distill, ipc, ["--data.dataset", dataset] if other else [])


def belonging(distill: Path, ipc: int | None = None, arguments: Iterable[str] = ()) -> Published:
    """Find what belongs to a distillation's config: its teachers by their folder, and the evaluation beside it.

    Args:
        distill: its file.
        ipc: images per class; None: as the config says.
        arguments: for all of them.

    Raises:
        InputError: for a config without a method, or one whose teachers' config is not there.
    """
    model = read_config(distill).get("model", {})
    settings = model.get("init_args", {}) if isinstance(model, dict) else {}
    if not settings:
        raise InputError(f"{distill}: names no method; a config of a distillation is needed")
    teacher = None
    if (trajectories := settings.get("trajectories")) is not None:
        name = Path(trajectories).parent  # runs/DATASET/TEACHER, where the teachers of that config go
        teacher = find_config(name.relative_to("runs") if name.is_relative_to("runs") else name, near=distill.parent)
    own: list[str] = []
    if ipc is not None and ipc != settings.get("ipc"):
        own = ["--model.ipc", str(ipc)]
        if model["class_path"].endswith("GradientMatching") and ipc in PUBLISHED_LOOPS:
            # As many networks, with as many updates of the images on each as published for the ipc.
            networks = read_config(distill)["trainer"]["max_steps"] // PUBLISHED_LOOPS[settings["ipc"]][0]
            own += ["--trainer.max_steps", str(networks * PUBLISHED_LOOPS[ipc][0])]
    return Published(distill, find_config("evaluate", near=distill.parent), teacher, tuple(arguments), tuple(own))


PEAK_MEMORY = "--trainer.callbacks+=ftd_lightning.callbacks.progress.PeakMemory"


def link_teachers(store: Path, count: int, folder: Path) -> None:
    """Make a store of the first teachers of another one, which may hold more, without copying them."""
    teachers = TrajectoryStore(store)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*teachers.files[:count], store_data_file(store)):
        link = folder / file.name
        if file.is_file() and not link.is_symlink():
            link.symlink_to(os.path.relpath(file, folder))


def _saved(folder: Path) -> dict[str, Any]:
    """Give the resolved settings that a fit left beside its logs; empty where it has not begun."""
    file = folder / "config.yaml"
    read: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return read


def _max_time(minutes: float) -> str:
    """Spell minutes as the trainer reads them: days:hours:minutes:seconds."""
    seconds = round(timedelta(minutes=minutes).total_seconds())
    return f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


@dataclass
class Row:
    """A method of the comparison, or a value of a study."""

    name: str
    given: dict[str, Any]

    @property
    def label(self) -> str:
        """What tables call it."""
        return str(self.given.get("label", self.name))


@dataclass
class Comparison:
    """A YAML file, and the arguments that a command adds to it."""

    file: Path
    given: dict[str, Any]
    rows: dict[str, Row]
    arguments: dict[str, list[str]]  # a phase
    names: FitNames = field(default_factory=FitNames)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.given["run"])

    @property
    def fits(self) -> Path:
        """Where fits go."""
        return Path(self.given.get("fits", self.folder / "fits"))

    @property
    def networks(self) -> dict[str, tuple[str, ...]]:
        """Arguments of each network that sets are evaluated on; one without a name and arguments by default."""
        return {
            str(name): as_arguments(arguments) for name, arguments in (self.given.get("networks") or {"": []}).items()
        }

    def config(self, name: str) -> Path:
        """Find a config: one beside the comparison's file, one by its path, or a shipped one."""
        return find_config(name, near=self.file.parent)

    def teachers(self, name: str) -> dict[str, Any]:
        """Give the entry of some teachers."""
        entry = self.given["teachers"][name]
        return entry if isinstance(entry, dict) else {"config": entry}

    def teacher_step(self, name: str) -> FitStep | None:
        """Give the fit of some teachers; None for a store that is given."""
        entry = self.teachers(name)
        if "store" in entry:
            return None
        config = self.config(entry["config"])
        given = (*as_arguments(entry.get("arguments")), *self.arguments["teacher"])
        count, arguments = teacher_count(config, given)
        folder = self.fits / self.names.name(config, arguments)

        def finished() -> bool:
            return all(teacher_file(folder / "trajectories", index).is_file() for index in range(count))

        number = (TEACHERS, str(count))
        return FitStep(f"teachers {name}", config, folder, (*arguments, *number), finished, target=count)

    def store(self, row: Row) -> tuple[Path, Any] | None:
        """Return the folder of a row's teachers, and their identity as JSON holds it; None without teachers."""
        name = row.given.get("teachers")
        if name is None:
            return None
        step = self.teacher_step(name)
        if step is None:
            path = Path(self.teachers(name)["store"])
            with suppress(InputError):
                store = TrajectoryStore(path)
                return path, [store.teacher_metadata(index) for index in range(len(store))]
            return path, str(path)  # not there yet
        return step.folder / "trajectories", step.folder.name

    def distill_step(self, row: Row) -> FitStep | None:
        """Give the distillation of a row; None where it has none. Rows with the same one share it."""
        if "distill" not in row.given:
            return None
        config, store, teachers = self.config(row.given["distill"]), self.store(row), None
        arguments = (*as_arguments(row.given.get("distill_arguments")), *self.arguments["distill"])
        minutes = row.given.get("distill_minutes", self.given.get("distill_minutes"))
        if minutes is not None:
            arguments = (*arguments, "--trainer.max_time", _max_time(minutes))
        depends = [store[1]] if store else []
        if store and (teachers := self.teacher_step(row.given["teachers"])) is not None:
            depends.append(str(teachers.target))
        folder = self.fits / self.names.name(config, arguments, *depends)
        file = folder / "set.safetensors"

        def finished() -> bool:
            saved = _saved(folder)
            if not saved or not file.is_file():
                return False
            # Its time is over when the fit ended by itself after it: the trainer's clock goes on where it was resumed.
            if minutes is not None and read_notes(folder)["seconds"] >= 60 * minutes:
                return True
            made, steps = SyntheticSet.read_metadata(file), saved["trainer"]["max_steps"]
            rounds = saved["model"]["init_args"].get("rounds")
            if rounds is None:
                return bool(made["iterations"] >= steps)
            # A method that counts rounds ends by itself, if max_steps (-1: none) does not end it before.
            return made.get("rounds", 0) >= rounds or 0 <= steps <= made["iterations"]

        trajectories, prepare = store[0] if store else None, None
        if store and teachers is not None:
            trajectories = folder / "teachers"
            prepare = partial(link_teachers, store[0], teachers.target, trajectories)
        further = ["--model.trajectories", str(trajectories)] if trajectories else []
        arguments = (*arguments, *further, PEAK_MEMORY)
        return FitStep(f"{row.name}: distillation", config, folder, arguments, finished, prepare=prepare)

    def label_step(self, row: Row) -> FitStep | None:
        """Give the labelling of a row's random images by a teacher; None where they keep their classes."""
        store = self.store(row)
        if row.given.get("labels") is None or store is None:
            return None
        config, arguments = self._evaluation(row, next(iter(self.networks)))
        arguments = (*arguments, "--data.ipc", str(self.given.get("ipc", 1)))
        folder = self.fits / f"labels_{self.names.name(config, arguments, store[1])}"
        file, trajectories = folder / "set.safetensors", ("--data.trajectories", str(store[0]))
        title, words = f"{row.name}: labels of a teacher", ("label", str(file))
        return FitStep(title, config, folder, (*arguments, *trajectories), file.is_file, words=words)

    def set_file(self, row: Row) -> Path | None:
        """Say where a row's set lies; None for real images. A chosen iterate that is the last one is the last one."""
        labels = self.label_step(row)
        if labels is not None:
            return labels.folder / "set.safetensors"
        step = self.distill_step(row)
        if step is None:
            return Path(row.given["set"]) if "set" in row.given else None
        last, best = step.folder / "set.safetensors", step.folder / "best.safetensors"
        if row.given.get("iterate", "last") == "last" or not best.is_file():
            return last
        made = [SyntheticSet.read_metadata(file)["iterations"] for file in (last, best)]
        return last if made[0] == made[1] else best

    def _evaluation(self, row: Row, network: str) -> tuple[Path, tuple[str, ...]]:
        """Give the config of a row's evaluation, and its arguments but those that name the set."""
        config = self.config(row.given.get("evaluate", self.given["evaluate"]))
        ema = str(bool(row.given.get("ema", False))).lower()
        arguments = ("--data.dataset", str(self.given["dataset"]), "--data.ema", ema, *self.networks[network])
        arguments += (*as_arguments(row.given.get("evaluate_arguments")), *self.arguments["evaluate"])
        return config, arguments

    def evaluation_step(self, row: Row, network: str) -> FitStep:
        """Give an evaluation of a row."""
        config, arguments = self._evaluation(row, network)
        made, file = self.distill_step(row) or self.label_step(row), self.set_file(row)
        source = ["--data.synthetic", str(file or row.given["synthetic"])]
        if file is None:
            source += ["--data.ipc", str(self.given.get("ipc", 1))]
            depends = [*source]
            if (store := self.store(row)) is not None:
                source += ["--data.trajectories", str(store[0])]
                depends.append(store[1])
        elif made is not None:
            depends = [made.folder.name, *(["best"] if file.stem == "best" else [])]
        else:
            depends = [hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()]
        folder = self.fits / self.names.name(config, arguments, *depends)
        title = f"{row.name}: evaluation{f' on {network}' if network else ''}"

        def finished() -> bool:
            return {"accuracy", "each", "seeds", "epochs"} <= read_json(folder / "evaluation.json").keys()

        return FitStep(title, config, folder, (*arguments, *source), finished)

    def steps(self, row: Row) -> list[FitStep]:
        """Give the fits of a row in the order in which they are done."""
        teachers = row.given.get("teachers")
        first = [self.teacher_step(teachers) if teachers is not None else None]
        first += [self.distill_step(row), self.label_step(row)]
        evaluations = [self.evaluation_step(row, network) for network in self.networks]
        return [*(step for step in first if step is not None), *evaluations]


def of(
    given: Any, file: Path, further: Sequence[str] = (), only: Sequence[str] = (), *, name: str | None = None
) -> Comparison:
    """Check all that can be known of a comparison before its first fit.

    Args:
        given: what its YAML file holds.
        file: that file, beside which its configs are looked for; it need not exist.
        further: arguments for the fits; those of one phase begin with --teacher., --distill. or --evaluate.
        only: names of the rows that are to be run, whose configs have to be there; all by default.
        name: what errors call it; by default the file.

    Raises:
        InputError: for a config, a row, teachers or a key that is not there or not known.
    """
    name = name or str(file)
    check(name, given)
    rows = {str(row): Row(str(row), entry) for row, entry in given["rows"].items()}
    unknown = [row for row in only if row not in rows]
    if unknown:
        raise InputError(f"{name}: has no row {', '.join(unknown)}; there are {', '.join(rows)}")
    own, added = arguments_by_phase(as_arguments(given.get("arguments"))), arguments_by_phase(further)
    job = Comparison(file, given, rows, {phase: [*own[phase], *added[phase]] for phase in PHASES})
    for row in only or rows:
        job.steps(rows[row])  # reads every config
    return job


def load(file: Path, further: Sequence[str] = (), only: Sequence[str] = ()) -> Comparison:
    """Read a comparison: a file, or a shipped one by its name; see :func:`of`."""
    path = find_config(file)
    return of(read_config(path), path, further, only)
