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
    """List the shipped configs, as ``--config`` takes them.

    Example:
        >>> "cifar10/distill_ftd_ipc10" in shipped_names()
        True
    """
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.glob("*/*.yaml"))


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
    for folder in (*([near] if near else []), Path(), SHIPPED):
        for path in (folder / given, folder / f"{given}.yaml"):
            if os.path.isfile(path):
                return path
    wanted = given.as_posix().removeprefix("configs/").removesuffix(".yaml")
    nearest = difflib.get_close_matches(wanted, shipped_names(), n=3, cutoff=0.7)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "ftd configs lists those that ship"
    raise InputError(f"{given}: no such config; {hint}")


def run_folder_of(config: Path) -> tuple[Path, str]:
    """Name the folder of a config's runs: ``runs/<shipped name>``, or ``runs/<file name>`` for the user's own file.

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
        InputError: for a file that is not plain YAML in UTF-8, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not plain YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a config: settings are a mapping, e.g. model: ...")
    return content


def with_config_files(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Replace the names of configs in a command by their files.

    Args:
        arguments: of a command; ``--config`` and ``-c`` mean the same. YAML in place of a name stays.

    Returns:
        The arguments, and the first of the files.

    Raises:
        InputError: for a config that is missing or cannot be read.

    Example:
        >>> with_config_files(["fit", "--trainer.max_steps", "3"])
        (['fit', '--trainer.max_steps', '3'], None)
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

    Example:
        >>> with_home({"out": "~/x", "ipc": 1}) == {"out": str(Path.home() / "x"), "ipc": 1}
        True
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
