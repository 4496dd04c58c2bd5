"""``ftd compare``: runs the fits of a comparison and writes the results."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from ftd_lightning.command_line import parse_command
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import replacing, write_json
from ftd_lightning.studies.comparison import Comparison
from ftd_lightning.studies.fits import LOG, Deadline, run_child, run_fit
from ftd_lightning.studies.plots import draw_study, write_pictures
from ftd_lightning.studies.tables import collect, markdown, text

if TYPE_CHECKING:
    from ftd_lightning.studies.fits import Fit, Runner


def run_rows(
    job: Comparison,
    names: Sequence[str],
    deadline: Deadline,
    run: Runner = run_child,
    limit: Callable[[Fit], float | None] = lambda fit: None,
    *,
    go_on: bool = True,
) -> tuple[dict[str, str], bool]:
    """Run what is not done of rows; return reasons by failed row, and whether there was time.

    Rows run ``job.jobs`` at a time. ``run`` starts a fit; ``limit`` says, when it begins, how many seconds it may
    train. ``go_on``: with the next row after a failed fit, which else is raised.
    """
    if job.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(job.threads))
    fits = {name: list(job.fits_of(name).each()) for name in names}
    folders = list(dict.fromkeys(fit.folder for each in fits.values() for fit in each))
    to_do = len({fit.folder for each in fits.values() for fit in each if not fit.is_done()})
    print(f"{to_do} of {len(folders)} fits to do{f' (all rows: {job.cost})' if job.cost else ''}", flush=True)
    failures: dict[str, str] = {}
    failed: dict[Path, str] = {}  # a reason, or nothing, by fit: several rows may share it
    turns = {folder: threading.Lock() for folder in folders}  # a row waits for the fit that another one runs

    def run_one(fit: Fit) -> bool:
        number, earlier = f"[{folders.index(fit.folder) + 1}/{len(folders)}]", f"{fit.status()['seconds']:.0f} s"
        if fit.folder in failed:
            return True
        if fit.is_done():
            print(f"{number} {fit.title}: done before, in {earlier}", flush=True)
            return True
        if deadline.remaining() == 0:
            return False
        resumes = f", resumes after {earlier}" if fit.checkpoint.exists() else ""
        seconds, began = limit(fit), time.monotonic()
        most = f", at most {seconds / 60:.1f} min" if seconds is not None else ""
        print(f"{number} {fit.title}{resumes}{most}: log {fit.folder / LOG}", flush=True)
        try:
            if not run_fit(fit, deadline, run, seconds):
                return False
            print(f"{number if job.jobs > 1 else ' ' * len(number)} {time.monotonic() - began:.0f} s", flush=True)
        except InputError as error:
            if not go_on:
                raise
            failed[fit.folder] = str(error)
        return True

    def run_row(name: str) -> bool:
        for fit in fits[name]:
            with turns[fit.folder]:
                if not run_one(fit):
                    return False
                reason = failed.setdefault(fit.folder, "")
            if reason:
                failures[name] = reason
                print(f"{name} failed: {reason}", flush=True)
                break
        return True

    if job.jobs == 1:
        in_time = all(map(run_row, names))
    else:
        with ThreadPoolExecutor(job.jobs) as pool:
            rows = [pool.submit(run_row, name) for name in names]
            try:
                wait(rows, return_when=FIRST_EXCEPTION)
            finally:
                if not all(row.done() for row in rows):  # an error, or a signal
                    deadline.end()
                pool.shutdown(cancel_futures=True)
            results = [row.result() for row in rows]  # raises what a row raised
            in_time = all(results)
    return {name: failures[name] for name in names if name in failures}, in_time


def write_results(job: Comparison, failures: dict[str, str]) -> dict[str, Any]:
    """Write pictures, plot, ``compare.json`` and ``compare.md``; return the content of ``compare.json``."""
    results = collect(job, failures)
    write_pictures(job, [row["name"] for row in results["rows"] if row["state"] == "done"])
    if job.plot is not None:
        draw_study(results, job.plot, job.folder / f"{job.file.stem}.png")
    write_json(job.folder / "compare.json", results)
    with replacing(job.folder / "compare.md") as part:
        part.write_text(markdown(results), encoding="utf-8")
    return results


def run_comparison(job: Comparison, names: Sequence[str], stop_after: float | None, run: Runner = run_child) -> None:
    """Run rows, by name, for so many minutes; write and print the results of all; exit with 1 where a row failed."""
    failures, in_time = run_rows(job, names, Deadline(stop_after), run)
    results = write_results(job, failures)
    print(f"\n{results['title']}\n\n{text(results)}\n")
    print(f"results   {job.folder / 'compare.json'}, compare.md, and pictures")
    for name, reason in failures.items():
        print(f"failed    {name}: {reason}")
    if not in_time:
        print("not done: run the same command again")
    if failures:
        sys.exit(1)


def compare(
    *,
    config: Path,
    only: list[str] | None = None,
    jobs: PositiveInt | None = None,
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
        jobs: rows that run at the same time; by default what the file says, which is 1 if it says nothing.
        stop_after: minutes; the same command continues.
        overrides: further options, for the fits.
    """
    job = Comparison.from_file(config, overrides)
    for name in only or []:
        if name not in job.rows:
            raise InputError(f"{job.file}: has no row {name}; there are {', '.join(job.rows)}")
    job.jobs = jobs or job.jobs
    run_comparison(job, only or list(job.rows), stop_after)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd compare``."""
    compare(**parse_command(compare, "compare", arguments))
