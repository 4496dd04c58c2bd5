"""The steps of ``benchmarks.stages``. Imports nothing but Python, for wheels are unpacked only when it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import transfer

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0  # seconds that a process has to end in, once it was asked to
CLOSING = 45.0  # seconds that ftd reproduce has after its own end of time, to write a checkpoint and its report
SHARE = 0.5  # of the minutes, for teachers; distillation and evaluations have the rest
METHOD = "ftd"
PARTS = ("teacher", "evaluation", "matching")  # of the benchmark, the longest last
# As published; and what shows in seconds that all of it runs.
FULL = {"dataset": "cifar10", "ipc": {"2": 1, "3": 10}}
DRY = {"dataset": "digits", "ipc": {"2": 1, "3": 1}}
FEWER = ("--iterations", "2", "--epochs", "2")
SHORTER = (
    *("--distill.model.max_start_epoch", "2", "--distill.model.expert_epochs", "1"),
    *("--distill.model.syn_steps", "2", "--evaluate.model.networks", "2"),
    *("--distill.trainer.callbacks+=EvaluateSynthetic", "--distill.trainer.callbacks.init_args.epochs", "2"),
)


class StepError(Exception):
    """A step that failed; one line."""


class UnfinishedError(Exception):
    """A step that has not come to its end; the next call continues."""


@dataclass
class Job:
    """What a call works on.

    Attributes:
        work: the working folder, which stays on the machine between calls.
        out: the folder that comes home.
        dry_run: digits at tiny sizes.
        teachers: of 10 images per class; None: as many as the minutes allow.
        state: what ``stages.json`` holds: "steps", by name, each with "state", "seconds", "reason" and "found".
    """

    work: Path
    out: Path
    dry_run: bool
    teachers: int | None
    state: dict[str, Any]


class Step(NamedTuple):
    """A step: its name, what it does with a job in so many seconds, and the names of steps that come first."""

    name: str
    work: Callable[[Job, float], dict[str, Any]]
    needs: tuple[str, ...] = ()


def done(job: Job, name: str) -> bool:
    """Whether a step is noted as done."""
    return job.state["steps"].get(name, {}).get("state") == "done"


def end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; at first asked as Ctrl-C asks, for it may have a checkpoint to write."""
    child.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def call(job: Job, name: str, words: Sequence[str], seconds: float, folder: Path | None = None) -> str:
    """Run Python in a process of its own, which writes to ``logs/NAME.txt``, and give what it wrote.

    Args:
        job: whose wheels it finds.
        name: of the step.
        words: arguments of Python.
        seconds: after which it is ended.
        folder: to run in; the working folder by default.

    Raises:
        StepError: if its exit code is not 0.
        UnfinishedError: if it was ended.
    """
    log = job.work / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(job.work / "site"), *given])
    with log.open("ab") as out:
        began = out.tell()
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder or job.work,
            env={**os.environ, "PYTHONPATH": path},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise UnfinishedError(f"ended after {seconds:.0f} s; see logs/{log.name}") from None
        finally:
            if child.poll() is None:
                end(child)
    text = log.read_bytes()[began:].decode(errors="replace")
    if code:
        raise StepError(f"exit code {code}: {last_line(text)}; see logs/{log.name}")
    return text


