"""One engine for all studies: fits in child processes, named after their settings and done once; kept results."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import ftd_lightning
import ftd_lightning.callbacks  # its classes have short names for the parser
from ftd_lightning.command_line import with_values
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import read_json, write_json
from ftd_lightning.files.trajectory_store import TrajectoryStore
from ftd_lightning.shipped_configs import read_config

if TYPE_CHECKING:
    from collections.abc import Iterator

PHASES = ("teacher", "distill", "evaluate")
# Data sets whose name does not identify their images. Others are published archives.
BY_CONTENTS = {"folder", "images", *SUBSETS}
WHERE = ("dataset", "root", "image_size", "test_fraction", "cache_dir", "skip_broken")  # options that find the images
# Settings that may differ between two fits with equal results.
NO_RESULT = {
    "data": ("root", "download", "on_device", "num_workers", "cache_dir"),
    "trainer": (
        *("accelerator", "logger", "enable_progress_bar", "enable_model_summary", "default_root_dir"),
        *("log_every_n_steps", "profiler"),
    ),
}
STATUS, LOG = "fit.json", "output.txt"
GRACE = 15.0  # seconds between asking a child to end and killing it
POLL = 0.5  # seconds between looks at a deadline that may be brought forward


@dataclass(frozen=True)
class Settings:
    """A config (a file, or a shipped one by its name), and arguments of model, data and trainer over its own."""

    config: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def options(self) -> list[str]:
        """Write the settings as options of ``ftd fit``, e.g. ``--model.network_options={"width": 32}``."""
        return [
            f"--{part}.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for part in ("model", "data", "trainer")
            for key, value in getattr(self, part).items()
        ]

    def having(self, **further: dict[str, Any]) -> Settings:
        """Return the settings with further ones of ``model``, ``data`` and ``trainer``."""
        parts: dict[str, Any] = {part: {**getattr(self, part), **values} for part, values in further.items()}
        return replace(self, **parts)


def split_by_phase(options: Sequence[str]) -> dict[str, list[str]]:
    """Give every phase its options of a command: ``--teacher.model.epochs=3`` is ``--model.epochs=3`` of one."""
    split: dict[str, list[str]] = {phase: [] for phase in PHASES}
    for option, *values in with_values(options):
        own, _, rest = option.removeprefix("--").partition(".")
        for phase in [own] if own in PHASES else PHASES:
            split[phase] += [f"--{rest}" if own in PHASES else option, *values]
    return split


def minor_version() -> str:
    """Return the version up to its minor number, within which a fit gives the same numbers."""
    return ".".join(ftd_lightning.__version__.split(".")[:2])


@cache
def _parser() -> LightningArgumentParser:
    """Build the parser of ``ftd fit``, without options of a single run, such as ``--ckpt_path``."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return parser


@cache
def _resolved(config: Path, content: bytes, options: tuple[str, ...]) -> dict[str, Any] | None:
    """Resolve settings; see :func:`resolved`. The content of the config belongs to the key: a file may change."""
    try:
        found: dict[str, Any] = _parser().parse_args(["--config", str(config), *options]).as_dict()
    except Exception:  # the import of a user's class can raise anything
        return None
    return found


def resolved(config: Path, options: Sequence[str]) -> dict[str, Any] | None:
    """Return all settings of a fit, defaults included, not to be changed; None for those that the parser refuses."""
    read_config(config)
    return _resolved(config, config.read_bytes(), tuple(options))


def teachers_of(network: Any) -> Any:
    """Replace the folder of a trajectory store, a backbone, by descriptions of its teachers; others stay."""
    with suppress(OSError, RuntimeError):  # a name that is too long for a path, or of a user that is not there
        if isinstance(network, str) and any((folder := Path(network).expanduser()).glob("teacher_*.safetensors")):
            store = TrajectoryStore(folder)
            return [store.teacher_metadata(index) for index in range(len(store))]
    return network


