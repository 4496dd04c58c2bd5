"""What processes of several nodes tell each other when one of them fails.

On one node torchrun ends all processes when one fails. It does not tell other nodes, whose processes would wait for the
missing one: half an hour for a process that never arrived, and for ever in some collective operations. They all reach
the key-value store of torchrun's first node, though, from before a process group exists until the last one has ended.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in its __all__

CONNECT = 30.0  # seconds to reach the store
EVERY = 0.5  # seconds between two looks
GRACE = 20.0  # seconds for a process to end by itself, so that its callbacks write what is good
HEARD = 5.0  # seconds for which a failing process keeps torchrun's store alive for the others


class Peers:
    """Tells the other processes of a run of a failure, and ends this one where another has failed.

    Args:
        store: of the run.
        attempt: torchrun's count of restarts, each of which has failures of its own.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, store: TCPStore, *, attempt: int, rank: int, world_size: int) -> None:
        self._store = store
        self._failed, self._heard = (f"ftd/{attempt}/{name}" for name in ("failed", "heard"))
        self._rank, self._world_size = rank, world_size
        self._ending = threading.Event()
        self._counted = False  # among those that know of the failure
        self._thread = threading.Thread(target=self.watch, name="ftd-peers", daemon=True)
        self._lock = threading.Lock()  # one user of the store at a time

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ) -> Peers | None:
        """Join the other processes and begin to watch them; None unless torchrun started several nodes."""
        world_size = int(environment.get("WORLD_SIZE", 1))
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        if world_size <= int(environment.get("LOCAL_WORLD_SIZE", world_size)):
            return None
        from datetime import timedelta

        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=CONNECT))
        except RuntimeError:  # the first node is gone; what needs it will say so
            return None
        attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
        peers = cls(store, attempt=attempt, rank=int(environment["RANK"]), world_size=world_size)
        peers.start()
        return peers

    def start(self) -> None:
        """Begin to watch the others."""
        self._thread.start()

    def leave(self) -> None:
        """End the watch, before the interpreter ends: a thread that is then within the store aborts the process."""
        self._ending.set()
        self._thread.join()

    def tell(self, message: str) -> None:
        """Tell the others that this process fails, unless one has failed before; wait until they know.

        Args:
            message: line breaks in it become spaces.
        """
        self._ending.set()
        try:
            with self._lock:
                self._store.compare_set(self._failed, "", f"{self._rank} {' '.join(message.split())}")
            self._know()
            until = time.monotonic() + HEARD
            while time.monotonic() < until:
                with self._lock:
                    if self._store.add(self._heard, 0) >= self._world_size:
                        return
                time.sleep(EVERY / 5)
        except RuntimeError:  # the store has gone with the first node
            return

    def failure(self, wait: float = 0.0) -> str | None:
        """Return what another process failed of, in one line; None where none has.

        Args:
            wait: seconds to wait for such a message: the end of a connection may be noticed before its reason.
        """
        until = time.monotonic() + wait
        while True:
            try:
                with self._lock:
                    told = self._store.get(self._failed).decode() if self._store.check([self._failed]) else ""
            except RuntimeError:
                return None
            rank, _, message = told.partition(" ")
            if rank and int(rank) != self._rank:
                return f"process {rank}: {message}"
            if told or time.monotonic() >= until:
                return None
            time.sleep(EVERY / 5)

    def _know(self) -> None:
        """Count this process among those that know of the failure, once."""
        with self._lock:
            if not self._counted:
                self._counted = True
                self._store.add(self._heard, 1)

    def watch(self) -> None:
        """Look for a failure until this process ends; end it where another has failed and nothing else does."""
        while not self._ending.wait(EVERY):
            message = self.failure()
            if message is None:
                continue
            with suppress(RuntimeError):
                self._know()
            # Waiting in a collective operation, the main thread can run no handler of Python's.
            if not self._ending.wait(GRACE):
                print(f"ftd: error: {message}", file=sys.stderr, flush=True)
                os._exit(1)
            return
