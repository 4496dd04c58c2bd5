"""One ``ftd fit`` as a step of a longer job: a child process that may end at any time and is resumed later."""

from __future__ import annotations

import codecs
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch

from ftd_lightning.data.json_files import read_json, write_json
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
def held(folder: Path) -> Iterator[int]:
    """Hold a folder against other commands. The lock is inherited: a child that outlives this process holds it still.

    Raises:
        InputError: if another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: another process is at work there; wait for it, or end it") from error
        yield lock.fileno()


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
    with held(step.folder) as lock, ExitStack() as stack:
        command = [sys.executable, "-m", "ftd_lightning", *step.command]
        out = stack.enter_context((step.folder / "output.txt").open("a", encoding="utf-8")) if quiet else None
        child = subprocess.Popen(command, pass_fds=[lock], stdout=out, stderr=subprocess.PIPE)
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
