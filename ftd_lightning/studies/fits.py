"""Names of fits: which settings decide a fit's numbers, and the folder that is named after them."""

from __future__ import annotations

import codecs
import copy
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentError
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch
from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import ftd_lightning
import ftd_lightning.callbacks  # its classes have short names for the parser
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import read_json, write_json
from ftd_lightning.modules import FlatTeacher
from ftd_lightning.shipped_configs import read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


PHASES = ("teacher", "distill", "evaluate")
# Data sets whose name does not say which images they hold. Others are published archives.
BY_CONTENTS = {"folder", "images", *SUBSETS}
WHERE = ("dataset", "root", "image_size", "test_fraction", "cache_dir")  # options that find the images
# What may differ between two runs that are to give the same numbers.
NO_SETTING = {
    "data": ("root", "download", "on_device", "num_workers", "cache_dir"),
    "trainer": (
        *("accelerator", "logger", "enable_progress_bar", "enable_model_summary", "default_root_dir"),
        *("log_every_n_steps", "profiler"),
    ),
}
TEACHERS = "--model.teachers"  # how many: a store of more serves as well


def arguments_by_phase(arguments: Iterable[str]) -> dict[str, list[str]]:
    """Give every phase its arguments of the command.

    Example:
        >>> arguments_by_phase(["--data.root", "here", "--teacher.model.epochs=3"])["teacher"]
        ['--data.root', 'here', '--model.epochs=3']
        >>> arguments_by_phase(["--data.root", "here", "--teacher.model.epochs=3"])["distill"]
        ['--data.root', 'here']
    """
    split: dict[str, list[str]] = {phase: [] for phase in PHASES}
    phases: Sequence[str] = PHASES
    for argument in arguments:
        if argument.startswith("--"):
            first, _, rest = argument.removeprefix("--").partition(".")
            phases, argument = ((first,), f"--{rest}") if first in PHASES else (PHASES, argument)
        for phase in phases:
            split[phase].append(argument)
    return split


def data_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the options of the images among the arguments of a fit: those that are given.

    Raises:
        InputError: for an option that there is not, or a value of the wrong type.

    Example:
        >>> data_options(["--model.lr", "3", "--data.image_size", "16", "--data.zca=true"])
        {'image_size': 16, 'zca': True}
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationDataModule, "data")
    given: list[str] = []
    belongs = False
    for argument in arguments:
        belongs = argument.startswith("--data.") if argument.startswith("--") else belongs
        given += [argument] if belongs else []
    try:
        found: dict[str, Any] = parser.parse_args(given, defaults=False).as_dict().get("data", {})
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from error
    return found


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
    without = {f"--{part}.{key}" for part, keys in NO_SETTING.items() for key in keys}
    pairs: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            pairs.append(argument.split("=", 1))
        elif pairs:
            pairs[-1].append(argument)
    return [pair for pair in pairs if pair[0] not in without]


def minor_version() -> str:
    """Return the version up to its minor number: within it a fit gives the same numbers.

    Example:
        >>> minor_version().count(".")
        1
    """
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


def _deciding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that decide no number, and the number of teachers."""
    left: dict[str, Any] = copy.deepcopy({key: value for key, value in settings.items() if key != "config"})
    for part, without in {**NO_SETTING, "model": ("teachers",)}.items():
        values = left.get(part) or {}
        for key in without:
            (values if part == "trainer" else values.get("init_args") or {}).pop(key, None)
    return left


@cache
def _resolved(config: Path, content: bytes, arguments: tuple[str, ...]) -> dict[str, Any] | None:
    """Resolve settings; see :func:`resolved`. The content is what was read: a file may change."""
    read_config(config)
    try:
        found: dict[str, Any] = _parser().parse_args(["--config", str(config), *arguments]).as_dict()
    except Exception:  # the import of a user's class can raise anything
        return None
    return found


def resolved(config: Path, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return all settings of a fit as the parser resolves them, defaults included; not to be changed.

    Returns:
        None for settings that the parser refuses; the fit itself says why.

    Raises:
        InputError: for a config that cannot be read.
    """
    return _resolved(config, config.read_bytes(), tuple(arguments))


