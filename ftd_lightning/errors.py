"""The two errors that are told in one line: what the user can put right, and a run that went astray."""


class InputError(ValueError):
    """A mistake in the input, told in one line that names the file or value and what to do.

    The command line prints it without a traceback and exits with 1; library code may catch it as a ``ValueError``.

    Args:
        message: line breaks in it, of odd file names for instance, become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class DivergenceError(RuntimeError):
    """A run whose losses or gradients stopped being finite; what was good is on disk."""
