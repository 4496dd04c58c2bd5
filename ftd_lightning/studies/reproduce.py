"""``ftd reproduce``: teachers, distillation and evaluations of one cell of the paper's tables, and a record of them.

A thin wrapper over ``ftd fit``: each step is one that anyone can type. A finished step is not repeated, an interrupted
one resumes from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from pathlib import Path
from typing import TYPE_CHECKING

from ftd_lightning.command_line import parse_command, split_overrides
from ftd_lightning.data.files import replacing
from ftd_lightning.studies.fit_steps import TimeSlice, is_done, read_notes, run_step
from ftd_lightning.studies.reproduction_plan import Cell, plan
from ftd_lightning.studies.reproduction_record import free_name, make_record, write_record

if TYPE_CHECKING:
    from ftd_lightning.studies.fit_steps import FitStep
    from ftd_lightning.studies.reproduction_plan import Reproduction

RECORDS = Path("notebooks/results")


def advance(job: Reproduction, time_slice: TimeSlice) -> tuple[list[FitStep], bool]:
    """Run what there is time for; return the steps known so far, and whether all are done."""
    job.check_settings()
    steps: list[FitStep] = []

    def done(step: FitStep) -> bool:
        steps.append(step)
        # Teachers are there or not, whoever trained them; the other files grow while a fit runs.
        if step.finished() if step.folder == job.teacher_folder else is_done(step):
            return True
        if time_slice.left() <= 0:
            return False
        print(f"\n{step.title}\n  ftd {' '.join(step.command)}", flush=True)
        return run_step(step, time_slice)

    if not done(job.teacher_step()):
        return steps, False
    job.link_teachers()
    if not done(job.distill_step()):
        return steps, False
    # Each one once, in order; the first that does not get done ends the slice.
    return steps, all(done(step) for step in dict.fromkeys(job.evaluations().values()))


def reproduce(
    *,
    dataset: str = "cifar10",
    ipc: int = 10,
    method: str = "ftd",
    teachers: int | None = None,
    iterations: int | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train teachers, distil and evaluate as configs/DATASET says, and append a record.

    Resumes where it stopped. Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or
    --evaluate. in front (--teacher.model.epochs 10) go to the fits of that phase.

    Args:
        dataset: a folder of configs.
        ipc: images per class.
        method: ftd, mtt, or what configs/DATASET/distill_METHOD_ipcN.yaml has.
        teachers: how many; by default as the config says.
        iterations: of the distillation; by default as the config says.
        epochs: of the evaluations; by default as the config says.
        minutes: stop after so long; the same command continues.
        overrides: further options, for the fits.

    Raises:
        InputError: for a config that does not exist, settings other than those that its folder was begun with, or a
            fit that fails.
    """
    time_slice = TimeSlice(minutes)
    job = plan(Cell(dataset, ipc, method, teachers, iterations, epochs), overrides)
    written = job.folder / "record.txt"  # names the record of this run
    steps, all_done = advance(job, time_slice)
    print()
    for step in steps:
        notes = read_notes(step.folder)
        state = "done" if step is not steps[-1] or all_done else "to do" if not notes["slices"] else "begun"
        print(f"  {state:<6}{notes['seconds'] / 60:>8.1f} min   {step.title}")
    if not all_done:
        print("not done: run the same command again")
        return
    if not written.is_file() or not Path(written.read_text(encoding="utf-8").strip()).is_file():
        record = make_record(job, overrides)
        path = free_name(RECORDS, f"{dataset}_{job.folder.name.removeprefix('reproduce_')}")
        # Its name first: a kill between the two leaves a name without a file, and the next command writes it.
        with replacing(written) as part:
            part.write_text(f"{path}\n", encoding="utf-8")
        write_record(path, record)
    print(f"done: {written.read_text(encoding='utf-8').strip()}; make results puts it into the README")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd reproduce``."""
    own, overrides = split_overrides(arguments)
    reproduce(**parse_command(reproduce, "reproduce", own, skip=["overrides"]), overrides=overrides)
