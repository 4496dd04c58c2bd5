"""The whole job on the embedded digits: ``python -m ftd_lightning.demo``, or ``make demo``.

A comparison of four rows, ``digits/demo`` among the shipped configs: every step is an ordinary ``ftd fit``. A step that
was interrupted resumes from its last checkpoint, a finished one is not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ftd_lightning.cli import as_program
from ftd_lightning.errors import InputError
from ftd_lightning.studies.compare import advance, report, threads_of
from ftd_lightning.studies.comparison import load
from ftd_lightning.studies.fits import TimeSlice
from ftd_lightning.studies.tables import keep_set, short_table, write_summary

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(overrides: Sequence[str] = ()) -> None:
    """Run all steps; write ``results.json``, ``images.png`` and the sets into ``runs/digits``.

    Args:
        overrides: further options, for the fits; see ``ftd compare --help``.

    Raises:
        InputError: if a step fails.
    """
    job = load(Path("digits/demo"), overrides)
    with threads_of(job):
        failures, _ = advance(job, list(job.rows.values()), TimeSlice(None), quiet=True)
        if failures:
            raise InputError("; ".join(dict.fromkeys(failures.values())))
        results = report(job, failures)
    write_summary(results, job.folder / "results.json")
    sets = [keep_set(job, row, job.folder / f"{name}.safetensors") for name, row in job.rows.items()]
    print(f"\n{short_table(results)}\n")
    print(f"results   {job.folder / 'results.json'}\nimages    {job.folder / 'images.png'}")
    print(f"sets      {', '.join(str(file) for file in sets if file)}")
    print(f"curves    {Path(sys.executable).parent / 'tensorboard'} --logdir {job.fits}")


if __name__ == "__main__":
    as_program(lambda: main(sys.argv[1:]))
