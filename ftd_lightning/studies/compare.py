"""``ftd compare``: many methods on one data set, or one method over the values of a setting, with one command.

A thin wrapper over ``ftd fit``: each step is one that anyone can type. A finished step is not repeated, an
interrupted one resumes from its last checkpoint; a row that fails is reported, and the others continue.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any

from ftd_lightning.command_line import parse_command, split_overrides
from ftd_lightning.data.files import replacing
from ftd_lightning.data.json_files import write_json
from ftd_lightning.errors import InputError
from ftd_lightning.studies.comparison_plan import load
from ftd_lightning.studies.comparison_plot import draw_plot, write_pictures
from ftd_lightning.studies.comparison_table import gather, markdown, state, text
from ftd_lightning.studies.fit_steps import FitError, TimeSlice, is_done, run_step

if TYPE_CHECKING:
    from ftd_lightning.studies.comparison_plan import Comparison, Row


def advance(job: Comparison, rows: Sequence[Row], time_slice: TimeSlice) -> tuple[dict[str, str], bool]:
    """Do what there is time for.

    Returns:
        Why rows failed, by their names, and whether there was time for all.
    """
    failures: dict[str, str] = {}
    failed: dict[Path, str] = {}  # what several rows need fails once
    for row in rows:
        for step in job.steps(row):
            if is_done(step):
                continue
            if time_slice.left() <= 0:
                return failures, False
            if step.folder not in failed:
                print(f"\n{step.title}\n  ftd {' '.join(step.command)}", flush=True)
                try:
                    if run_step(step, time_slice, listen=True):
                        continue
                    return failures, False
                except FitError as error:
                    failed[step.folder] = f"{step.title}: {error.last_line}" if error.last_line else str(error)
                except InputError as error:
                    failed[step.folder] = str(error)
            failures[row.name] = failed[step.folder]
            print(f"{row.name} failed; the others go on", flush=True)
            break
    return failures, True


def report(job: Comparison, failures: dict[str, str]) -> dict[str, Any]:
    """Write pictures, plot, ``compare.json`` and ``compare.md`` of what there is."""
    done = [row for row in job.rows.values() if state(job, row, failures)["state"] == "done"]
    write_pictures(job, done)
    results = gather(job, failures)
    networks = [name for name in job.networks if name]
    if "plot" in results:
        draw_plot(results["plot"], results["title"], job.folder / f"{job.file.stem}.png")
    write_json(job.folder / "compare.json", results)
    with replacing(job.folder / "compare.md") as part:
        part.write_text(markdown(results, networks), encoding="utf-8")
    print(f"\n{results['title']}\n\n{text(results, networks)}\n")
    return results


def compare(
    *,
    config: Path,
    only: list[str] | None = None,
    minutes: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Run the rows of a comparison and tabulate them.

    See configs/digits/compare.yaml. Writes compare.json, compare.md and pictures into the comparison's run folder, and
    resumes where it stopped. Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or
    --evaluate. in front (--evaluate.trainer.max_epochs 10) go to the fits of that phase.

    Args:
        config: the comparison's YAML file.
        only: run just these rows.
        minutes: stop after so long; the same command continues.
        overrides: further options, for the fits.

    Raises:
        InputError: for a comparison that cannot be read, or a row, config or store that does not exist.
        SystemExit: with code 1 where a row failed.
    """
    only = only or []
    job = load(config, overrides, only)
    rows = [row for name, row in job.rows.items() if not only or name in only]
    threads = os.environ.get("OMP_NUM_THREADS")
    if "threads" in job.given and threads is None:
        os.environ["OMP_NUM_THREADS"] = str(job.given["threads"])  # of the children
    try:
        failures, in_time = advance(job, rows, TimeSlice(minutes))
        report(job, failures)
    finally:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
    print(f"results   {job.folder / 'compare.json'}, compare.md, and pictures")
    for name, reason in failures.items():
        print(f"failed    {name}: {reason}")
    if not in_time:
        print("not done: run the same command again")
    if failures:
        sys.exit(1)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd compare``."""
    own, overrides = split_overrides(arguments)
    compare(**parse_command(compare, "compare", own, skip=["overrides"]), overrides=overrides)
