"""A command at its terminal: signals that end it, and characters that the terminal cannot show."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO


def plain_where_needed(stream: TextIO) -> None:
    """Let a stream write "?" for characters that its encoding lacks, instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


class TerminatedError(SystemExit):
    """Raised where a command is when SIGTERM arrives."""


class EndedBySignal:
    """Runs a block that SIGTERM and Ctrl-C end quietly; ``signal`` names it afterwards, or is None.

    Within a fit Lightning ends the training after the current step, so that callbacks write their files. Anywhere else,
    and at a second Ctrl-C, the block ends at once. Only the main thread receives signals; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _terminate(self, number: int, frame: Any) -> None:
        self.signal = self.signal or signal.SIGTERM
        if signal.getsignal(signal.SIGTERM) == self._terminate:  # no Trainer has taken over
            raise TerminatedError

    def _interrupt(self, number: int, frame: Any) -> None:
        end_fit = signal.getsignal(signal.SIGTERM)
        # Several ranks cannot agree on a step within a signal handler.
        several = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if self.signal is not None or end_fit == self._terminate or not callable(end_fit) or several:
            raise KeyboardInterrupt
        self.signal = signal.SIGINT
        print("\nftd: ending after this step; Ctrl-C again ends at once", file=sys.stderr)
        end_fit(signal.SIGTERM, frame)

    def __enter__(self) -> EndedBySignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            signal.signal(signal.SIGTERM, self._terminate)
            if self._previous[signal.SIGINT] != signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        for number, handler in self._previous.items():  # Lightning leaves Ctrl-C ignored
            signal.signal(number, handler)
        # Lightning answers Ctrl-C by leaving with code 1, and SIGTERM with its own exit.
        if isinstance(error, KeyboardInterrupt) or (
            isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        ):
            self.signal = signal.SIGINT
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
        return self.signal is not None and (error is None or not isinstance(error, Exception))
