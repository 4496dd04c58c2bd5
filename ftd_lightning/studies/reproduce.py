"""``ftd reproduce``: one cell of the published tables, and a record of it: a comparison of one distillation's images.

A thin wrapper over ``ftd fit``: each step is one that anyone can type. A finished step is not repeated, an interrupted
one resumes from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from pathlib import Path

from ftd_lightning.command_line import parse_command, split_overrides
from ftd_lightning.data.files import replacing
from ftd_lightning.studies.comparison_run import advance, report, threads_of
from ftd_lightning.studies.comparison_table import text
from ftd_lightning.studies.fit_steps import TimeSlice
from ftd_lightning.studies.reproduction import Cell, plan
from ftd_lightning.studies.reproduction_record import free_name, make_record, write_record

RECORDS = Path("notebooks/results")


def reproduce(
    *,
    dataset: str = "cifar10",
    ipc: int = 10,
    method: str = "ftd",
    teachers: int | None = None,
    iterations: int | None = None,
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    stop_after: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train teachers, distil and evaluate with the published settings of a data set, and append a record.

    Resumes where it stopped. Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or
    --evaluate. in front (--teacher.model.epochs 10) go to the fits of that phase.

    Args:
        dataset: a data set's name, or a folder of shipped configs (cifar10-part).
        ipc: images per class.
        method: ftd or mtt.
        teachers: how many; by default as the config says.
        iterations: of the distillation; by default as the config says.
        epochs: of the evaluations; by default as the config says.
        teacher_epochs: of each teacher; by default as many as the distillation reads, 0 for as many as published.
        stop_after: minutes; the same command continues.
        overrides: further options, for the fits.

    Raises:
        InputError: for settings that do not ship.
        SystemExit: with code 1 if a fit fails.
    """
    cell = Cell(dataset, ipc, method, teachers, iterations, epochs, teacher_epochs)
    reproduction = plan(cell, overrides)
    job = reproduction.job
    with threads_of(job):
        failures, in_time = advance(job, list(job.rows.values()), TimeSlice(stop_after))
        results = report(job, failures)
    print(f"\n{results['title']}\n\n{text(results)}\n")
    for reason in dict.fromkeys(failures.values()):
        print(f"failed    {reason}")
    if not in_time:
        print("not done: run the same command again")
        return
    if failures:
        sys.exit(1)
    written = job.folder / "record.txt"  # names the record of this run
    if not written.is_file() or not Path(written.read_text(encoding="utf-8").strip()).is_file():
        record = make_record(reproduction, results, overrides)
        path = free_name(RECORDS, f"{dataset}_{job.folder.name.removeprefix('reproduce_')}")
        # Its name first: a kill between the two leaves a name without a file, and the next command writes it.
        with replacing(written) as part:
            part.write_text(f"{path}\n", encoding="utf-8")
        write_record(path, record)
    print(f"done: {written.read_text(encoding='utf-8').strip()}; make results puts it into the tables")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd reproduce``."""
    own, overrides = split_overrides(arguments)
    reproduce(**parse_command(reproduce, "reproduce", own, skip=["overrides"]), overrides=overrides)
