"""``ftd configs``: list the configs that ship with the library, print one, or copy one."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ftd_lightning.command_line import parse_command
from ftd_lightning.errors import InputError
from ftd_lightning.shipped_configs import find_config, read_config, shipped_names

KINDS = ("teacher", "distill", "evaluate")  # in this order; others follow


def _title(name: str) -> str:
    """Return the first comment of a config, without the command that follows it."""
    first = find_config(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    return first.partition(": ftd ")[0]


def _order(name: str) -> tuple[str, int, list[str | int]]:
    """Return the sort key of a config: data set, kind, then its name with numbers as numbers."""
    data, _, rest = name.partition("/")
    kind = rest.partition("_")[0]
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", rest)]
    return data, KINDS.index(kind) if kind in KINDS else len(KINDS), parts


def matching(words: Sequence[str]) -> dict[str, str]:
    """Return names and titles of the shipped configs that hold all words, by data set and kind."""
    titles = {name: _title(name) for name in sorted(shipped_names(), key=_order)}
    # "cifar10" is not in "cifar100".
    wanted = [re.compile(re.escape(word) + (r"(?!\d)" if word[-1:].isdigit() else ""), re.IGNORECASE) for word in words]
    return {name: title for name, title in titles.items() if all(word.search(f"{name} {title}") for word in wanted)}


def configs(words: Sequence[str] = (), *, to: Path | None = None) -> None:
    """List the configs that ship with ftd_lightning, print one, or copy one to change it.

    Args:
        words: the name of a config, e.g. cifar10/distill_ftd_ipc10, to print it; or parts of names and titles, e.g.
            cifar10 datm, to list those that hold all of them; all are listed without.
        to: write the config to this file, which must not exist.
    """
    found = matching(words)
    if to is None and found and not (len(words) == 1 and words[0] in found):
        width, before = max(map(len, found)), None
        for name, title in found.items():
            if before not in (None, name.partition("/")[0]):
                print()
            before = name.partition("/")[0]
            print(f"{name:<{width}}  {title}")
        return
    if len(words) != 1:
        raise InputError(f"{' '.join(words) or '--to'}: name one config; ftd configs lists those that ship")
    file = find_config(words[0])
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
    configs(**parse_command(configs, "configs", arguments))
