"""The YAML file of a comparison, and the fits of its rows."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.errors import InputError
from ftd_lightning.files import TrajectoryStore
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.shipped_configs import find_config, read_config
from ftd_lightning.studies.fits import Fit, FitNames, Settings, split_by_phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EVALUATION = "evaluation.json"
SETTINGS = ("distill", "evaluate")  # of a row
SET, BEST = "set.safetensors", "best.safetensors"  # the last images; those that held-out images chose
PEAK_MEMORY = "--trainer.callbacks+=ftd_lightning.callbacks.progress.PeakMemory"


@dataclass(frozen=True)
class Teachers(Settings):
    """Teachers of a comparison: a config with settings, or the folder of a store that is there already."""

    store: str | None = None


@dataclass(frozen=True)
class Row:
    """A method of a comparison, or a value of a study. It has one of ``distill``, ``synthetic`` and ``set``."""

    label: str | None = None  # its name in tables; by default its key
    distill: Settings | None = None
    synthetic: str | None = None  # real images: "random", "herding", "k-center", or "real" for all of them
    set: str | None = None  # file of a synthetic set
    teachers: str | None = None  # name of those that distil, choose or label the images
    labels: Literal["teacher"] | None = None  # gives random images the labels of a teacher
    ema: bool = False  # evaluate the averaged images
    iterate: Literal["last", "chosen"] = "last"  # evaluate the images that held-out ones chose while distilling
    evaluate: Settings = field(default_factory=Settings)  # over that of the comparison
    paired_with: str | None = None  # the row that this one is compared with, network by network
    x: float | None = None  # the value of a study, for its plot
    reference: bool = False  # a line in the plot

    def problem(self, teachers: Sequence[str]) -> str | None:
        """Say what is wrong with the row; None for nothing."""
        sources = [key for key in ("distill", "synthetic", "set") if getattr(self, key) is not None]
        if len(sources) != 1:
            return f"names {' and '.join(sources) or 'no images'}; give one of distill, synthetic, set"
        if self.synthetic not in (None, *BASELINES):
            return f"synthetic is one of {', '.join(BASELINES)}; give a file as set"
        if self.set is not None and not Path(self.set).is_file():
            return f"its set {self.set} is not there"
        if self.teachers is not None and self.teachers not in teachers:
            return f"unknown teachers {self.teachers}; there are {', '.join(teachers) or 'none'}"
        if self.teachers is None and (self.labels or self.synthetic in ("herding", "k-center")):
            return "needs the name of its teachers"
        if self.labels and (self.synthetic != "random" or self.ema):
            return "labels: teacher is for random images (synthetic: random), which have no average"
        return None


@dataclass
class Comparison:
    """Rows that are evaluated alike, from a YAML file; an evaluation is a config, or a config with settings."""

    dataset: str
    run: str  # folder of the results
    evaluate: Settings
    rows: dict[str, Row]
    title: str | None = None  # of tables and plots; by default the name of the file
    ipc: Ipc = 1  # images per class, or a list of those of each
    fits: str | None = None  # folder of the fits; comparisons that name the same folder share equal fits
    cost: str | None = None  # of all rows, in words
    threads: int | None = None  # of each fit on a CPU, unless OMP_NUM_THREADS says
    jobs: PositiveInt = 1  # rows that run at the same time
    teachers: dict[str, Teachers] = field(default_factory=dict)
    distill: Settings = field(default_factory=Settings)  # of all distillations, under those of a row
    networks: dict[str, Settings] = field(default_factory=dict)  # of the evaluation on each, where there are several
    paired_with: str | None = None  # the row that others are compared with, unless they name another
    plot: str | None = None  # label of the x axis
    file: Path = Path("comparison.yaml")  # configs are looked for beside it first
    overrides: dict[str, list[str]] = field(default_factory=lambda: split_by_phase([]))  # by phase, over all settings

    def __post_init__(self) -> None:
        self.folder = Path(self.run)
        self.networks = self.networks or {"": Settings()}
        self._names = FitNames()
        self._fits: dict[str, RowFits] = {}
        for name, row in self.rows.items():
            problem = row.problem(list(self.teachers))
            if not re.fullmatch(r"[\w.+-]+", name):
                problem = "its name names a file too: letters, digits and _ . + - only"
            if (base := self.base(name)) not in (None, *self.rows):
                problem = f"paired_with: {base} is not a row; there are {', '.join(self.rows)}"
            if problem:
                raise InputError(f"{self.file}: row {name}: {problem}")

    @classmethod
    def from_file(cls, name: Path, overrides: Sequence[str] = ()) -> Comparison:
        """Read a comparison: a file, or a shipped one by its name."""
        file = find_config(name)
        return cls.from_dict(read_config(file), file, overrides)

    @classmethod
    def from_dict(cls, given: dict[str, Any], file: Path, overrides: Sequence[str] = ()) -> Comparison:
        """Build a comparison from the content of a file; a key or a value that is not known raises InputError."""
        given = {**given, "evaluate": _expanded(given.get("evaluate"))}
        for key in ("rows", "teachers", "networks"):
            if isinstance(given.get(key), dict):
                given[key] = {str(name): _expanded(entry) for name, entry in given[key].items()}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, skip={"file", "overrides"})
        try:
            missing = [key for key in ("dataset", "run", "evaluate", "rows") if not given.get(key)]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}")
            found: dict[str, Any] = parser.parse_object(given).as_dict()
            # Not by the parser: it would make objects of the class paths within settings.
            for entry in (found, *found["rows"].values()):
                entry |= {key: Settings(**entry[key]) for key in SETTINGS if entry[key] is not None}
            for key, kind in {"rows": Row, "teachers": Teachers, "networks": Settings}.items():
                found[key] = {name: kind(**entry) for name, entry in found[key].items()}
            return cls(**found, file=file, overrides=split_by_phase(overrides))
        except InputError:
            raise
        except Exception as error:  # jsonargparse raises several kinds
            raise InputError(f"{file}: {' '.join(str(error).split())[:400]}") from error

    def base(self, name: str) -> str | None:
        """Return the row that a row is compared with; None where there is none, or it is the same."""
        base = self.rows[name].paired_with or self.paired_with
        return None if base == name else base

    def fits_of(self, name: str) -> RowFits:
        """Return the fits of a row; a config that is not there raises InputError."""
        if name not in self._fits:
            self._fits[name] = self._plan(self.rows[name], name)
        return self._fits[name]

    def _fit(
        self, title: str, name: str, settings: Settings, options: list[str], depends: list[Any], **rest: Any
    ) -> Fit:
        if settings.config is None:
            raise InputError(f"{self.file}: names settings without a config: give config: NAME")
        config = find_config(settings.config, near=self.file.parent)
        identity = self._names.identity(config, options, *depends)
        folder = self._names.folder(Path(self.fits or self.folder / "fits"), re.sub(r"[^\w.+-]+", "-", name), identity)
        return Fit(title, config, tuple(options), folder, identity=identity, **rest)

    def _plan(self, row: Row, name: str) -> RowFits:
        label = row.label or name
        teachers, store, taught = self._teachers(row)
        trajectories = [] if store is None else [f"trajectories={store}"]
        from_store = _given(*(f"--data.{option}" for option in trajectories))
        distill, labels = None, None
        if row.distill is not None:
            options = [*self.distill.options(), *row.distill.options(), *self.overrides["distill"]]
            rest = {"output": SET, "inputs": _given(*(f"--model.{option}" for option in trajectories), PEAK_MEMORY)}
            distill = self._fit(f"{label}: distillation", f"distill_{name}", row.distill, options, taught, **rest)
        if row.labels is not None:
            options = [*self._evaluation_options(row, next(iter(self.networks))), f"--data.ipc={self.ipc}"]
            rest = {"output": SET, "inputs": from_store, "subcommand": "label"}
            title, depends = f"{label}: labels of a teacher", [*taught, "labels"]
            labels = self._fit(title, f"labels_{name}", self._evaluation(row), options, depends, **rest)
        made, evaluations = distill or labels, dict[str, Fit]()
        for network in self.networks:
            options, inputs = self._evaluation_options(row, network), from_store
            if made is not None:
                depends, inputs = [made.identity, row.iterate], partial(_evaluated, made, row.iterate)
            elif row.set is not None:
                depends = [hashlib.blake2b(Path(row.set).read_bytes()).hexdigest()]
                inputs = _given(f"--data.synthetic={row.set}")
            else:
                options += [f"--data.synthetic={row.synthetic}", f"--data.ipc={self.ipc}"]
                depends = taught
            title = f"{label}: evaluation{f' on {network}' if network else ''}"
            own, rest = f"evaluate_{name}{f'_{network}' if network else ''}", {"output": EVALUATION, "inputs": inputs}
            evaluations[network] = self._fit(title, own, self._evaluation(row), options, depends, **rest)
        return RowFits(store, teachers, distill, labels, evaluations)

    def _teachers(self, row: Row) -> tuple[Fit | None, Path | None, list[Any]]:
        """Return the fit of a row's teachers, their store, and what identifies them."""
        if row.teachers is None:
            return None, None, []
        entry = self.teachers[row.teachers]
        if entry.store is not None:
            try:
                store = TrajectoryStore(entry.store)
                return None, Path(entry.store), [store.teacher_metadata(index) for index in range(len(store))]
            except InputError:  # not there yet
                return None, Path(entry.store), [entry.store]
        options = [*entry.options(), *self.overrides["teacher"]]
        title, file = f"teachers {row.teachers}", "trajectories/teacher_0000.safetensors"
        fit = self._fit(title, f"teacher_{row.teachers}", entry, options, [], output=file)
        return fit, fit.folder / "trajectories", [fit.identity]

    def _evaluation(self, row: Row) -> Settings:
        return self.evaluate if row.evaluate.config is None else row.evaluate

    def _evaluation_options(self, row: Row, network: str) -> list[str]:
        options = [f"--data.dataset={self.dataset}", f"--data.ema={str(row.ema).lower()}"]
        for settings in (self.evaluate, self.networks[network], row.evaluate):
            options += settings.options()
        return [*options, *self.overrides["evaluate"]]

    def set_file(self, name: str) -> Path | None:
        """Return the file of a row's set; None for real images."""
        row, fits = self.rows[name], self.fits_of(name)
        made = fits.distill or fits.labels
        return made_set(made, row.iterate) if made else Path(row.set) if row.set else None


class RowFits(NamedTuple):
    """The store of a row's teachers, and its fits in the order in which they run."""

    store: Path | None
    teachers: Fit | None
    distill: Fit | None
    labels: Fit | None
    evaluations: dict[str, Fit]  # by network

    def each(self) -> Iterator[Fit]:
        """Yield the fits that there are."""
        yield from (fit for fit in (self.teachers, self.distill, self.labels) if fit is not None)
        yield from self.evaluations.values()


def made_set(fit: Fit, iterate: str) -> Path:
    """Return the set of a distillation: the last images where none were chosen."""
    best = fit.folder / BEST
    return best if iterate == "chosen" and best.is_file() else fit.folder / SET


def _evaluated(fit: Fit, iterate: str) -> list[str]:
    return [f"--data.synthetic={made_set(fit, iterate)}"]


def _given(*options: str) -> Callable[[], Sequence[str]]:
    return lambda: options


def _expanded(entry: Any) -> Any:
    """Expand names of configs: ``evaluate: NAME`` is ``evaluate: {config: NAME}``."""
    if isinstance(entry, str):
        return {"config": entry}
    if not isinstance(entry, dict):
        return entry
    return {key: _expanded(value) if key in SETTINGS else value for key, value in entry.items()}
