"""Configs by name: those that ship with the library, and files, which win over them."""

from __future__ import annotations

import difflib
import json
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
    """List the shipped configs, as ``--config`` takes them.

    Example:
        >>> "cifar10/distill_ftd_ipc10" in shipped_names()
        True
    """
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.glob("*/*.yaml"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return False


def find_config(name: str | Path, near: Path | None = None) -> Path:
    """Find a config: a file, or a shipped one by its name, with or without ``.yaml``.

    Args:
        name: a path, which wins, or a name as in :func:`shipped_names`.
        near: a folder to look in first.

    Raises:
        InputError: if there is none; the nearest names are offered.

    Example:
        >>> find_config("digits/teacher_ftd").name
        'teacher_ftd.yaml'
    """
    given = Path(name).expanduser()
    folders = [Path(), SHIPPED] if near is None else [near, Path(), SHIPPED]
    for folder in folders:
        for path in (folder / given, folder / f"{given}.yaml"):
            if _is_file(path):
                return path
    # A path into a clone's configs says the same as a name.
    wanted = given.as_posix().removeprefix("configs/").removesuffix(".yaml")
    same_folder = [shipped for shipped in shipped_names() if shipped.partition("/")[0] == wanted.partition("/")[0]]
    nearest = difflib.get_close_matches(wanted, shipped_names(), n=3, cutoff=0.7) or same_folder
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "ftd configs lists those that ship"
    raise InputError(f"{given}: no such config; {hint}")


def run_folder_of(config: Path) -> tuple[Path, str]:
    """Name the folder of a config's runs: ``runs/<shipped name>``, or ``runs/<file name>`` for a file of one's own.

    Returns:
        The parent folder, and the name within it.

    Example:
        >>> run_folder_of(find_config("digits/teacher_ftd")), run_folder_of(Path("mine/fast.yaml"))
        ((PosixPath('runs/digits'), 'teacher_ftd'), (PosixPath('runs'), 'fast'))
    """
    resolved = config.resolve()
    within = resolved.parent.relative_to(SHIPPED) if resolved.is_relative_to(SHIPPED) else Path()
    return Path("runs") / within, config.stem


def read_config(path: Path) -> dict[str, Any]:
    """Read a config's content.

    Raises:
        InputError: for what is no plain UTF-8 YAML, or no mapping, or builds on another config.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(content, default=str)  # what contains itself has no end
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it contains itself" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"{path}: is no plain YAML: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no config: settings are a mapping, e.g. model: ...")
    if "base" in content:
        raise InputError(
            f"{path}: base is no longer read; pass the config that it builds on before it: --config BASE --config "
            f"{path.name}"
        )
    return content


def with_config_files(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Replace the names of configs in a command by their files.

    Args:
        arguments: of a command; ``--config`` and ``-c`` mean the same. YAML in place of a name stays.

    Returns:
        The arguments, and the first of the files.

    Raises:
        InputError: for a config that is not there, or cannot be read.

    Example:
        >>> with_config_files(["fit", "--trainer.max_steps", "3"])
        (['fit', '--trainer.max_steps', '3'], None)
    """
    expanded: list[str] = []
    first: Path | None = None
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if argument.startswith("-c") and len(option) > 2:  # -cF
            option, equals, value = "-c", "=", argument[2:]
        if option not in ("-c", "--config"):
            expanded.append(argument)
            continue
        config = value if equals else next(remaining, None)
        if config is None:
            expanded.append(argument)  # the parser reports the missing value
            continue
        if not any(sign in config for sign in ":\n{") or _is_file(Path(config).expanduser()):
            file = find_config(config)
            read_config(file)
            first, config = first or file, str(file)
        expanded += ["--config", config]
    return expanded, first


def with_home(value: Any) -> Any:
    """Replace "~" at the beginning of every value of a parsed configuration by the home folder: only paths have it.

    Shells do so in ``--out ~/x``, but neither in ``--out=~/x`` nor in YAML.

    Example:
        >>> with_home({"out": "~/x", "sets": ["~/a"], "ipc": 1}) == {
        ...     "out": str(Path.home() / "x"),
        ...     "sets": [str(Path.home() / "a")],
        ...     "ipc": 1,
        ... }
        True
    """
    if isinstance(value, Namespace):
        vars(value).update({key: with_home(entry) for key, entry in vars(value).items()})
        return value
    if isinstance(value, dict):
        return {key: with_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_home(entry) for entry in value]
    if isinstance(value, (str, Path)) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value
