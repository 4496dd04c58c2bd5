"""The ``ftd`` command: LightningCLI's verbs, and this library's commands beside them."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

import ftd_lightning
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.terminal import EndedBySignal, plain_where_needed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


# What the operating system refuses, rather than what a bug of ours would ask of it.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
}


class Command(NamedTuple):
    """One command.

    Attributes:
        summary: a line for ``ftd --help``.
        module: whose ``main(arguments)`` runs it, imported when needed; None for a verb of LightningCLI.
        resume: what to do after it was ended by a signal.
    """

    summary: str
    module: str | None = None
    resume: str = "run it again"


CONTINUES = "the same command continues"
COMMANDS = {
    "fit": Command(
        "train teachers, distil them into a set, or train networks on a set: what the config's module does",
        resume="resume with the same command and --ckpt_path last",
    ),
    "validate": Command("measure a checkpoint on the held-out training images"),
    "test": Command("measure a checkpoint on the test images"),
    "predict": Command("write a checkpoint's logits of the test images to predictions.npy"),
    "compare": Command(
        "run several methods or values of a setting, and tabulate them", "ftd_lightning.studies.compare", CONTINUES
    ),
    "configs": Command("list the configs that ship, print one, or copy one", "ftd_lightning.commands.configs"),
    "distill": Command(
        "distil a folder of images, or a data set, in a number of minutes", "ftd_lightning.studies.distill", CONTINUES
    ),
    "export": Command(
        "write a set as PNGs in class folders with a card, or as tensors", "ftd_lightning.commands.export"
    ),
    "import": Command("make a set of a file of images and one of labels", "ftd_lightning.commands.import_set"),
    "info": Command("describe a set, a store, a teacher or a whitening", "ftd_lightning.commands.info"),
    "label": Command("give random images the labels of a teacher, of its best epoch", "ftd_lightning.studies.label"),
    "nas": Command("rank architectures by training them on a set", "ftd_lightning.studies.nas", CONTINUES),
    "rank": Command("score sets fairly against random real images", "ftd_lightning.studies.rank", CONTINUES),
    "reproduce": Command(
        "run one cell of the published tables and record it", "ftd_lightning.studies.reproduce", CONTINUES
    ),
    "trajectory-error": Command(
        "measure how far a student on a set drifts from its teachers", "ftd_lightning.studies.trajectory_error"
    ),
}


def help_text() -> str:
    """Format what ``ftd --help`` prints.

    Example:
        >>> print(help_text().splitlines()[0])
        usage: ftd [--debug] COMMAND [ARGUMENT ...]
    """
    width = max(map(len, COMMANDS))

    def lines(*, lightning: bool) -> list[str]:
        chosen = {name: command for name, command in COMMANDS.items() if (command.module is None) == lightning}
        return [f"  {name:<{width}}  {command.summary}" for name, command in chosen.items()]

    return "\n".join(
        [
            "usage: ftd [--debug] COMMAND [ARGUMENT ...]",
            "",
            "Dataset distillation by trajectory matching.",
            "",
            "Verbs of LightningCLI, configured by --config FILE (-c), --model.*, --data.* and --trainer.*:",
            *lines(lightning=True),
            "",
            "Commands on sets, stores and many fits:",
            *lines(lightning=False),
            "",
            "ftd COMMAND --help explains a command. Options before it:",
            f"  {'--debug':<{width}}  show the traceback of an error that is otherwise one line",
            f"  {'--version':<{width}}  print the version",
        ]
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run a command as a program: a mistake in the input is one line on standard error and exit code 1.

    SIGTERM and Ctrl-C end it with exit code 143 and 130, and one line that says how to resume.

    Args:
        args: what follows ``ftd``; None takes it from the process. ``--debug`` before the command raises such mistakes
            with their traceback.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    verb = next((index for index, argument in enumerate(arguments) if argument in COMMANDS), len(arguments))
    options = arguments[:verb]
    debug = "--debug" in options
    options = [option for option in options if option != "--debug"]
    command = COMMANDS.get(arguments[verb]) if verb < len(arguments) else None
    resume = command.resume if command else "run it again"
    as_program(lambda: _dispatch([*options, *arguments[verb:]]), resume=resume, debug=debug)


def as_program(run: Callable[[], None], *, resume: str, debug: bool = False) -> None:
    """Run a function as a program; see :func:`main`.

    Args:
        run: what to do.
        resume: what to do after it was ended by a signal.
        debug: raise mistakes of the user with their traceback.
    """
    plain_where_needed(sys.stdout)
    plain_where_needed(sys.stderr)
    ended = EndedBySignal()
    try:
        with ended:
            run()
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        known = _known_error(error)
        if known is None or debug:
            raise
        print(f"ftd: error: {' '.join(known.split())}", file=sys.stderr)
        sys.exit(1)
    if ended.signal is not None:
        how = "terminated" if ended.signal == signal.SIGTERM else "interrupted"
        print(f"ftd: {how}: {resume}", file=sys.stderr)
        sys.exit(128 + ended.signal)


def _dispatch(arguments: list[str]) -> None:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(help_text())
    elif first == "--version":
        print(f"ftd {ftd_lightning.__version__}")
    elif first in COMMANDS and (module := COMMANDS[first].module) is not None:
        importlib.import_module(module).main(arguments[1:])
    elif first in COMMANDS or first.startswith("-") or not first:
        from ftd_lightning.lightning_cli import run  # help and version shall not wait for Lightning

        run(arguments)
    else:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "ftd --help lists the commands"
        print(f"ftd: error: unknown command {first!r}: {hint}", file=sys.stderr)
        sys.exit(2)


def _known_error(error: BaseException | None) -> str | None:
    """Return the message of the error that a user can mend behind the one that was raised; None where there is none.

    Only explicit causes are followed: the parser raises its own error *from* that of a constructor, whereas an error
    raised while another is handled is a bug.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    while error is not None:
        if isinstance(error, (InputError, DivergenceError, MisconfigurationException)):
            return str(error)
        if isinstance(error, OSError) and error.errno in REFUSALS and error.filename is not None:
            name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else error.filename
            return f"{name}: {error.strerror}"
        error = error.__cause__
    return None
