"""A progress bar for one long call that tells nothing until it is done."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def estimated_bar(description: str, seconds: float) -> Iterator[None]:
    """Show a bar that runs by the clock towards an estimate, with the time left by it.

    It stops short of the end while the block still runs, and is filled when the block is done.

    Args:
        description: what is going on.
        seconds: how long it is thought to take, > 0.

    Example:
        >>> with estimated_bar("nothing", 0.1):
        ...     pass
    """
    seconds = max(seconds, 0.1)  # an estimate of a quick job may be 0
    done, began = threading.Event(), time.monotonic()
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
    bar = tqdm(total=100.0, desc=description, bar_format=layout, disable=seconds < 1)

    def run() -> None:
        while not done.wait(0.2):
            bar.update(min(99.0, 100 * (time.monotonic() - began) / seconds) - bar.n)

    clock = threading.Thread(target=run, daemon=True)
    clock.start()
    try:
        yield
        bar.update(100.0 - bar.n)
    finally:
        done.set()
        clock.join()
        bar.close()
