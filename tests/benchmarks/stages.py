"""Half an hour on a bare machine with a GPU, in stages that continue where an earlier call stopped.

    PYTHONPATH=tests python3 -m benchmarks.stages STAGE... [--wheels DIR] [--data DIR...] [--out DIR] [--minutes M]

1 correctness and speed: the tests that need a GPU, what the device can do, the short benchmark
2 CIFAR-10, 1 image per class, as published
3 CIFAR-10, 10 images per class, with as many teachers as half of the stage's minutes allow
4 brings home: records and sets, in at most 8 files below 16 MiB

Needs the machine's own Python with torch and Lightning, no network, no installation. What is done is noted in
stages.json of the working folder and not done again; what failed is noted too, and the next step goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and not __package__:  # started as a file: its folder has modules of common names
    sys.path[0] = str(TESTS)

from benchmarks import transfer  # noqa: E402 -- found there only now
from benchmarks.stage_steps import STAGES, Job, StepError, UnfinishedError, done, names_of  # noqa: E402

# Minutes that a stage may take, one beside the other; --minutes is divided in the same proportion.
MINUTES = {"1": 8.0, "2": 9.0, "3": 9.0, "4": 1.0}
ENOUGH = (3, 11)  # of Python


def share(stages: Sequence[str], minutes: float) -> float:
    """Give the minutes of the first of some stages, when all of them have so many: what one leaves, others have."""
    return minutes * MINUTES[stages[0]] / sum(MINUTES[stage] for stage in stages)


def write_state(job: Job) -> None:
    """Note what has been done, in the working folder and where it comes home; a kill leaves the old file or the new."""
    for folder in (job.work, job.out):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "stages.json.part"
        part.write_text(json.dumps(job.state, indent=2) + "\n")
        part.replace(folder / "stages.json")


def bring_records(job: Job) -> None:
    """Put the state and all records where they come home."""
    transfer.clear(job.out, "records.tar.gz")
    write_state(job)
    transfer.pack_records(job.work, job.out / "records.tar.gz")
    transfer.split(job.out / "records.tar.gz")


def run_step(job: Job, name: str, work: Any, needs: Sequence[str], end: float) -> None:
    """Do a step until a point of :func:`time.monotonic`, and note what became of it."""
    entry = job.state["steps"].setdefault(name, {"seconds": 0.0, "calls": 0})
    entry |= {"calls": entry["calls"] + 1, "reason": None}
    began = monotonic()
    try:
        if missing := [need for need in needs if not done(job, need)]:
            raise StepError(f"needs {', '.join(missing)}, which is not done")
        if end <= began:
            raise UnfinishedError("no time left in this call")
        entry |= {"state": "done", "found": work(job, end - began)}
    except UnfinishedError as error:
        entry |= {"state": "unfinished", "reason": str(error)}
    except KeyboardInterrupt:
        entry |= {"state": "unfinished", "reason": "interrupted"}
        raise
    except Exception as error:  # whatever it is: the next step goes on
        known = isinstance(error, (StepError, transfer.TransferError))
        entry |= {"state": "failed", "reason": str(error) if known else f"{type(error).__name__}: {error}"}
    finally:
        entry["seconds"] = round(entry["seconds"] + monotonic() - began, 1)
        write_state(job)
        print(f"{name}: {entry.get('state')}, {monotonic() - began:.0f} s", entry["reason"] or "", flush=True)


def run_stages(job: Job, stages: Sequence[str], minutes: float) -> bool:
    """Run stages, and bring their records home after each, whatever happens.

    Returns:
        Whether all steps of these stages are done.
    """
    end = monotonic() + 60 * minutes
    write_state(job)  # both folders are there from here on
    for index, stage in enumerate(stages):
        stage_end = monotonic() + 60 * share(stages[index:], max(0.0, end - monotonic()) / 60)
        print(f"stage {stage}: {max(0.0, stage_end - monotonic()) / 60:.1f} minutes", flush=True)
        try:
            for step in STAGES[stage]:
                # What one call brings home is not there in the next, whose folder is empty.
                if stage == "4" or not done(job, step.name):
                    run_step(job, step.name, step.work, step.needs, stage_end)
        finally:
            bring_records(job)
    return all(done(job, name) for name in names_of(stages))


def read_state(work: Path, *, dry_run: bool) -> dict[str, Any]:
    """Read what earlier calls noted."""
    file = work / "stages.json"
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"dry_run": dry_run, "steps": {}}
    if state["dry_run"] != dry_run:
        sys.exit(f"stages: {work} is that of a {'dry' if state['dry_run'] else 'real'} run; name another --work")
    return state | {
        "python": platform.python_version(),
        "join": "PYTHONPATH=tests python3 -m benchmarks.transfer FOLDER TO; or cat sets.tar.?? > sets.tar",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages; gives 0 if all their steps are done, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=list(STAGES), metavar="STAGE", help="1, 2, 3, 4")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="packages that the machine lacks")
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="DIR", help="packed images, with unpack.py; halves may come"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/home"), metavar="DIR", help="what comes back")
    parser.add_argument("--work", type=Path, metavar="DIR", help="what stays: runs/stages, or runs/stages_dry_run")
    parser.add_argument("--minutes", type=float, help="of this call; by default what the stages are given")
    parser.add_argument("--teachers", type=int, help="of stage 3, instead of as many as the minutes allow")
    parser.add_argument("--dry-run", action="store_true", help="the same on the digits, at sizes of a CPU's minutes")
    options = parser.parse_args(arguments)
    if sys.version_info < ENOUGH:
        sys.exit(f"stages: Python {'.'.join(map(str, ENOUGH))} or newer is needed, this is {sys.version.split()[0]}")
    if options.minutes is not None and not 0 < options.minutes < float("inf"):
        parser.error("--minutes must be above 0")
    if options.teachers is not None and options.teachers < 1:
        parser.error("--teachers must be at least 1")
    stages = sorted(set(options.stages))
    work = (options.work or Path("runs", "stages_dry_run" if options.dry_run else "stages")).resolve()
    state = read_state(work, dry_run=options.dry_run)
    job = Job(work, options.out.resolve(), options.dry_run, options.teachers, state)
    try:
        if options.wheels is not None:
            transfer.unpack_wheels(options.wheels, work / "site")
        transfer.gather(options.data, work / "packed")
    except transfer.TransferError as error:
        sys.exit(f"stages: {error}")
    minutes = options.minutes or sum(MINUTES[stage] for stage in stages)
    try:
        return 0 if run_stages(job, stages, minutes) else 1
    except KeyboardInterrupt:
        sys.exit("stages: interrupted; the same command continues")


if __name__ == "__main__":
    # Whoever ends this process gets its records: as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
