"""One call of nine minutes on a machine with a GPU and without a network.

    PYTHONPATH=.:tests python -m benchmarks.stages --data DIR --out DIR [--method mtt] [--ipc 10] [--dry-run]

tests     pytest -m cuda tests/test_cuda.py
variants  epochs of a flat teacher of width 128, eager to bf16 as CUDA graphs, in turns with the plain loop
cell      the teachers, distillation and evaluations of ``ftd reproduce``, by the fastest variant that works

Each stage is a process with a deadline, so that an error in one costs none of the others. Records come into ``--out``
while they are made: at most 8 files below 16 MiB. What is done stays in ``--work``, and the same command continues.
``--dry-run`` takes the digits, tiny networks and no compiler.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
PROCESSES = multiprocessing.get_context("spawn")  # a fork of a process that asked for CUDA could not use it
SECONDS = {"tests": 120.0, "variants": 90.0, "cell": math.inf}  # at most; the cell has what the others leave
CLOSING = 30.0  # of the cell's, in which a fit writes its checkpoint, and the results are written
LIMIT = 16 * 2**20  # bytes of a file that comes home
UNFINISHED = 3  # exit code
# The best first, after eager: what a deadline cuts off is the least of interest.
VARIANTS: dict[str, dict[str, Any]] = {
    "eager float32": {"compile": False},
    "bf16, cuda_graphs": {"compile": "cuda_graphs", "precision": "bf16"},
    "cuda_graphs": {"compile": "cuda_graphs"},
    "compiled": {"compile": True},
    "bf16": {"compile": True, "precision": "bf16"},
}


def tests(options: argparse.Namespace, seconds: float) -> None:
    """Run the tests that need a GPU; those that fail are a result."""
    import pytest

    # Warnings are errors in this project, but those of other releases of its requirements are no findings.
    words = ["-v", "-rA", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider", str(TESTS / "test_cuda.py")]
    if (code := pytest.main(words)) > pytest.ExitCode.TESTS_FAILED:
        sys.exit(int(code))


def variants(options: argparse.Namespace, seconds: float) -> None:
    """Time a second epoch of each variant, and of the plain loop right before it."""
    import torch

    from benchmarks import run
    from ftd_lightning import DistillationDataModule
    from ftd_lightning.core.networks import NetworkFactory

    torch.set_float32_matmul_precision("high")  # as `ftd fit` does; for both sides
    warnings.filterwarnings("error", message="torch.compile failed")  # else it would be timed in eager mode
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dataset, network = ("digits", {"width": 4, "depth": 2}) if options.dry_run else ("cifar10", {"width": 128})
    data = DistillationDataModule(dataset, options.data, download=False, batch_size=run.BATCH, val_fraction=0.0)
    data.setup()
    images, labels = data.part("train")
    loader, steps = run.sample_loader(images, labels, batch_size=run.BATCH), math.ceil(len(labels) / run.BATCH)
    found: dict[str, Any] = {}
    for name, settings in VARIANTS.items():
        plain = NetworkFactory("convnet", network, data.description().shape).build(0, "teacher", 0).to(run.DEVICE)
        epoch, one = run.plain_teacher(plain, lambda number: loader), found.setdefault(name, {})
        turns = run.InTurns(
            lambda n, epoch=epoch, one=one: run.seconds(lambda: one.update(plain_loop_loss=epoch(n)[0]))
        )
        given = {"epochs": 2, "precision": "float32", **settings, "network_options": network}
        words = [f"--model.{key}={json.dumps(value).strip(chr(34))}" for key, value in given.items()]
        try:
            module = run.fit_teacher(data, [turns], *words)
            one["loss"] = float(module.trainer.callback_metrics["teacher/train_loss"])
            theirs, ours = turns.pairs[-1]
            one |= {"seconds_per_epoch": ours, "ms_per_step": 1000 * ours / steps}
            one |= {"plain_loop_seconds": theirs, "ratio": ours / theirs}
        except Exception as error:  # whatever it is: the next variant may work
            one["error"] = f"{type(error).__name__}: {error}"[:500]
        print(f"{name}: {json.dumps(one)}", flush=True)
        Path("variants.json").write_text(json.dumps(found, indent=2))


def fastest(file: Path) -> str:
    """Name the fastest variant that learned what the plain loop did; compiled in float32 where none was measured."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    works = {name: one for name, one in found.items() if "ratio" in one}
    learns = [name for name, one in works.items() if abs(one["loss"] - one["plain_loop_loss"]) < 0.1]
    return min(learns, key=lambda name: works[name]["seconds_per_epoch"], default="compiled")


def in_this_process(command: Sequence[str], log: Path, deadline: Any) -> int:
    """Run ``ftd`` without another start of Python; see ``studies.fits.Runner``."""
    from ftd_lightning import cli

    try:
        cli.main(command)
    except SystemExit as stop:
        return int(bool(stop.code))
    return 0


