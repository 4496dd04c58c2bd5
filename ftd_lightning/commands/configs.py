"""``ftd configs``: list the configs that ship with the library, print one, or copy one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ftd_lightning.command_line import parse_command
from ftd_lightning.errors import InputError
from ftd_lightning.shipped_configs import find_config, read_config, shipped_names


def _title(name: str) -> str:
    """Return the first comment of a config, without the command that follows it."""
    first = find_config(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    return first.partition(": ftd ")[0]


def configs(*, name: str | None = None, to: Path | None = None) -> None:
    """List the configs that ship with ftd_lightning, print one (ftd configs NAME), or copy one to change it.

    Args:
        name: of a config, e.g. cifar10/distill_ftd_ipc10, which needs no --name before it; all are listed without.
        to: write it to this file, which must not exist.

    Raises:
        InputError: for a config that is not there, or a file that is.
    """
    if name is None:
        if to is not None:
            raise InputError("--to copies one config: name it")
        width = max(map(len, shipped_names()))
        for shipped in shipped_names():
            print(f"{shipped:<{width}}  {_title(shipped)}")
        return
    file = find_config(name)
    read_config(file)  # refuses what is not UTF-8
    text = file.read_text(encoding="utf-8")
    if to is None:
        sys.stdout.write(text)
        return
    if to.exists():
        raise InputError(f"{to}: is there already; name another file")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")
    print(f"written: {to}; ftd fit --config {to}")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd configs``."""
    named = arguments[:1] and not arguments[0].startswith("-")  # the parser takes no positional that may be missing
    configs(**parse_command(configs, "configs", ["--name", *arguments] if named else arguments))
