"""``ftd compare``: many methods on one data set, or one method over the values of a setting, with one command.

A thin wrapper over ``ftd fit``: each step is one that anyone can type. A finished step is not repeated, an
interrupted one resumes from its last checkpoint; a row that fails is reported, and the others continue.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from pathlib import Path  # noqa: TC003

from ftd_lightning.command_line import parse_command, split_overrides
from ftd_lightning.studies.comparison_plan import load
from ftd_lightning.studies.comparison_run import advance, cost, report, threads_of
from ftd_lightning.studies.comparison_table import text
from ftd_lightning.studies.fit_steps import TimeSlice


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
    own, overrides = split_overrides(arguments)
    own = ["--config" if argument == "-c" else argument for argument in own]
    compare(**parse_command(compare, "compare", own, skip=["overrides"]), overrides=overrides)
