"""Names of fits: which settings decide a fit's numbers, and the folder that is named after them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any

from ftd_lightning.errors import InputError
from ftd_lightning.modules import FlatTeacher
from ftd_lightning.shipped_configs import read_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PHASES = ("teacher", "distill", "evaluate")
# What may differ between two runs that are to give the same numbers.
NO_SETTING = {
    "data": ("root", "download", "on_device", "num_workers", "cache_dir"),
    "trainer": (
        *("accelerator", "logger", "enable_progress_bar", "enable_model_summary", "default_root_dir"),
        *("log_every_n_steps", "profiler"),
    ),
}
TEACHERS = "--model.teachers"  # how many: a store of more serves as well


def arguments_by_phase(arguments: Iterable[str]) -> dict[str, list[str]]:
    """Give every phase its arguments of the command.

    Example:
        >>> arguments_by_phase(["--data.root", "here", "--teacher.model.epochs=3"])["teacher"]
        ['--data.root', 'here', '--model.epochs=3']
        >>> arguments_by_phase(["--data.root", "here", "--teacher.model.epochs=3"])["distill"]
        ['--data.root', 'here']
    """
    split: dict[str, list[str]] = {phase: [] for phase in PHASES}
    phases: Sequence[str] = PHASES
    for argument in arguments:
        if argument.startswith("--"):
            first, _, rest = argument.removeprefix("--").partition(".")
            phases, argument = ((first,), f"--{rest}") if first in PHASES else (PHASES, argument)
        for phase in phases:
            split[phase].append(argument)
    return split


def as_arguments(given: Iterable[Any] | None) -> tuple[str, ...]:
    """Write what YAML read as the arguments of a command.

    Example:
        >>> as_arguments(["--data.zca", True, "--model.rho", 0.005, "--model.augment", ""])
        ('--data.zca', 'true', '--model.rho', '0.005', '--model.augment', '')
    """
    return tuple(argument if isinstance(argument, str) else json.dumps(argument) for argument in given or ())


def deciding(arguments: Sequence[str]) -> list[list[str]]:
    """Pair settings with their values, without those that decide no number: where files lie, what computes.

    Example:
        >>> deciding(["--data.root", "here", "--model.lr=3", "--data.zca", "true"])
        [['--model.lr', '3'], ['--data.zca', 'true']]
    """
    without = {f"--{part}.{key}" for part, keys in NO_SETTING.items() for key in keys}
    pairs: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            pairs.append(argument.split("=", 1))
        elif pairs:
            pairs[-1].append(argument)
    return [pair for pair in pairs if pair[0] not in without]


def settings_of(config: Path) -> dict[str, Any]:
    """Read what decides the numbers of a config's fit.

    Raises:
        InputError: for a config that cannot be read.
    """
    content = copy.deepcopy(read_config(config))
    for part, without in NO_SETTING.items():
        values = content.get(part)
        if isinstance(values, dict) and part != "trainer":
            values = values.get("init_args")
        if isinstance(values, dict):
            for key in without:
                values.pop(key, None)
    return content


def name_of(config: Path, arguments: Sequence[str], *depends: str) -> str:
    """Name a fit's folder: its config, and a hash of its settings and of what it starts from."""
    settings = settings_of(config)
    if isinstance(model := settings.get("model"), dict):
        model.get("init_args", {}).pop("teachers", None)
    text = json.dumps([settings, deciding(arguments), depends], sort_keys=True, default=str)
    return f"{config.stem}_{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def teacher_count(config: Path, arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Find how many teachers a fit trains; give that, and the other arguments.

    Raises:
        InputError: if it is no whole number above 0.
    """
    model = read_config(config).get("model", {})
    count: Any = inspect.signature(FlatTeacher).parameters["teachers"].default
    count, others = model.get("init_args", {}).get("teachers", count), list[str]()
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option == TEACHERS:
            count = value if equals else next(remaining, None)
        else:
            others.append(argument)
    try:
        number = int(count)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise InputError(f"{TEACHERS} {count} must be a whole number of at least 1")
    return number, others