class FitNames:
    """Names the folders of fits. The images of a data set are described once."""

    def __init__(self) -> None:
        self._images: dict[str, dict[str, Any] | None] = {}
        self._folders: dict[Path, Path] = {}

    def _contents(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Describe the images of a fit by their contents, unless the data set's name identifies them."""
        if given.get("dataset") not in BY_CONTENTS:
            return None
        options: dict[str, Any] = {name: given.get(name) for name in WHERE}
        key = json.dumps(options)
        if key not in self._images:
            self._images[key] = None
            with suppress(InputError, OSError, TypeError):  # the fit reports why images cannot be read
                self._images[key] = DistillationDataModule(**options, download=False).describe()
        return self._images[key]

    def folder(self, parent: Path, name: str, identity: str) -> Path:
        """Return the folder of a fit: the one of that identity, which bears the name of the first that needed it."""
        there = (path for path in sorted(parent.glob(f"*_{identity}")) if path.is_dir())
        return self._folders.setdefault(parent / identity, next(there, parent / f"{name}_{identity}"))

    def identity(self, config: Path, options: Sequence[str], *depends: Any) -> str:
        """Hash all that decides the result of a fit.

        That is the settings with all defaults, the contents of the images, of a set to continue from and of the store
        of a backbone, identities of the inputs, and the minor version.
        """
        settings: Any = copy.deepcopy(resolved(config, options))
        contents = None
        if settings is None:
            settings = [read_config(config), list(options)]
        else:
            del settings["config"]
            model, data = ((settings.get(part) or {}).get("init_args") or {} for part in ("model", "data"))
            trainer, contents = settings["trainer"], self._contents(data)
            if (start := Path(str(model.get("init"))).expanduser()).is_file():
                model["init"] = hashlib.blake2b(start.read_bytes()).hexdigest()
            for given, key in ((model, "network"), (model.get("network_options") or {}, "backbone")):
                if key in given:
                    given[key] = teachers_of(given[key])
            for values, keys in ((data, NO_RESULT["data"]), (trainer, NO_RESULT["trainer"])):
                for key in keys:
                    values.pop(key, None)
        text = json.dumps([minor_version(), settings, contents, depends], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class Fit:
    """One fit of a study, or another command that takes as long."""

    title: str
    config: Path
    options: tuple[str, ...]  # of the command, after the config; they decide the result
    folder: Path  # of logs and checkpoints; studies that name the same folder share the fit
    output: str  # file in the folder that exists when the fit is done
    inputs: Callable[[], Sequence[str]] = tuple  # options that decide no result, or follow from the folder's name
    identity: str = ""  # what the folder's name ends with; see ``FitNames``
    subcommand: str = "fit"  # or "label", which writes the output itself and starts anew after a stop

    @property
    def checkpoint(self) -> Path:
        """The file that a resumed fit begins with."""
        return self.folder / "checkpoints" / "last.ckpt"

    def command(self, seconds: float | None = None) -> list[str]:
        """Return the arguments after ``ftd``; with a checkpoint there, those of a fit that resumes.

        Training may take ``seconds`` from here on, which belong to no name: a fit that resumes has others.
        """
        options = ["--config", str(self.config), *self.options, *self.inputs()]
        if self.subcommand != "fit":
            return [self.subcommand, str(self.folder / self.output), *options]
        logger = {"save_dir": self.folder.parent, "name": self.folder.name}
        options += [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]
        if seconds is not None:
            # Lightning's timer goes on counting where a fit resumes.
            seconds += self.status()["seconds"] if self.checkpoint.exists() else 0.0
            options.append(f"--trainer.max_time={json.dumps({'seconds': round(seconds)})}")
        return ["fit", *options, *(["--ckpt_path=last"] if self.checkpoint.exists() else [])]

    def status(self) -> dict[str, Any]:
        """Return "done", the "seconds" of wall time so far, and the "device"."""
        return {"done": False, "seconds": 0.0, "device": "", **read_json(self.folder / STATUS)}

    def is_done(self) -> bool:
        """Whether the fit ended by itself and its output is there; a damaged result is not."""
        file = self.folder / self.output
        return self.status()["done"] is True and file.is_file() and (file.suffix != ".json" or bool(read_json(file)))


class UnfinishedError(InputError):
    """Raised for a fit that ended by itself, as at its time limit, before it had a result."""


class Deadline:
    """The end of a slice of the work, some minutes from now; None: no end."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def remaining(self) -> float | None:
        """Return the seconds until the end, 0 after it; None where there is no end."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def end(self) -> None:
        """End now: children in other threads are stopped."""
        self._end = time.monotonic()


# Runs the arguments after ``ftd`` with a log file until a deadline. Returns the exit code; None: out of time.
Runner = Callable[[Sequence[str], Path, Deadline], int | None]


def device_name() -> str:
    """Name the GPU, or the processor and the threads that a child of this process uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    threads = os.environ.get("OMP_NUM_THREADS") or str(torch.get_num_threads())
    return f"{platform.processor() or platform.machine()}, {threads} thread{'s' * (threads != '1')}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder; raise InputError if another process is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"{folder}: another process is at work there; wait for it, or end it") from error


def kept(folder: Path, identity: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of an identity from a folder of JSON files; make it where there is none, in one process only.

    The result is as JSON gives it back: lists for tuples, None for NaN.
    """
    text = json.dumps(identity, sort_keys=True)
    file = folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{file.stem}.lock"):
        found = read_json(file)
        if found.get("identity") != json.loads(text) or not isinstance(found.get("result"), dict):
            write_json(file, {"identity": identity, "result": make()})
            found = read_json(file)
    result: dict[str, Any] = found["result"]
    return result


def run_child(command: Sequence[str], log: Path, deadline: Deadline) -> int | None:
    """Run a command in a child process, which ends with this one; see ``Runner``."""
    with log.open("ab") as out:
        with suppress(ImportError):  # Windows
            import fcntl

            try:  # the child inherits the lock, and holds it if this process is killed
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{log}: the fit of a killed command still writes there; end it, or wait") from error
        child = subprocess.Popen(
            [sys.executable, "-m", "ftd_lightning", *command], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while (remaining := deadline.remaining()) != 0:
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(min(POLL, remaining or POLL))
            return None
        finally:
            if child.poll() is None:
                child.terminate()  # a fit writes a checkpoint and ends
                try:
                    child.wait(GRACE)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def _reason(log: Path) -> str:
    """Return the last error in a log, or else its last line."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip()) if log.is_file() else [""]
    text = next((line for line in reversed(lines) if line.startswith("ftd: error: ")), lines[-1])
    return text.removeprefix("ftd: error: ")[:500]


def run_fit(fit: Fit, deadline: Deadline, run: Runner = run_child, seconds: float | None = None) -> bool:
    """Run a fit, whose training may take ``seconds``, until it ends or the deadline; return whether it is done."""
    with held(fit.folder):
        log, before, began = fit.folder / LOG, fit.status()["seconds"], time.monotonic()
        code, done = None, False
        try:
            code = run(fit.command(seconds), log, deadline)
            done = code == 0 and (fit.folder / fit.output).is_file()
        finally:
            seconds = round(before + time.monotonic() - began, 1)
            write_json(fit.folder / STATUS, {"done": done, "seconds": seconds, "device": device_name()})
    if code == 0 and not done:
        raise UnfinishedError(f"{fit.title}: ended before it had a result (see {log})")
    if code is not None and not done:
        raise InputError(f"{fit.title}: {_reason(log) or f'ended with exit code {code}'} (see {log})")
    return done
