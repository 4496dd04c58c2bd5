"""Configs as a fit would read them, and which of their settings make two runs the same."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftd_lightning import lightning_cli
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONFIGS = Path("configs")
PHASES = ("teacher", "distill", "evaluate")
# What may differ between two runs that are to give the same numbers, and what ftd reproduce sets itself.
NO_SETTING = {
    "model": ("trajectories", "teachers"),
    "data": ("root", "download", "on_device", "num_workers", "synthetic", "ema"),
    "trainer": (
        *("accelerator", "logger", "enable_progress_bar", "enable_model_summary", "default_root_dir"),
        *("log_every_n_steps", "profiler", "max_steps", "max_epochs"),
    ),
}


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


def resolved(config: Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config as a fit would: with what it builds on, the arguments after it, and every default.

    Raises:
        InputError: for a config that is not there, naming those that are.
    """
    if not config.is_file():
        folder = config.parent
        there = sorted(path.stem for path in folder.glob("*.yaml")) or sorted(p.name for p in CONFIGS.glob("*/"))
        raise InputError(
            f"{config}: no such config here; there are {', '.join(there) or f'no configs in {Path.cwd()}'}"
        )
    shown = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(shown):
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            lightning_cli.run(["fit", "--config", str(config), *arguments, "--print_config"])
        except SystemExit as end:
            if end.code:
                raise
    settings: dict[str, Any] = yaml.safe_load(shown.getvalue())
    return settings


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten resolved settings to those that decide the numbers.

    Example:
        >>> identity({"seed_everything": 0, "data": {"init_args": {"root": "x", "zca": True}}, "trainer": {}})
        {'seed_everything': 0, 'data.zca': True}
    """
    flat = {"seed_everything": settings.get("seed_everything")}
    for part, without in NO_SETTING.items():
        values = settings.get(part) or {}
        values = values if part == "trainer" else values.get("init_args", {})
        flat |= {f"{part}.{key}": value for key, value in values.items() if key not in without}
    return flat


def suffix(changed: dict[str, Any]) -> str:
    """Name settings that differ from the config's; nothing where none does.

    From the differences alone: a default that a later version adds renames no folder.

    Example:
        >>> suffix({}), suffix({"model.lr": 0.5})
        ('', '_9bde5f')
    """
    if not changed:
        return ""
    return "_" + hashlib.blake2b(json.dumps(changed, sort_keys=True).encode(), digest_size=3).hexdigest()