def cell(options: argparse.Namespace, seconds: float) -> None:
    """Run the fits of a published cell until it is done or the time is up, and export its set."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ftd_lightning.studies.compare import run_rows, write_results
    from ftd_lightning.studies.fits import Deadline, run_child
    from ftd_lightning.studies.reproduce import plan
    from ftd_lightning.studies.tables import text

    deadline, name = Deadline(max(0.0, seconds - CLOSING) / 60), fastest(Path("variants.json"))
    print(f"teachers: {name}", flush=True)
    given = ["--data.download=false", f"--data.root={options.data}"]
    given += ["--evaluate.model.compile=false"]  # to compile takes longer than to train on so few images
    given += [f"--teacher.model.{key}={str(value).lower()}" for key, value in VARIANTS[name].items()]
    given += ["--distill.trainer.callbacks+=ftd_lightning.callbacks.EvaluateSynthetic"]  # sets are evaluated at the end
    given += ["--distill.trainer.callbacks.init_args.every_n_epochs=0"]
    sizes: dict[str, Any] = {}
    if options.dry_run:
        sizes = {"teachers": 1, "iterations": 2, "epochs": 100}
        given += [f"--model.network_options={json.dumps({'width': 4, 'depth': 2})}", "--evaluate.model.networks=2"]
        given += ["--distill.model.max_start_epoch=1", "--distill.model.expert_epochs=1", "--distill.model.syn_steps=2"]
    for compiles in dict.fromkeys((str(VARIANTS[name]["compile"]).lower(), "false")):
        dataset, ipc = ("digits", 1) if options.dry_run else ("cifar10", options.ipc)
        overrides = [*given, f"--distill.model.compile={compiles}"]
        job = plan(dataset, ipc, options.method, **sizes, overrides=overrides)
        job.rows = {key: row for key, row in reversed(job.rows.items()) if row.iterate == "last"}
        run = in_this_process if options.dry_run else run_child
        failures, in_time = run_rows(job, list(job.rows), deadline, run)
        results = write_results(job, failures)
        shutil.copyfile(job.folder / "compare.json", f"{options.cell}.json")
        print(text(results), flush=True)
        if (made := job.set_file(options.method)).is_file():  # but the whitening, which the images determine
            with safe_open(made, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
                kept = {key: t for key, t in tensors.items() if not key.startswith("transform.") or t.numel() < 10**6}
                save_file(kept, f"{options.cell}.safetensors", file.metadata())
        if not failures or made.is_file():  # a second distillation would not mend an evaluation
            sys.exit(1 if failures else 0 if in_time else UNFINISHED)
    sys.exit("no distillation ended")


def work_on(stage: str, log: str, seconds: float, options: argparse.Namespace) -> None:
    """Be the process of a stage, in the working folder."""
    os.setpgid(0, 0)  # killing the group kills its fits, too
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    os.chdir(options.work)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)  # what is written before a kill is in the log
    if options.dry_run:
        import torch

        torch.compiler.set_stance("force_eager")
    {"tests": tests, "variants": variants, "cell": cell}[stage](options, seconds)


def bring_home(state: dict[str, Any], options: argparse.Namespace) -> None:
    """Copy the records that there are."""
    (options.work / "stages.json").write_text(json.dumps(state, indent=2))
    names = [f"{options.cell}.{ending}" for ending in ("txt", "json", "safetensors", "tar.gz")]
    for name in ("stages.json", "tests.txt", "variants.txt", "variants.json", *names):
        file = options.work / name
        if file.is_file() and file.stat().st_size < LIMIT:
            shutil.copyfile(file, options.out / name)
        elif file.is_file():
            (options.out / name).unlink(missing_ok=True)  # an earlier, smaller one
            state["too_large"] = sorted({*state["too_large"], name})


def run_stage(stage: str, seconds: float, state: dict[str, Any], options: argparse.Namespace) -> None:
    """Run a stage to its end or its deadline, and print how it ended and the end of its log."""
    name, began = options.cell if stage == "cell" else stage, monotonic()
    log = options.work / f"{name}.txt"
    process = PROCESSES.Process(target=work_on, args=(stage, log.name, seconds, options))
    process.start()
    try:
        while process.exitcode is None and monotonic() < began + seconds:
            process.join(max(0.0, min(5.0, began + seconds - monotonic())))
            bring_home(state, options)
    finally:
        with suppress(ProcessLookupError):  # it has no group before it begins
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    ended = {0: "done", UNFINISHED: "out of time", -signal.SIGKILL: "out of time"}.get(process.exitcode, "failed")
    state["stages"][name] = {"state": ended, "seconds": round(monotonic() - began, 1)}
    if stage == "cell":
        with tarfile.open(options.work / f"{name}.tar.gz", "w:gz") as archive:
            for path in sorted((options.work / "runs").rglob("*")):
                if path.is_file() and path.suffix not in (".ckpt", ".safetensors") and path.stat().st_size < 2**21:
                    archive.add(path, path.relative_to(options.work))
    tail = log.read_text(errors="replace")[-3000:].strip() if log.is_file() else ""
    print(f"== {name}: {ended}, {monotonic() - began:.0f} s\n{tail}", flush=True)


def _folder(name: str) -> Path:
    folder = Path(name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=os.path.abspath, default="data", help="folder of cifar-10-batches-py")
    parser.add_argument("--out", type=_folder, default="runs/stages_home", help="where records come")
    parser.add_argument("--work", type=_folder, default="runs/stages", help="where all that is made stays")
    parser.add_argument("--method", default="ftd", help="ftd or mtt, as of ftd reproduce")
    parser.add_argument("--ipc", type=int, default=1, help="images per class")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all stages together")
    parser.add_argument("--dry-run", action="store_true", help="digits, tiny networks, no compiler")
    options = parser.parse_args(arguments)
    options.cell, end = f"{options.method}_ipc{options.ipc}", monotonic() + 60 * options.minutes
    before = options.work / "stages.json"
    state = json.loads(before.read_text()) if before.is_file() else {"stages": {}, "too_large": []}
    for stage, most in SECONDS.items():
        name = options.cell if stage == "cell" else stage
        ended = ("done",) if stage == "cell" else ("done", "out of time")  # another call goes on with the cell alone
        if state["stages"].get(name, {}).get("state") not in ended:
            run_stage(stage, min(most, end - monotonic()), state, options)
        bring_home(state, options)
    print("; ".join(f"{name} {one['state']}" for name, one in state["stages"].items()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the stage, too
    main()
