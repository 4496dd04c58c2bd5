"""What a comparison consists of: its YAML file as rows, and the fits that each row takes.

A fit lies in a folder that is named after its config and a hash of all that decides its numbers. So rows, and
comparisons that name the same ``fits``, share what is the same, and a config that has changed begins anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftd_lightning.data import SyntheticSet
from ftd_lightning.data.trajectory_store import teacher_file
from ftd_lightning.errors import InputError
from ftd_lightning.lightning_cli import with_bases
from ftd_lightning.studies.comparison_checks import check
from ftd_lightning.studies.fit_steps import FitStep
from ftd_lightning.studies.resolved_configs import NO_SETTING, PHASES, arguments_by_phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PEAK_MEMORY = "--trainer.callbacks+=ftd_lightning.callbacks.peak_memory.PeakMemory"
COUNTS = ("teachers", "max_steps", "max_epochs", "trajectories", "synthetic", "ema")  # these do decide numbers here


def as_arguments(given: Iterable[Any] | None) -> tuple[str, ...]:
    """Write what YAML read as the arguments of a command.

    Example:
        >>> as_arguments(["--data.zca", True, "--model.rho", 0.005, "--model.augment", ""])
        ('--data.zca', 'true', '--model.rho', '0.005', '--model.augment', '')
    """
    return tuple(argument if isinstance(argument, str) else json.dumps(argument) for argument in given or ())


def deciding(arguments: Sequence[str]) -> list[list[str]]:
    """Pair settings with their values, without those that decide no number: where files lie, what computes.

    Example:
        >>> deciding(["--data.root", "here", "--model.lr=3", "--data.zca", "true"])
        [['--model.lr', '3'], ['--data.zca', 'true']]
    """
    without = {f"--{part}.{key}" for part, keys in NO_SETTING.items() for key in keys if key not in COUNTS}
    pairs: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            pairs.append(argument.split("=", 1))
        elif pairs:
            pairs[-1].append(argument)
    return [pair for pair in pairs if pair[0] not in without]


def contents(config: Path) -> list[dict[str, Any]]:
    """Read a config and what it builds on, base first, without the names of logs.

    Raises:
        InputError: for a config that is not there, naming those that are, or one that is no YAML.
    """
    if not config.is_file():
        there = ", ".join(sorted(path.name for path in config.parent.glob("*.yaml"))) or "no configs there"
        raise InputError(f"{config}: no such config; there are {there}")
    parts = []
    for argument in with_bases(["--config", str(config)]):
        if argument != "--config":
            part = yaml.safe_load(
                Path(argument).read_text(encoding="utf-8")
                if "\n" not in argument and Path(argument).is_file()
                else argument
            )
            if not isinstance(part, dict):
                raise InputError(f"{config}: is no config of a fit")
            part.get("trainer", {}).pop("logger", None)
            parts.append(part)
    return parts


def name_of(config: Path, arguments: Sequence[str], *depends: str) -> str:
    """Name a fit's folder: its config, and a hash of its settings and of what it starts from."""
    text = json.dumps([contents(config), deciding(arguments), depends], sort_keys=True, default=str)
    return f"{config.stem}_{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _saved(folder: Path) -> dict[str, Any]:
    """Give the resolved settings that a fit left beside its logs; empty where it has not begun."""
    file = folder / "config.yaml"
    read: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return read


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
        """Find a config, which is named relative to the comparison's file."""
        return self.file.parent / name

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
        arguments = (*as_arguments(entry.get("arguments")), *self.arguments["teacher"])
        folder = self.fits / name_of(config, arguments)

        def finished() -> bool:
            count = _saved(folder).get("model", {}).get("init_args", {}).get("teachers", 0)
            return count > 0 and all(teacher_file(folder / "trajectories", i).is_file() for i in range(count))

        return FitStep(f"teachers {name}", config, folder, arguments, finished, 1)

    def store(self, row: Row) -> tuple[Path, str] | None:
        """Say where a row's teachers lie, and what names them for good; None where it has none."""
        name = row.given.get("teachers")
        if name is None:
            return None
        step = self.teacher_step(name)
        if step is None:
            store = Path(self.teachers(name)["store"])
            return store, str(store)
        return step.folder / "trajectories", step.folder.name

    def distill_step(self, row: Row) -> FitStep | None:
        """Give the distillation of a row; None where it has none. Rows with the same one share it."""
        if "distill" not in row.given:
            return None
        config, store = self.config(row.given["distill"]), self.store(row)
        arguments = (*as_arguments(row.given.get("distill_arguments")), *self.arguments["distill"])
        folder = self.fits / name_of(config, arguments, *([store[1]] if store else []))
        file = folder / "set.safetensors"

        def finished() -> bool:
            saved = _saved(folder)
            if not saved or not file.is_file():
                return False
            made, steps = SyntheticSet.load(file).metadata, saved["trainer"]["max_steps"]
            rounds = saved["model"]["init_args"].get("rounds")
            if rounds is None:
                return bool(made["iterations"] >= steps)
            # A method that counts rounds ends by itself, if max_steps (-1: none) does not end it before.
            return made.get("rounds", 0) >= rounds or 0 <= steps <= made["iterations"]

        further = ["--model.trajectories", str(store[0])] if store else []
        return FitStep(f"{row.name}: distillation", config, folder, (*arguments, *further, PEAK_MEMORY), finished, 1)

    def set_file(self, row: Row) -> Path | None:
        """Say where a row's set lies; None for real images."""
        step = self.distill_step(row)
        if step is not None:
            return step.folder / "set.safetensors"
        return Path(row.given["set"]) if "set" in row.given else None

    def evaluation_step(self, row: Row, network: str) -> FitStep:
        """Give an evaluation of a row."""
        config = self.config(row.given.get("evaluate", self.given["evaluate"]))
        ema = str(bool(row.given.get("ema", False))).lower()
        arguments = ("--data.dataset", str(self.given["dataset"]), "--data.ema", ema, *self.networks[network])
        arguments += (*as_arguments(row.given.get("evaluate_arguments")), *self.arguments["evaluate"])
        distill, file = self.distill_step(row), self.set_file(row)
        source = ["--data.synthetic", str(file or row.given["synthetic"])]
        if file is None:
            source += ["--data.ipc", str(self.given.get("ipc", 1))]
            depends = [*source]
            if (store := self.store(row)) is not None:
                source += ["--data.trajectories", str(store[0])]
                depends.append(store[1])
        elif distill is not None:
            depends = [distill.folder.name]
        else:
            depends = [hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()]
        folder = self.fits / name_of(config, arguments, *depends)
        title = f"{row.name}: evaluation{f' on {network}' if network else ''}"
        return FitStep(title, config, folder, (*arguments, *source), (folder / "evaluation.json").is_file, 1)

    def steps(self, row: Row) -> list[FitStep]:
        """Give the fits of a row in the order in which they are done."""
        teachers = row.given.get("teachers")
        first = [self.teacher_step(teachers) if teachers is not None else None, self.distill_step(row)]
        evaluations = [self.evaluation_step(row, network) for network in self.networks]
        return [*(step for step in first if step is not None), *evaluations]


def load(file: Path, further: Sequence[str] = (), only: Sequence[str] = ()) -> Comparison:
    """Read a comparison and check all that can be known before the first fit.

    Args:
        file: the YAML file.
        further: arguments for the fits; those of one phase begin with --teacher., --distill. or --evaluate.
        only: names of the rows that are to be run, whose configs have to be there; all by default.

    Raises:
        InputError: for a file, a config, a row, teachers or a key that is not there or not known.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{file}: is no YAML: {' '.join(str(error).split())}") from error
    check(str(file), given)
    rows = {str(name): Row(str(name), entry) for name, entry in given["rows"].items()}
    unknown = [name for name in only if name not in rows]
    if unknown:
        raise InputError(f"{file}: has no row {', '.join(unknown)}; there are {', '.join(rows)}")
    own, added = arguments_by_phase(as_arguments(given.get("arguments"))), arguments_by_phase(further)
    job = Comparison(file, given, rows, {phase: [*own[phase], *added[phase]] for phase in PHASES})
    for name in only or rows:
        job.steps(rows[name])  # reads every config
    return job
