"""The ``ftd`` command: LightningCLI's verbs, and this library's commands beside them."""

from __future__ import annotations

import ctypes
import difflib
import importlib
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

import ftd_lightning
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.terminal import EndedBySignal, plain_where_needed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERBS = {
    "fit": "train teachers, distil them into a set, or train networks on a set: the config names the module",
    "validate": "measure a checkpoint on the held-out training images",
    "test": "measure a checkpoint on the test images",
    "predict": "write a checkpoint's logits of the test images to predictions.npy",
}
AGAIN = "run the same command again"
# Each command's module, whose main(arguments) runs it, and a line of help.
COMMANDS = {
    "compare": ("studies.compare", "run several methods or values of a setting, and tabulate them"),
    "configs": ("commands.configs", "list the configs that ship, print one, or copy one"),
    "distill": ("studies.distill", "distil a folder of images, or a data set, in a number of minutes"),
    "export": ("commands.export", "write a set as PNGs in class folders with a card, tensors or parameters"),
    "import": ("commands.import_set", "make a set from a file of images and one of labels, or from parameters"),
    "info": ("commands.info", "describe a set, a store, a teacher or a whitening"),
    "label": ("studies.label", "label random real images with the teacher's best checkpoint"),
    "nas": ("studies.nas", "rank architectures by training them on a set"),
    "rank": ("studies.rank", "score sets fairly against random real images"),
    "reproduce": ("studies.reproduce", "run one cell of the published tables"),
    "trajectory-error": ("studies.trajectory_error", "measure how far a student on a set drifts from its teachers"),
}


def help_text() -> str:
    """Format the text of ``ftd --help``."""
    width = max(map(len, COMMANDS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return f"""\
usage: ftd [--debug] COMMAND [ARGUMENT ...]

Dataset distillation by trajectory matching.

Verbs of LightningCLI, configured by --config FILE (-c), --model.*, --data.* and --trainer.*:
{verbs}

Commands on sets, stores and many fits:
{commands}

ftd COMMAND --help explains a command. Options before it:
  {"--debug":<{width}}  show the traceback of an error that is otherwise one line
  {"--version":<{width}}  print the version"""


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, instead of mapping large blocks anew; see docs/performance.md.

    Elsewhere, and where ``MALLOC_MMAP_MAX_`` is exported, nothing changes.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def main(args: Sequence[str] | None = None) -> None:
    """Run a command as a program: a mistake in the input is one line on standard error and exit code 1.

    SIGTERM and Ctrl-C end it with exit code 143 and 130, and one line that says how to resume. ``args`` are those after
    ``ftd``, by default of the process; ``--debug`` before the command raises such mistakes with their traceback.
    """
    keep_freed_memory()
    arguments = list(sys.argv[1:] if args is None else args)
    debug = arguments[:1] == ["--debug"]
    arguments = arguments[debug:]
    resume = "resume with the same command and --ckpt_path last" if arguments[:1] == ["fit"] else AGAIN
    as_program(lambda: _dispatch(arguments), resume=resume, debug=debug)


def as_program(run: Callable[[], None], *, resume: str = AGAIN, debug: bool = False) -> None:
    """Run a function as a program; see :func:`main`. ``resume`` is advice after a signal has ended it."""
    plain_where_needed(sys.stdout)
    plain_where_needed(sys.stderr)
    ended = EndedBySignal()
    try:
        with ended:
            run()
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        message = _message(error)
        if message is None or debug:
            raise
        print(f"ftd: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)
    if ended.signal is not None:
        how = "terminated" if ended.signal == signal.SIGTERM else "interrupted"
        print(f"ftd: {how}: {resume}", file=sys.stderr)
        sys.exit(128 + ended.signal)


def _dispatch(arguments: Sequence[str]) -> None:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(help_text())
    elif first == "--version":
        print(f"ftd {ftd_lightning.__version__}")
    elif first in COMMANDS:
        importlib.import_module(f"ftd_lightning.{COMMANDS[first][0]}").main(arguments[1:])
    elif first in VERBS or first.startswith("-") or not first:
        from ftd_lightning.lightning_cli import run  # imports Lightning, which the other commands do not wait for

        run(list(arguments))
    else:
        near = difflib.get_close_matches(first, [*VERBS, *COMMANDS], n=1)
        hint = f"did you mean {near[0]}?" if near else "ftd --help lists the commands"
        print(f"ftd: error: unknown command {first!r}: {hint}", file=sys.stderr)
        sys.exit(2)


def _message(error: BaseException | None) -> str | None:
    """Return the line for a mistake of the user, or for a file that cannot be read or written; None for a bug.

    Only explicit causes are followed: the parser raises its own error *from* that of a constructor.
    """
    # Without Lightning imported, none of its errors can have been raised.
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    mistakes = (InputError, DivergenceError, *([lightning.MisconfigurationException] if lightning else []))
    # Lightning restores a checkpoint of odd content without looking at it.
    frames = traceback.format_tb(error.__traceback__) if error else []
    restores = any("checkpoint_connector" in frame and "in restore_" in frame for frame in frames)
    odd = f"ckpt_path: the checkpoint does not fit these settings, or is damaged ({error}); begin the fit anew"
    while error is not None:
        if isinstance(error, mistakes):
            return str(error)
        if isinstance(error, OSError) and error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        if "embedded null byte" in str(error):
            return "a path must not contain a null byte"
        error = error.__cause__
    return odd if restores else None
