"""Names of fits: which settings decide a fit's numbers, and the folder that is named after them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from argparse import ArgumentError
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import ftd_lightning
import ftd_lightning.callbacks  # its classes have short names for the parser
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError
from ftd_lightning.modules import FlatTeacher
from ftd_lightning.shipped_configs import read_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

PHASES = ("teacher", "distill", "evaluate")
# Data sets whose name does not say which images they hold. Others are published archives.
BY_CONTENTS = {"folder", "images", *SUBSETS}
WHERE = ("dataset", "root", "image_size", "test_fraction", "cache_dir")  # options that find the images
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


def data_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the options of the images among the arguments of a fit: those that are given.

    Raises:
        InputError: for an option that there is not, or a value of the wrong type.

    Example:
        >>> data_options(["--model.lr", "3", "--data.image_size", "16", "--data.zca=true"])
        {'image_size': 16, 'zca': True}
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationDataModule, "data")
    given: list[str] = []
    belongs = False
    for argument in arguments:
        belongs = argument.startswith("--data.") if argument.startswith("--") else belongs
        given += [argument] if belongs else []
    try:
        found: dict[str, Any] = parser.parse_args(given, defaults=False).as_dict().get("data", {})
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from error
    return found


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


def minor_version() -> str:
    """Return the version up to its minor number: within it a fit gives the same numbers.

    Example:
        >>> minor_version().count(".")
        1
    """
    return ".".join(ftd_lightning.__version__.split(".")[:2])


@cache
def _parser() -> LightningArgumentParser:
    """Build the parser of ``ftd fit``, without options of a single run, such as ``--ckpt_path``."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return parser


def _deciding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that decide no number, and the number of teachers."""
    left: dict[str, Any] = copy.deepcopy({key: value for key, value in settings.items() if key != "config"})
    for part, without in {**NO_SETTING, "model": ("teachers",)}.items():
        values = left.get(part) or {}
        for key in without:
            (values if part == "trainer" else values.get("init_args") or {}).pop(key, None)
    return left


@cache
def _resolved(config: Path, content: bytes, arguments: tuple[str, ...]) -> dict[str, Any] | None:
    """Resolve settings; see :func:`resolved`. The content is what was read: a file may change."""
    read_config(config)
    try:
        found: dict[str, Any] = _parser().parse_args(["--config", str(config), *arguments]).as_dict()
    except Exception:  # the import of a user's class can raise anything
        return None
    return found


def resolved(config: Path, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return all settings of a fit as the parser resolves them, defaults included; not to be changed.

    Returns:
        None for settings that the parser refuses; the fit itself says why.

    Raises:
        InputError: for a config that cannot be read.
    """
    return _resolved(config, config.read_bytes(), tuple(arguments))


class FitNames:
    """Names the folders of fits. Images that were described once are not described again."""

    def __init__(self) -> None:
        self._images: dict[str, dict[str, Any] | None] = {}

    def images(self, settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Describe the contents of the images that a fit reads, where the name of the data set does not.

        They are decoded into the cache that the fit reads.

        Args:
            settings: as :func:`resolved` returns them.

        Returns:
            None for a data set that its name describes, and for images that cannot be read; the fit says why.
        """
        options = ((settings or {}).get("data") or {}).get("init_args") or {}
        if options.get("dataset") not in BY_CONTENTS or any(key not in options for key in WHERE):
            return None
        key = json.dumps([options[name] for name in WHERE])
        if key not in self._images:
            self._images[key] = None
            with suppress(InputError, OSError):
                data = DistillationDataModule(**{name: options[name] for name in WHERE}, download=False)
                self._images[key] = data.describe()
        return self._images[key]

    def name(self, config: Path, arguments: Sequence[str], *depends: Any) -> str:
        """Name a fit's folder: its config, and a hash of its settings, its images and what it starts from.

        Args:
            config: of the fit.
            arguments: that follow it.
            depends: what it starts from, as JSON holds it.

        Raises:
            InputError: for a config that cannot be read.
        """
        found = resolved(config, arguments)
        settings = [read_config(config), list(arguments)] if found is None else _deciding_settings(found)
        text = json.dumps([minor_version(), settings, self.images(found), depends], sort_keys=True, default=str)
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