class FitNames:
    """Names the folders of fits. Images that were described once are not described again."""

    def __init__(self) -> None:
        self._images: dict[str, dict[str, Any] | None] = {}

    def images(self, settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Describe the contents of the images that a fit reads, where the name of the data set does not.

        They are decoded into the cache that the fit reads.

        Args:
            settings: as :func:`resolved` returns them.

        Returns:
            None for a data set that its name describes, and for images that cannot be read; the fit says why.
        """
        options = ((settings or {}).get("data") or {}).get("init_args") or {}
        if options.get("dataset") not in BY_CONTENTS or any(key not in options for key in WHERE):
            return None
        key = json.dumps([options[name] for name in WHERE])
        if key not in self._images:
            self._images[key] = None
            with suppress(InputError, OSError):
                data = DistillationDataModule(**{name: options[name] for name in WHERE}, download=False)
                self._images[key] = data.describe()
        return self._images[key]

    def name(self, config: Path, arguments: Sequence[str], *depends: Any) -> str:
        """Name a fit's folder: its config, and a hash of its settings, its images and what it starts from.

        Args:
            config: of the fit.
            arguments: that follow it.
            depends: what it starts from, as JSON holds it.

        Raises:
            InputError: for a config that cannot be read.
        """
        found = resolved(config, arguments)
        settings = [read_config(config), list(arguments)] if found is None else _deciding_settings(found)
        text = json.dumps([minor_version(), settings, self.images(found), depends], sort_keys=True, default=str)
        return f"{config.stem}_{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def teacher_count(config: Path, arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Find how many teachers a fit trains; give that, and the other arguments.

    Raises:
        InputError: if it is no whole number above 0.
    """
    model = read_config(config).get("model", {})
    count: Any = inspect.signature(FlatTeacher).parameters["teachers"].default
    count, others = model.get("init_args", {}).get("teachers", count), list[str]()
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option == TEACHERS:
            count = value if equals else next(remaining, None)
        else:
            others.append(argument)
    try:
        number = int(count)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise InputError(f"{TEACHERS} {count} must be a whole number of at least 1")
    return number, others


POLL = 0.2  # seconds between two looks at a child
NOTE = 10.0  # seconds of wall time that a kill of this process may lose
LONGEST = 500  # characters of a reason
GRACE = 15.0  # seconds that a child has to end in, once it was asked to


class FitError(InputError):
    """A fit of a job that failed.

    Args:
        message: for people who see the output of the fit above it.
        last_line: the last line that the fit wrote to standard error, where it was listened to.
    """

    def __init__(self, message: str, last_line: str = "") -> None:
        super().__init__(message)
        self.last_line = last_line


class FitStep(NamedTuple):
    """One fit of a job, or another command that may take as long.

    Attributes:
        title: for people.
        config: its file.
        folder: where its logs and checkpoints go; two jobs that name the same folder share the fit.
        arguments: of the command, after the config.
        finished: looks at what the fit left on disk.
        target: how far it goes (teachers, iterations, epochs): a step may be taken further later.
        prepare: done before the fit is started.
        words: the command before its config, where it is no fit: it is not resumed, but begun anew.
    """

    title: str
    config: Path
    folder: Path
    arguments: tuple[str, ...]
    finished: Callable[[], bool]
    target: int = 1
    prepare: Callable[[], None] | None = None
    words: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Arguments after ``ftd``; with a checkpoint there, those of a run that goes on from it."""
        if self.words:
            return [*self.words, "--config", str(self.config), *self.arguments]
        own_folder = ["--trainer.logger.init_args.save_dir", str(self.folder.parent)]
        own_folder += ["--trainer.logger.init_args.name", self.folder.name]
        resumed = ["--ckpt_path", "last"] if self.checkpoint.exists() else []
        return ["fit", "--config", str(self.config), *self.arguments, *own_folder, *resumed]

    @property
    def checkpoint(self) -> Path:
        """The file that a resumed run begins with."""
        return self.folder / "checkpoints" / "last.ckpt"


class TimeSlice:
    """The time that one command may take; None has no end.

    Args:
        minutes: from now.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds that are left, below 0 when it is over."""
        return float("inf") if self._end is None else self._end - time.monotonic()


def device_name() -> str:
    """Name what computes a fit: the GPU, or the CPU's model and the threads that a child of this process uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    model = model or platform.processor() or platform.machine()
    # A child goes by the variable as it is now; this process read it when it began.
    given = re.match(r"\s*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    threads = int(given[1]) if given else torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def read_notes(folder: Path) -> dict[str, Any]:
    """Read what was noted of a step: "seconds" and "slices" so far, "devices", and "finished": target -> seconds."""
    empty: dict[str, Any] = {"seconds": 0.0, "slices": 0, "devices": [], "finished": {}}
    found = read_json(folder / "wall_time.json")
    return {key: found[key] if type(found.get(key)) is type(value) else value for key, value in empty.items()}


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Note it, atomically."""
    write_json(folder / "wall_time.json", notes, indent=None)


def is_done(step: FitStep) -> bool:
    """Whether a step is noted as finished and its files say so too."""
    targets = [int(target) for target in read_notes(step.folder)["finished"]]
    return any(target >= step.target for target in targets) and step.finished()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other commands.

    Raises:
        InputError: if another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"{folder}: another process is at work there; wait for it, or end it") from error


def kept(folder: Path, identity: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a result that is kept in a folder; make it where there is none.

    Two processes that want the same result make it once: the second one waits.

    Args:
        folder: of results, one JSON file each: ``{"identity": ..., "result": ...}``.
        identity: everything that the result depends on, as JSON can hold it.
        make: computes the result, which JSON can hold too.

    Returns:
        The result as JSON gives it back: lists for tuples, None for NaN.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     [kept(Path(name), {"seed": 0}, lambda: {"accuracy": value}) for value in (0.5, 0.6)]
        [{'accuracy': 0.5}, {'accuracy': 0.5}]
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


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class _Listener:
    """Reads what a child writes to standard error, hands it on, and keeps its end.

    Args:
        child: whose standard error is a pipe.
        to: where to write it.
        bars: show its progress bars on the terminal, one line at a time.
    """

    def __init__(self, child: subprocess.Popen[bytes], to: TextIO, *, bars: bool) -> None:
        self._end = b""
        self._pipe = child.stderr
        self._to = to
        self._bars = bars and sys.stderr.isatty()
        self._shown = 0  # length of the line on the terminal
        # A daemon: grandchildren may hold the pipe open when the child is long gone.
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._pipe is not None
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a bar's signs may be cut in two
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 1 << 14):
                self._end = (self._end + chunk)[-4096:]
                text = decoder.decode(chunk)
                self._to.write(text)
                self._to.flush()
                bars = [line for line in re.split(r"[\r\n]+", text) if "%|" in line] if self._bars else []
                if bars:
                    self._show(bars[-1].strip()[: shutil.get_terminal_size().columns - 1])
        if self._shown:
            self._show("")

    def _show(self, line: str) -> None:
        sys.stderr.write(f"\r{line.ljust(self._shown)}\r")
        sys.stderr.flush()
        self._shown = len(line)

    def wait(self) -> None:
        """Wait until all has been read, or grandchildren hold the pipe open."""
        self._thread.join(2.0)

    def last_line(self) -> str:
        """Give the line that names an error, else the last one that is not empty, without the command's name."""
        lines = re.split(r"[\r\n]+", self._end.decode(errors="replace").strip())
        places = [index for index, line in enumerate(lines) if re.match(r"(ftd: )?error: ", line)]
        if not places:
            return lines[-1].strip()
        # The parser's own spread over several lines, of which the first is often a heading.
        text = " ".join(line.strip() for line in lines[places[-1] :])
        return re.sub(r"^(ftd: )?error: ", "", text)[:LONGEST]


def run_step(step: FitStep, time_slice: TimeSlice, *, quiet: bool = False) -> bool:
    """Run a step to its end or to that of the time slice, and note the wall time that it took.

    Args:
        step: the fit.
        time_slice: how long it may take.
        quiet: keep what it writes in ``output.txt`` of its folder; on a terminal its progress is shown.

    Returns:
        Whether it is finished.

    Raises:
        FitError: if the fit fails.
        InputError: if another process is at work in its folder.
    """
    if step.prepare is not None:
        step.prepare()
    notes, began = read_notes(step.folder), time.monotonic()
    before = step.checkpoint.stat().st_mtime_ns if step.checkpoint.exists() else None
    notes["slices"] += 1
    notes["devices"] = sorted({*notes["devices"], device_name()})
    earlier = noted = notes["seconds"]
    with held(step.folder), ExitStack() as stack:
        command = [sys.executable, "-m", "ftd_lightning", *step.command]
        out = stack.enter_context((step.folder / "output.txt").open("a", encoding="utf-8")) if quiet else None
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE)
        listener = _Listener(child, out or sys.stderr, bars=quiet)
        stack.callback(listener.wait)
        try:
            while child.poll() is None and time_slice.left() > 0:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
                notes["seconds"] = round(earlier + time.monotonic() - began, 1)
                if notes["seconds"] - noted > NOTE:
                    noted = notes["seconds"]
                    write_notes(step.folder, notes)
        finally:
            # Asked to end, a fit may well give 0: what counts is whether it ended by itself.
            by_itself = child.poll() is not None
            if not by_itself:
                _end(child)
            notes["seconds"] = round(earlier + time.monotonic() - began, 1)
            write_notes(step.folder, notes)  # a step may look at the time that it took
            done = by_itself and child.returncode == 0 and step.finished()
            if done:
                notes["finished"][str(step.target)] = notes["seconds"]
            write_notes(step.folder, notes)
    if by_itself and not done:
        reason = f"with exit code {child.returncode}" if child.returncode else "before its work was done"
        where = f"see {step.folder / 'output.txt'}" if quiet else "see its output above"
        raise FitError(f"{step.title}: the fit in {step.folder} ended {reason}; {where}", listener.last_line())
    after = step.checkpoint.stat().st_mtime_ns if step.checkpoint.exists() else None
    if not done and after == before:
        print(f"{step.title}: no checkpoint was written in this slice; the next one needs more minutes to get on")
    return done
