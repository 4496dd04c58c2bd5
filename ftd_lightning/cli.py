"""The ``ftd`` command: LightningCLI's verbs, and those of this library beside them."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.lightning_cli import run

if TYPE_CHECKING:
    from collections.abc import Sequence

# What is no fit: each a module with a main(arguments), imported when it is asked for.
VERBS = {
    "compare": "ftd_lightning.studies.compare",
    "export": "ftd_lightning.artefacts.export",
    "import": "ftd_lightning.artefacts.import_set",
    "info": "ftd_lightning.artefacts.info",
    "nas": "ftd_lightning.studies.nas",
    "reproduce": "ftd_lightning.studies.reproduce",
    "trajectory-error": "ftd_lightning.studies.trajectory_error_command",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command as a program: a mistake in the input is one line on standard error and exit code 1."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        if words and words[0] in VERBS:
            importlib.import_module(VERBS[words[0]]).main(words[1:])
        else:
            run(None if args is None else words)
    except Exception as error:
        known = _known_error(error)
        if known is None:
            raise
        print(f"ftd: error: {known}", file=sys.stderr)
        sys.exit(1)


def _known_error(error: BaseException | None) -> BaseException | None:
    """Find an error of ours behind the one that came out: the parser wraps what constructors raise."""
    while error is not None and not isinstance(error, (InputError, DivergenceError)):
        error = error.__cause__ or error.__context__
    return error
