"""The two exceptions that the command line shows in one line: user errors and diverged runs."""


class InputError(ValueError):
    """A mistake in the input, in one line that names the file or value and says what to do; ``ftd`` exits with 1.

    Args:
        message: its line breaks, of odd file names for instance, become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class DivergenceError(RuntimeError):
    """A run whose losses or gradients stopped being finite; earlier results are on disk."""
