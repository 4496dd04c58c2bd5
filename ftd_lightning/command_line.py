"""Commands as typed functions: the signature names the arguments, the docstring explains them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from ftd_lightning.bounds import check_bounds
from ftd_lightning.shipped_configs import with_home

if TYPE_CHECKING:
    from collections.abc import Callable

SECTION = re.compile(r"\n\n(?=[A-Z]\w*:\n)")  # of a docstring in Google style
ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)


def _kind(annotation: Any) -> dict[str, Any]:
    """Say how an option of this type is read: a switch, a list of values, or one value."""
    if annotation is bool:
        return {"action": ActionYesNo}
    for member in get_args(annotation) or ():
        if get_origin(member) in (list, Sequence) and NoneType in get_args(annotation):
            annotation = member  # an optional list
    if get_origin(annotation) in (list, Sequence):
        return {"type": get_args(annotation)[0], "nargs": "+"}
    return {"type": annotation}


def command_parser(command: Callable[..., Any], name: str) -> ArgumentParser:
    """Build the parser of a command, a function or a dataclass, from its signature and docstring in Google style.

    Keyword-only parameters become options, and so do all of a class; the others are positional. Words are joined by "-"
    or "_". A bool is a switch (``--ema``, ``--no_ema``), a sequence takes one value or more. ``overrides`` is left out.
    """
    doc = inspect.getdoc(command) or ""
    parser = ArgumentParser(prog=f"ftd {name}", description=SECTION.split(doc)[0], allow_abbrev=False)
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


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of a command from those that it hands on to fits: those with a dot in their name.

    Example:
        >>> split_overrides(["--ipc", "1", "--data.root", "images", "--minutes=2", "--model.lr=-1"])
        (['--ipc', '1', '--minutes=2'], ['--data.root', 'images', '--model.lr=-1'])
    """
    own: list[str] = []
    overrides: list[str] = []
    current = own
    for argument in arguments:
        if argument.startswith("--"):
            current = overrides if "." in argument.partition("=")[0] else own
        current.append(argument)
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
