"""Running the fits of a comparison, and writing what they gave."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd_lightning.command_line import parse_command
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import replacing, write_json
from ftd_lightning.studies.comparison import load
from ftd_lightning.studies.fits import FitError, TimeSlice, is_done, read_notes, run_step
from ftd_lightning.studies.plots import draw_plot, write_pictures
from ftd_lightning.studies.tables import gather, markdown, state, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ftd_lightning.studies.comparison import Comparison, Row


@contextmanager
def threads_of(job: Comparison) -> Iterator[None]:
    """Give the fits the threads that the comparison names, unless the environment does."""
    threads = os.environ.get("OMP_NUM_THREADS")
    if "threads" in job.given and threads is None:
        os.environ["OMP_NUM_THREADS"] = str(job.given["threads"])
    try:
        yield
    finally:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def cost(job: Comparison, rows: Sequence[Row]) -> str:
    """Say how many fits are to be done, and what the comparison's file says of all of them.

    Args:
        job: the comparison.
        rows: those of it that are wanted.
    """
    steps = {step.folder: step for row in rows for step in job.steps(row)}
    to_do = sum(not is_done(step) for step in steps.values())
    whole = f" (all rows: {job.given['cost']})" if "cost" in job.given else ""
    return f"{to_do} of {len(steps)} fits to do{whole}"


def advance(
    job: Comparison, rows: Sequence[Row], time_slice: TimeSlice, *, quiet: bool = False
) -> tuple[dict[str, str], bool]:
    """Do what there is time for.

    Args:
        job: the comparison.
        rows: those of it that are wanted.
        time_slice: how long it may take.
        quiet: a line for each fit, whose own output goes into its folder; else everything.

    Returns:
        Why rows failed, by their names, and whether there was time for all.
    """
    failures: dict[str, str] = {}
    failed: dict[Path, str] = {}  # what several rows need fails once
    total, numbers = len({step.folder for row in rows for step in job.steps(row)}), dict[Path, int]()
    for row in rows:
        for step in job.steps(row):
            seen = step.folder in numbers
            head = f"[{numbers.setdefault(step.folder, len(numbers) + 1)}/{total}] {step.title}"
            earlier = f"{read_notes(step.folder)['seconds']:.0f} s"
            if is_done(step):
                if quiet and not seen:
                    print(f"{head}: done before, in {earlier}", flush=True)
                continue
            if time_slice.left() <= 0:
                return failures, False
            if step.folder not in failed:
                began, indent = time.monotonic(), " " * head.index(" ")
                head += f": goes on after {earlier}" if step.checkpoint.exists() else ""
                print(head if quiet else f"\n{step.title}\n  ftd {' '.join(step.command)}", flush=True)
                try:
                    done = run_step(step, time_slice, quiet=quiet)
                    if quiet:
                        print(f"{indent} {time.monotonic() - began:.0f} s", flush=True)
                    if done:
                        continue
                    return failures, False
                except FitError as error:
                    failed[step.folder] = f"{step.title}: {error.last_line}" if error.last_line else str(error)
                except InputError as error:
                    failed[step.folder] = str(error)
            failures[row.name] = failed[step.folder]
            print(f"{row.name} failed: {failed[step.folder]}", flush=True)
            break
    return failures, True


def report(job: Comparison, failures: dict[str, str]) -> dict[str, Any]:
    """Write pictures, plot, ``compare.json`` and ``compare.md`` of what there is; return the content of the first."""
    done = [row for row in job.rows.values() if state(job, row, failures)["state"] == "done"]
    write_pictures(job, done)
    results = gather(job, failures)
    if "plot" in results:
        draw_plot(results["plot"], results["title"], job.folder / f"{job.file.stem}.png")
    write_json(job.folder / "compare.json", results)
    with replacing(job.folder / "compare.md") as part:
        part.write_text(markdown(results), encoding="utf-8")
    return results


def compare(
    *,
    config: Path,
    only: list[str] | None = None,
    stop_after: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Run the rows of a comparison and tabulate them.

    See ftd configs digits/compare. Writes compare.json, compare.md and pictures into the comparison's run folder, and
    resumes where it stopped. Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or
    --evaluate. in front (--evaluate.trainer.max_epochs 10) go to the fits of that phase.

    Args:
        config: the comparison's YAML file, or a shipped one by its name.
        only: run just these rows.
        stop_after: minutes; the same command continues.
        overrides: further options, for the fits.

    Raises:
        InputError: for a comparison that cannot be read, or a row, config or store that does not exist.
        SystemExit: with code 1 where a row failed.
    """
    only = only or []
    job = load(config, overrides, only)
    rows = [row for name, row in job.rows.items() if not only or name in only]
    print(cost(job, rows), flush=True)
    with threads_of(job):
        failures, in_time = advance(job, rows, TimeSlice(stop_after))
        results = report(job, failures)
    print(f"\n{results['title']}\n\n{text(results)}\n")
    print(f"results   {job.folder / 'compare.json'}, compare.md, and pictures")
    for name, reason in failures.items():
        print(f"failed    {name}: {reason}")
    if not in_time:
        print("not done: run the same command again")
    if failures:
        sys.exit(1)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd compare``."""
    compare(**parse_command(compare, "compare", arguments))
