"""The whole job on the embedded digits: ``python -m ftd_lightning.demo``, or ``make demo``.

A comparison of four rows, ``digits/demo`` among the shipped configs: every step is an ordinary ``ftd fit``. A step that
was interrupted resumes from its last checkpoint, a finished one is not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ftd_lightning.cli import as_program
from ftd_lightning.files.safetensors_io import write_json
from ftd_lightning.studies.compare import run_rows, write_results
from ftd_lightning.studies.comparison import Comparison
from ftd_lightning.studies.fits import Deadline, run_child
from ftd_lightning.studies.tables import copy_set, short_table, summarize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftd_lightning.studies.fits import Runner


def main(overrides: Sequence[str] = (), run: Runner = run_child) -> None:
    """Run all steps; write ``results.json``, ``images.png`` and the sets into ``runs/digits``; ``run`` starts a fit."""
    job = Comparison.from_file(Path("digits/demo"), overrides)
    run_rows(job, list(job.rows), Deadline(None), run, go_on=False)
    results = write_results(job, {})
    write_json(job.folder / "results.json", summarize(results))
    sets = [copy_set(job, name, job.folder / f"{name}.safetensors") for name in job.rows]
    print(f"\n{short_table(results)}\n")
    print(f"results   {job.folder / 'results.json'}\nimages    {job.folder / 'images.png'}")
    print(f"sets      {', '.join(str(file) for file in sets if file)}")
    print(f"curves    {Path(sys.executable).parent / 'tensorboard'} --logdir {job.folder / 'fits'}")


if __name__ == "__main__":
    as_program(lambda: main(sys.argv[1:]))
