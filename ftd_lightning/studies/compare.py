"""``ftd compare``: many methods on one data set, or one method over the values of a setting, with one command.

A thin wrapper over ``ftd fit``: each step is one that anyone can type. A step that is done is not done again, one that
was interrupted goes on from its last checkpoint; a row that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ftd_lightning.data.files import replacing
from ftd_lightning.errors import InputError
from ftd_lightning.studies.comparison_plan import load
from ftd_lightning.studies.comparison_plot import draw_plot, write_pictures
from ftd_lightning.studies.comparison_table import gather, markdown, state, text
from ftd_lightning.studies.fit_steps import FitError, Slice, is_done, run_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftd_lightning.studies.comparison_plan import Comparison, Row


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    words = argparse.ArgumentParser(
        prog="ftd compare",
        allow_abbrev=False,
        description="Run the rows of a comparison (see configs/digits/compare.yaml) and write compare.json, compare.md "
        "and pictures into its run folder. Resumes where it stopped. Further words (--data.root DIR) go to every fit, "
        "with --teacher., --distill. or --evaluate. in front (--evaluate.trainer.max_epochs 10) to those of one phase.",
    )
    words.add_argument("--config", type=Path, required=True, help="its YAML file")
    words.add_argument("--only", nargs="+", default=[], metavar="ROW", help="run just these rows")
    words.add_argument("--minutes", type=float, help="stop after so long; the same command again goes on")
    return words


def advance(job: Comparison, rows: Sequence[Row], time_slice: Slice) -> tuple[dict[str, str], bool]:
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
                    failed[step.folder] = f"{step.title}: {error.last_words}" if error.last_words else str(error)
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
    with replacing(job.folder / "compare.json") as part:
        part.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    with replacing(job.folder / "compare.md") as part:
        part.write_text(markdown(results, networks))
    print(f"\n{results['title']}\n\n{text(results, networks)}\n")
    return results


def _terminated(number: int, frame: Any) -> NoReturn:
    """End as an exception does, so that the child ends as well."""
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: for a comparison that cannot be read, or a row, config or store that is not there.
        SystemExit: with code 1 where a row failed.
    """
    options, further = parser().parse_known_args(arguments)
    wrong = [word for word in further if word.startswith("-") and "." not in word and not word[1:2].isdigit()]
    if wrong:
        parser().error(f"unrecognized arguments: {' '.join(wrong)}")
    job = load(options.config, further, options.only)
    time_slice = Slice(options.minutes)
    rows = [row for name, row in job.rows.items() if not options.only or name in options.only]
    previous = signal.signal(signal.SIGTERM, _terminated)
    threads = os.environ.get("OMP_NUM_THREADS")
    if "threads" in job.given and threads is None:
        os.environ["OMP_NUM_THREADS"] = str(job.given["threads"])  # of the children
    try:
        failures, in_time = advance(job, rows, time_slice)
        report(job, failures)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
    print(f"results   {job.folder / 'compare.json'}, compare.md, and pictures")
    for name, reason in failures.items():
        print(f"failed    {name}: {reason}")
    if not in_time:
        print("not done: run the same command again")
    if failures:
        sys.exit(1)
