"""Commands as typed functions: the signature names the arguments, the docstring explains them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from ftd_lightning.bounds import check_bounds
from ftd_lightning.shipped_configs import with_home

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

SECTION = re.compile(r"\n\n(?=[A-Z]\w*:\n)")  # of a docstring in Google style


def command_parser(command: Callable[..., Any], name: str, *, skip: Collection[str] = ()) -> ArgumentParser:
    """Build the parser of a command from its signature and docstring.

    Args:
        command: its keyword-only parameters are options, the others positional.
        name: of the command, after ``ftd``.
        skip: parameters that are not read from the command line.
    """
    description = SECTION.split(inspect.getdoc(command) or "")[0]
    parser = ArgumentParser(prog=f"ftd {name}", description=description, allow_abbrev=False)
    parameters = inspect.signature(command).parameters.values()
    options = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    positional = {parameter.name for parameter in parameters} - options
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip={*options, *skip})
    parser.add_function_arguments(command, as_group=False, skip={*positional, *skip})
    return parser


def _is_list(annotation: Any) -> bool:
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return any(get_origin(kind) in (list, Sequence) for kind in kinds)


def spelled_out(command: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Rewrite what people type as the parser wants it.

    ``--syn-steps`` is ``--syn_steps``; a switch needs no value, but may have one; a list takes all arguments up to the
    next option, and an option that is repeated adds to it.

    Args:
        command: its annotations say which parameters are switches and lists.
        arguments: of the command line.

    Example:
        >>> def draw(*, class_names: list[str] | None, ema: bool = False) -> None: ...
        >>> spelled_out(draw, ["set", "--class-names", "cat", "dog", "--ema"])
        ['set', '--ema=true', '--class_names=["cat", "dog"]']
        >>> spelled_out(draw, ["--ema", "false", "set"])
        ['--ema=false', 'set']
    """
    types = get_type_hints(command)
    rewritten: list[str] = []
    lists: dict[str, list[str]] = {}
    gathering: list[str] | None = None
    switch: str | None = None  # the last argument, if it was one without a value
    for argument in arguments:
        if switch is not None and argument in ("true", "false"):
            rewritten[-1], switch = f"--{switch}={argument}", None
            continue
        switch = None
        if not argument.startswith("--"):
            (rewritten if gathering is None else gathering).append(argument)
            continue
        gathering = None
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if types.get(name) is bool and not equals:
            rewritten.append(f"--{name}=true")
            switch = name
        elif _is_list(types.get(name)) and not value.startswith("["):
            gathering = lists.setdefault(name, [])
            gathering += [value] if equals else []
        else:
            rewritten.append(f"--{name}{equals}{value}")
    for name, values in lists.items():
        if values:
            is_yaml = len(values) == 1 and values[0].startswith("[")
            rewritten.append(f"--{name}={values[0] if is_yaml else json.dumps(values)}")
        else:
            rewritten.append(f"--{name}")  # the parser reports the missing value
    return rewritten


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


def parse_command(
    command: Callable[..., Any],
    name: str,
    arguments: Sequence[str],
    *,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """Read the arguments of a command; see :func:`command_parser`.

    Returns:
        A value for each parameter that is not skipped.

    Raises:
        SystemExit: with code 2 for arguments that are unknown, missing or of the wrong type; with 0 for ``--help``.
        InputError: for numbers out of range.
    """
    parser = command_parser(command, name, skip=skip)
    parsed: dict[str, Any] = with_home(parser.parse_args(spelled_out(command, arguments)).as_dict())
    check_bounds(command, parsed)
    return parsed