def last_line(text: str) -> str:
    """Give the last line that is not empty; of a progress bar, as it was at its end."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1][:500] if lines else "no output"


def gpu_tests(job: Job, seconds: float) -> dict[str, Any]:
    """The tests that are marked cuda, which skip themselves without a GPU."""
    if missing := [name for name in ("pytest", "pytest_timeout") if importlib.util.find_spec(name) is None]:
        raise StepError(f"{' and '.join(missing)} not installed here: tests/test_cuda.py was not run")
    # Warnings are errors in this project, but those of other releases of its requirements are no findings here.
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", "-W", "default", "tests/test_cuda.py"]
    text = call(job, "tests", ["-m", "pytest", *options], seconds, ROOT)
    return {"summary": last_line(text)}


def ceilings(job: Job, seconds: float) -> dict[str, Any]:
    """Rates of copies and convolutions, and peak memory."""
    file = job.work / "ceilings.json"
    quick = ["--quick"] if job.dry_run else []
    call(job, "ceilings", ["-m", "benchmarks.ceilings", str(file), *quick], seconds)
    found = json.loads(file.read_text())
    return {key: found[key] for key in ("copy_gb_per_s", "convolution_tflop_per_s", "matching_mib")}


def benchmark(part: str) -> Step:
    """A part of the benchmark: the library beside plain loops."""

    def work(job: Job, seconds: float) -> dict[str, Any]:
        size = ["--quick", "--repeats", "1"] if job.dry_run else ["--short", "--repeats", "2"]
        words = ["-m", "benchmarks.run", "--parts", part, *size, "--output", f"benchmark_{part}"]
        call(job, f"benchmark_{part}", words, seconds)
        rows = json.loads((job.work / f"benchmark_{part}" / "benchmark.json").read_text())["rows"]
        return {f"{row['case']}, {row['quantity']}": row["ratio"] for row in rows}

    return Step(f"benchmark_{part}", work)


def images(job: Job, seconds: float) -> dict[str, Any]:
    """CIFAR-10 as torchvision reads it, by the ``unpack.py`` that came with the packed images."""
    packed = job.work / "packed"
    if job.dry_run and not packed.is_dir():
        return {"dataset": DRY["dataset"]}  # comes with the library's requirements
    if not (packed / "unpack.py").is_file():
        raise StepError("no unpack.py came with --data")
    call(job, "images", [str(packed / "unpack.py"), "data", FULL["dataset"]], seconds)
    return {"dataset": FULL["dataset"]}


def reproduction(stage: str, planned: str | None = None) -> Callable[[Job, float], dict[str, Any]]:
    """A cell of the published tables, by ``ftd reproduce``, with the teachers that a step planned."""

    def work(job: Job, seconds: float) -> dict[str, Any]:
        size = DRY if job.dry_run else FULL
        cell = ["--dataset", size["dataset"], "--ipc", str(size["ipc"][stage]), "--method", METHOD]
        options = [*FEWER, *SHORTER] if job.dry_run else ["--data.root", "data"]
        if planned is not None:
            options += ["--teachers", str(job.state["steps"][planned]["found"]["teachers"])]
        elif job.dry_run:
            options += ["--teachers", "1"]
        if seconds <= CLOSING:
            raise UnfinishedError(f"{seconds:.0f} s are too few to begin or go on")
        words = ["reproduce", *cell, *options, "--stop-after", f"{(seconds - CLOSING) / 60:.2f}"]
        text = call(job, f"stage{stage}", ["-m", "ftd_lightning", *words], seconds)
        written = re.search(r"^done: (.+\.json);", text, re.MULTILINE)
        if written is None:
            raise UnfinishedError("not at its end; the same stage continues")
        record = json.loads((job.work / written[1]).read_text())
        return {"record": written[1], **{key: record[key] for key in ("accuracy", "seconds", "device")}}

    return work


def seconds_per_epoch(job: Job) -> float:
    """Give the time of a teacher's epoch: that of stage 2's teachers, else that of the benchmark.

    Raises:
        StepError: if neither is done.
    """
    if done(job, "reproduction_2"):
        record = json.loads((job.work / job.state["steps"]["reproduction_2"]["found"]["record"]).read_text())
        return float(record["seconds"]["teachers"] / (record["teachers"]["count"] * record["teachers"]["epochs"]))
    if done(job, "benchmark_teacher"):
        rows = json.loads((job.work / "benchmark_teacher" / "benchmark.json").read_text())["rows"]
        return float(next(row["ours"] for row in rows if row["quantity"] == "time of an epoch"))
    raise StepError("no teacher was timed: run stage 1 or 2 first, or name --teachers")


def plan_teachers(job: Job, seconds: float) -> dict[str, Any]:
    """How many teachers stage 3 has, at most as many as published; decided once, for teachers of other numbers differ.

    The minutes are those of the call that plans.
    """
    if job.teachers is not None:
        return {"teachers": job.teachers}
    # Of the wheels, which this process did not have when it began.
    sys.path[:0] = [str(ROOT), str(job.work / "site")]
    from ftd_lightning.studies.reproduce import EPOCHS, Cell, plan

    size = DRY if job.dry_run else FULL
    found = plan(Cell(size["dataset"], size["ipc"]["3"], METHOD), SHORTER if job.dry_run else ())
    arguments = found.job.given["teachers"]["teachers"]["arguments"]
    epochs = int(dict(zip(arguments[::2], arguments[1::2], strict=True))[EPOCHS])
    each = epochs * seconds_per_epoch(job)
    most = 2 if job.dry_run else found.published["teachers"]
    return {"teachers": max(1, min(most, int(SHARE * seconds / each))), "epochs": epochs, "seconds_each": each}


def bring_sets(job: Job, seconds: float) -> dict[str, Any]:
    """Pack the sets, and split them into what may come back beside the records."""
    transfer.clear(job.out, "sets.tar")
    archive = job.out / "sets.tar"
    sets = transfer.pack_sets(job.work, archive, room=transfer.ROOM)
    pieces = [piece.name for piece in transfer.split(archive)]
    if sets["left_out"]:
        raise StepError(f"no room for {', '.join(sets['left_out'])}; {', '.join(pieces)} has the others")
    return {"sets": sets["packed"], "files": pieces}


STAGES: dict[str, tuple[Step, ...]] = {
    "1": (Step("tests", gpu_tests), Step("ceilings", ceilings), *map(benchmark, PARTS)),
    "2": (Step("images", images), Step("reproduction_2", reproduction("2"), ("images",))),
    "3": (
        Step("images", images),
        Step("plan", plan_teachers, ("images",)),
        Step("reproduction_3", reproduction("3", "plan"), ("images", "plan")),
    ),
    "4": (Step("sets", bring_sets),),
}


def names_of(stages: Iterable[str]) -> list[str]:
    """Name the steps of some stages, each once."""
    return list(dict.fromkeys(step.name for stage in stages for step in STAGES[stage]))
