"""Configs by name: those that ship with the library, and files, which win over them."""

from __future__ import annotations

import difflib
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_HERE = Path(__file__).resolve().parent
# Beside the modules in an installed package, beside the package in a clone.
SHIPPED = next((folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE)


def shipped_names() -> list[str]:
    """List the shipped configs, as ``--config`` takes them: "cifar10/distill_ftd_ipc10"."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.glob("*/*.yaml"))


def find_config(name: str | Path, near: Path | None = None) -> Path:
    """Find a config: a file, or a shipped one by its name, with or without ``.yaml``, first in the folder ``near``.

    Raises:
        InputError: if there is none; the nearest names are offered.
    """
    given = Path(name).expanduser()
    for folder in (*([near] if near else []), Path(), SHIPPED):
        for path in (folder / given, folder / f"{given}.yaml"):
            if os.path.isfile(path):
                return path
    wanted = given.as_posix().removeprefix("configs/").removesuffix(".yaml")
    nearest = difflib.get_close_matches(wanted, shipped_names(), n=3, cutoff=0.7)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "ftd configs lists those that ship"
    raise InputError(f"{given}: no such config; {hint}")


def run_folder_of(config: Path) -> tuple[Path, str]:
    """Name the parent and the name of the folder of a config's runs, of the user's own file in ``runs``.

    Example:
        >>> run_folder_of(find_config("digits/teacher_ftd")), run_folder_of(Path("mine/fast.yaml"))
        ((PosixPath('runs/digits'), 'teacher_ftd'), (PosixPath('runs'), 'fast'))
    """
    resolved = config.resolve()
    within = resolved.parent.relative_to(SHIPPED) if resolved.is_relative_to(SHIPPED) else Path()
    return Path("runs") / within, config.stem


def read_config(path: Path) -> dict[str, Any]:
    """Read a config's content; an InputError refuses a file that is not plain YAML in UTF-8, or not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not plain YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a config: settings are a mapping, e.g. model: ...")
    return content


def with_config_files(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Replace names of configs after ``--config`` and ``-c`` by their files; also return the first file. YAML stays.

    Raises:
        InputError: for a config that is missing or cannot be read.
    """
    expanded: list[str] = []
    first: Path | None = None
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, config = argument.partition("=")
        if option not in ("-c", "--config"):
            expanded.append(argument)
            continue
        expanded.append("--config")
        config = config if equals else next(remaining, "")
        if config and not any(sign in config for sign in "{\n"):
            file = find_config(config)
            read_config(file)
            first, config = first or file, str(file)
        expanded += [config] if config else []  # the parser reports a missing value
    return expanded, first


def with_home(value: Any) -> Any:
    """Replace "~" at the beginning of every value of a parsed configuration by the home folder: only paths have it.

    Shells expand it in ``--out ~/x``, but neither in ``--out=~/x`` nor in YAML.
    """
    if isinstance(value, Namespace):
        vars(value).update(with_home(vars(value)))
    elif isinstance(value, dict):
        return {key: with_home(entry) for key, entry in value.items()}
    elif isinstance(value, list):
        return [with_home(entry) for entry in value]
    elif isinstance(value, (str, Path)) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value
