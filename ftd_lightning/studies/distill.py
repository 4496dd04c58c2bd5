"""``ftd distill SOURCE``: from images to a distilled set of them, in a number of minutes, with one command.

A comparison of three rows (random real images, the method, all real images), whose configs a plan has written. The plan
is made once, from what a step costs on this device; the same command follows it and resumes where it stopped.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.bounds import check_bounds
from ftd_lightning.command_line import parse_command, split_overrides
from ftd_lightning.data import DistillationDataModule, SyntheticSet
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.files import replacing
from ftd_lightning.data.json_files import write_json
from ftd_lightning.errors import InputError
from ftd_lightning.shipped_configs import find_config, read_config
from ftd_lightning.studies.comparison_plan import of
from ftd_lightning.studies.comparison_run import advance, report, threads_of
from ftd_lightning.studies.distill_configs import Source, planned_configs, published_configs
from ftd_lightning.studies.distill_plan import make_plan
from ftd_lightning.studies.fit_names import WHERE, arguments_by_phase, data_options
from ftd_lightning.studies.fit_steps import TimeSlice, device_name
from ftd_lightning.studies.picture_sheet import set_picture
from ftd_lightning.studies.plan import Plan, describe, say, survey
from ftd_lightning.studies.published import belonging, published
from ftd_lightning.studies.summary import keep_set, short_table, verdict, write_summary

if TYPE_CHECKING:
    from ftd_lightning.studies.comparison_plan import Comparison
    from ftd_lightning.studies.published import Published

MINUTES = 30.0  # of a plan for a folder, if none are given
PLAN = "plan.json"
IN_FOLDERS = {"folder", "images"}  # data sets that are nothing without a folder
# Nothing is chosen by what would be measured while distilling, and it takes time.
UNMEASURED = (
    "--distill.trainer.callbacks+=ftd_lightning.callbacks.EvaluateSynthetic",
    "--distill.trainer.callbacks.init_args.every_n_epochs=0",
)


def find_source(source: str) -> Source:
    """Find images: a folder of classes, which wins, or a data set by its name.

    Raises:
        InputError: for what is neither.

    Example:
        >>> find_source("digits")
        Source(name='digits', root=None, title='digits')
    """
    path = Path(source)
    if path.is_dir():
        return Source("folder", str(path), path.resolve().name)
    if path.exists():
        raise InputError(f"{source}: is a file; give a folder with a folder of images for each class")
    if source in IN_FOLDERS or any(sign in source for sign in "/\\"):
        names = ", ".join(sorted(DATASETS.keys() - IN_FOLDERS))
        raise InputError(f"{source}: no such folder; give a folder of classes, or one of {names}")
    if source not in DATASETS:
        near = difflib.get_close_matches(source.lower(), DATASETS.keys() - IN_FOLDERS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"{source}: no such folder, and no data set of that name{hint}")
    return Source(source, None, source)


def _begin(out: Path, command: dict[str, Any]) -> dict[str, Any] | None:
    """Read the plan that lies in a folder; None where there is none yet.

    Raises:
        InputError: for the plan of another command, or a folder with other things in it.
    """
    file = out / PLAN
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(entry.name != "data" for entry in out.iterdir())):
            raise InputError(f"{out}: is not empty and holds no {PLAN}; name another folder")
        return None
    with suppress(json.JSONDecodeError, AttributeError):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        before = found.get("command")
        if before == command:
            return found
        if isinstance(before, dict):
            other = [f"{key} {before.get(key)}" for key, value in command.items() if before.get(key) != value]
            raise InputError(f"{out}: was begun with another {', another '.join(other)}; name another folder")
    raise InputError(f"{file}: is not a plan; name another folder")


def plan_job(source: Source, out: Path, command: Mapping[str, Any], overrides: Sequence[str]) -> Comparison:
    """Make a plan, or find the one of the same command; print it, and return what it runs.

    Args:
        source: the images.
        out: the folder of the job.
        command: "ipc", "method", "minutes", "config" and "seed", as :func:`distill_source` takes them.
        overrides: options for the fits.

    Raises:
        InputError: for a budget, a method or a config that does not do, a folder of another command, or images that
            have changed since the plan was made.
    """
    asked = {"source": source.name, "root": source.root, **command, "overrides": list(overrides)}
    content = _begin(out, asked)
    configs = _published(source, command)
    if content is None:
        plan, read, lines = _plan(source, command, configs, data_options(arguments_by_phase(overrides)["teacher"]))
        numbers = None if plan is None else asdict(plan)
        content = {"command": asked, "read": read, "data": _described(read), "plan": numbers, "text": lines}
        write_json(out / PLAN, content)
    else:
        recorded = content.get("read")
        if not isinstance(recorded, dict):
            raise InputError(f"{out / PLAN}: is not a plan of this version; name another folder")
        read = recorded
        if content.get("data") != _described(read):
            raise InputError(
                f"{out}: the images of {source.title} have changed since it was begun; name another folder"
            )
        print("\n".join(content["text"]), flush=True)
    # A config is a program: it is not taken from the folder, but written again from the plan's numbers.
    options = {"ipc": command["ipc"], "method": command["method"]}
    if configs is not None:
        given = published_configs(configs, source, out, **options)
    else:
        given = planned_configs(_numbers(content, out / PLAN), source, out, **options, seed=command["seed"])
    return of(given, out / PLAN, [*UNMEASURED, *overrides], name="ftd distill")


def _described(read: Mapping[str, Any]) -> dict[str, Any]:
    """Describe images by their contents, as JSON holds it; they are decoded into the cache that the fits read."""
    options = {key: value for key, value in read.items() if key in WHERE}
    found: dict[str, Any] = json.loads(json.dumps(DistillationDataModule(**options).describe()))
    return found


def _numbers(content: Mapping[str, Any], file: Path) -> Plan:
    """Return the plan that a file holds: numbers, and a strategy of augmentation.

    Raises:
        InputError: for anything else.
    """
    try:
        plan = Plan(**content["plan"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: is not a plan; name another folder") from error
    for name, value in asdict(plan).items():
        if value is not None and not isinstance(value, str if name == "augment" else (int, float)):
            raise InputError(f"{file}: is not a plan, its {name} is {value!r:.60}; name another folder")
    return plan


def _published(source: Source, command: Mapping[str, Any]) -> Published | None:
    """Return the configs that a job takes its settings from; None where it is planned."""
    ipc, method, minutes, config = (command[key] for key in ("ipc", "method", "minutes", "config"))
    if config is not None and minutes is not None:
        raise InputError("--config names all settings; leave out --minutes, or --config")
    if config is not None:
        return belonging(find_config(config), ipc)
    return published(source.name, ipc, method) if minutes is None and source.root is None else None


def _plan(
    source: Source, command: Mapping[str, Any], configs: Published | None, options: dict[str, Any]
) -> tuple[Plan | None, dict[str, Any], list[str]]:
    """Plan a job, unless it takes its settings from configs.

    Args:
        source: the images.
        command: as for :func:`plan_job`.
        configs: from which the settings are taken.
        options: of the images, that are given.

    Returns:
        The plan, the options that read its images, and the lines that were printed.
    """
    options = {"dataset": source.name, **({"root": source.root} if source.root else {}), **options}
    val_fraction, asked = options.pop("val_fraction", None), options.get("image_size")
    if configs is not None:
        own = read_config(configs.distill).get("data", {}).get("init_args", {})
        options = {"image_size": own.get("image_size"), "max_per_class": own.get("max_per_class"), **options}
        val_fraction = own.get("val_fraction", 0.1) if val_fraction is None else val_fraction
    data = DistillationDataModule(**{**options, "val_fraction": 0.0})
    found = survey(data, val_fraction, size_asked=asked is not None)
    found.check_ipc(command["ipc"])
    lines = say(source.title, source.root, data, found)
    print("\n".join(lines), flush=True)  # measuring takes a while
    read = {key: options[key] for key in WHERE if key in options}
    if configs is not None:
        settings = f"plan: the settings of {', '.join(path.stem for path in configs[:3] if path)}, as published"
        print(settings, flush=True)
        return None, read, [*lines, settings]
    budget = MINUTES if command["minutes"] is None else command["minutes"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, estimate = make_plan(found, command["ipc"], command["method"], budget, device)
    size = plan.image_size
    told, planned = data.census and data.census.resizing(size), list[str]()
    if told or size != found.size:
        change = f"images are {'reduced' if size < found.size else 'enlarged'} to {size} x {size} px"
        planned.append(f"{told or change}; --data.image_size asks for another size")
    text = describe(plan, estimate, command["ipc"] * found.classes)
    planned += [f"plan for {budget:g} minutes on {device_name()}:", *text]
    print("\n".join(planned), flush=True)
    return plan, {**read, "image_size": size}, [*lines, *planned]


def run_job(job: Comparison, out: Path, time_slice: TimeSlice) -> bool:
    """Do what there is time for; write the set, ``results.json`` and ``images.png`` when all is done.

    Raises:
        InputError: if a fit fails.
    """
    rows = list(job.rows.values())
    with threads_of(job):
        failures, in_time = advance(job, rows, time_slice, quiet=True)
        if failures:
            raise InputError("; ".join(dict.fromkeys(failures.values())))
        if not in_time:
            return False
        results = report(job, failures)
    (method,) = (row for row in rows if "distill" in row.given)
    file = keep_set(job, method, out / "set.safetensors")
    assert file is not None
    if results["ipc"] > 1:  # one row of every method has no place for more
        with replacing(out / "images.png") as part:
            set_picture(SyntheticSet.load(file), ema=bool(method.given.get("ema"))).save(part, format="PNG")
    write_summary(results, out / "results.json")
    print(f"\n{short_table(results)}\n")
    print(f"set       {file}\nresults   {out / 'results.json'}\nimages    {out / 'images.png'}")
    if said := verdict(results):
        print(f"\n{said}")
    return True


def distill_source(
    source: str,
    *,
    ipc: int,
    out: Path,
    method: str = "ftd",
    minutes: float | None = None,
    config: str | None = None,
    stop_after: float | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> None:
    """Distil images into a set, and measure it beside random and all real images.

    Looks at the images, measures what a step costs on this device, plans teachers, distillation and evaluations, prints
    the plan with its cost, and runs it. OUT holds set.safetensors, results.json, images.png, and the plan as configs
    for a longer, careful run. The same command resumes where it stopped. Further options (--data.root DIR) go to every
    fit; those with --teacher., --distill. or --evaluate. in front go to the fits of that phase.

    Args:
        source: a folder with a folder of images for each class, or a data set's name.
        ipc: images per class.
        out: the folder to write to.
        method: ftd, mtt, or any whose settings ship.
        minutes: budget of the whole job; by default a data set takes its published settings, a folder 30 minutes.
        config: take the settings of this distillation's config, and of what belongs to it.
        stop_after: minutes; the same command continues.
        seed: of everything that is drawn.
        overrides: further options, for the fits.

    Raises:
        InputError: for images that cannot be read, a budget that is too small, or a folder of another command.
    """
    check_bounds(distill_source, locals())
    command = {"ipc": ipc, "method": method, "minutes": minutes, "config": config, "seed": seed}
    job = plan_job(find_source(source), out, command, overrides)
    if not run_job(job, out, TimeSlice(stop_after)):
        print("not done: run the same command again")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd distill``."""
    own, overrides = split_overrides(arguments)
    own = ["--config" if argument == "-c" else argument for argument in own]
    distill_source(**parse_command(distill_source, "distill", own, skip=["overrides"]), overrides=overrides)
