"""Commands as typed functions: the signature names the arguments, the docstring explains them."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from ftd_lightning.bounds import check_bounds
from ftd_lightning.shipped_configs import with_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SECTION = re.compile(r"\n\n(?=[A-Z]\w*:\n)")  # of a docstring in Google style
ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)
# Lines of jsonargparse's errors that repeat the types of a union.
NOISE = re.compile("$|Parser key|Does not|Subtypes|Errors|Given value|Problem with|Expected a path|.*'NoneType'")


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, set(names), n=3, cutoff=0.75)
    return f"{kind} {name!r}" + (f": did you mean {' or '.join(near)}?" if near else "")


def explain(message: str, options: Iterable[str]) -> str:
    """Reduce an error of jsonargparse to one line with the nearest names; ``options`` are the parser's, with dashes."""
    if found := re.search(r"class_path '([\w.]+)\.(\w+)':\s+Option '(\w+)' is not accepted", message):
        known = inspect.signature(getattr(sys.modules[found[1]], found[2])).parameters
        return _unknown(f"{found[2]} has no option", found[3], known)
    if found := re.search(r"unrecognized arguments: ([^\s=]+)|does not accept option '([\w.]+)'", message):
        given = found[1] or f"--{found[2]}"
        group, dot, rest = given.partition(".")
        groups = difflib.get_close_matches(group, {option.partition(".")[0] for option in options}, n=1)
        moved = [f"{near}{dot}{rest}" for near in groups if near != group]
        return _unknown("unknown argument", given, [*options, *moved])
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return _unknown(f"{found[1]} has no", found[2], dir(sys.modules[found[1]]))
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        own = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("ftd_lightning.")]
        return _unknown("unknown class", found[1], [name for module in own for name in module.get("__all__", ())])
    inner, *values = re.split(r"\n *Given value: ", message)
    causes = dict.fromkeys(line.strip(" -") for line in inner.splitlines() if not NOISE.match(line.strip(" -")))
    given = [f"not {value.splitlines()[0]}" for value in values[:1] if "Got value" not in inner]
    keys = ".".join(re.findall(r'Parser key "([\w.]+)"', inner))
    return ": ".join(filter(None, [keys, ", ".join([*causes, *given])]))


class OneLineErrors(ArgumentParser):
    """Tells a mistake in one line, where jsonargparse prints the usage first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2."""
        if not self.exit_on_error:  # a parser of a class's arguments within another one
            super().error(message, ex)
        parser: ArgumentParser = (vars(ex) if ex else {}).get("subcommand_parser", self)
        line = explain(message, re.findall(r"--[\w.-]+", parser.format_usage()))
        hint = "" if line.endswith("?") else f"; see {parser.prog.replace(' [options]', '')} --help"
        self.exit(2, f"ftd: error: {line}{hint}\n")


def _kind(annotation: Any) -> dict[str, Any]:
    """Say how an option of this type is read: a switch, a list of values, or one value."""
    if annotation is bool:
        return {"action": ActionYesNo}
    if {int, list[int]} <= set(get_args(annotation)):
        return {"type": numbers}
    for member in get_args(annotation) or ():
        if get_origin(member) in (list, Sequence) and NoneType in get_args(annotation):
            annotation = member  # an optional list
    if get_origin(annotation) in (list, Sequence):
        return {"type": get_args(annotation)[0], "nargs": "+"}
    return {"type": annotation}


def numbers(text: Any) -> Any:
    """Read a whole number, several that commas join, or a word; the parser may pass what was read again."""
    if not isinstance(text, str):
        return text
    found = [part if part.isalpha() else int(part) for part in text.strip("[]").split(",")]
    return found[0] if len(found) == 1 else found


def command_parser(command: Callable[..., Any], name: str) -> OneLineErrors:
    """Build the parser of a command, a function or a dataclass, from its signature and docstring in Google style.

    Keyword-only parameters become options, and so do all of a class; the others are positional. Words are joined by "-"
    or "_". A bool is a switch (``--ema``, ``--no_ema``), a sequence takes one value or more. ``overrides`` is left out.
    """
    doc = inspect.getdoc(command) or ""
    parser = OneLineErrors(prog=f"ftd {name}", description=SECTION.split(doc)[0], allow_abbrev=False)
    helps, types = dict(ARGUMENT.findall(doc)), get_type_hints(command)
    for key, parameter in inspect.signature(command).parameters.items():
        if key == "overrides":
            continue
        options: dict[str, Any] = {"help": " ".join(helps.get(key, "").split()), **_kind(types[key])}
        required = parameter.default is parameter.empty
        if not required:
            options["default"] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        if parameter.kind is parameter.KEYWORD_ONLY or inspect.isclass(command):
            spellings = dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"])
            parser.add_argument(*(["-c"] if key == "config" else []), *spellings, required=required, **options)
        else:
            if not required:
                options["nargs"] = "*" if "nargs" in options else "?"
            parser.add_argument(key, **options)
    return parser


def with_values(arguments: Iterable[str]) -> list[list[str]]:
    """Group each option with its values; the first group are the arguments before any option."""
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(argument)
    return groups


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of a command from those that it hands on to fits: of one value, with a dot in their name.

    Example:
        >>> split_overrides(["--ipc", "1", "--data.root", "images", "folder", "--minutes=2", "--model.lr=-1"])
        (['--ipc', '1', 'folder', '--minutes=2'], ['--data.root', 'images', '--model.lr=-1'])
    """
    own: list[str] = []
    overrides: list[str] = []
    for group in with_values(arguments):
        name, joined, _ = group[0].partition("=")
        count = (1 if joined else 2) if name.startswith("--") and "." in name else 0
        overrides += group[:count]
        own += group[count:]
    return own, overrides


def parse_command(command: Callable[..., Any], name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Read the arguments of a command; see :func:`command_parser`. Numbers out of range raise InputError.

    Returns:
        A value for each parameter. ``overrides`` takes all options with a dot in their name, with their values.
    """
    own, overrides = arguments, None
    if "overrides" in inspect.signature(command).parameters:
        own, overrides = split_overrides(arguments)
    parsed: dict[str, Any] = with_home(command_parser(command, name).parse_args(own).as_dict())
    check_bounds(command, parsed)
    return parsed if overrides is None else {**parsed, "overrides": overrides}
