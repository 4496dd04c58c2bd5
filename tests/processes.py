"""Processes that start within a tenth of a second: forked from a server that has imported Lightning and this library.

Exit codes, signals, working folders and streams are those of any process. Only what Python reads from the environment
when it starts is not: PYTHONPATH, OMP_NUM_THREADS and the like are the server's.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["ftd_lightning.lightning_cli", "torch.utils.tensorboard", "torch._dynamo", "PIL.Image", "fits", "processes"]
)


class Running:
    """A function in a process of its own.

    Args:
        function: importable by name, as all that is pickled.
        arguments: for the function.
        cwd: working folder.
        env: environment variables beside those of this process.

    Attributes:
        pid: of the process.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        cwd: Path | str | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self._arguments = arguments
        self._folder = Path(tempfile.mkdtemp())
        self._streams = [str(self._folder / "stdout"), str(self._folder / "stderr")]
        environment = {**os.environ, **(env or {})}
        settings = (str(cwd or Path.cwd()), environment, self._streams, function, arguments)
        self._process = FORKED.Process(target=_run, args=settings)
        # The server would import the module that began this process, be it pytest or another.
        with mock.patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}):
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Give the exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        """Read what it has written so far to standard output and standard error."""
        paths = [Path(path) for path in self._streams]
        return tuple(path.read_text(errors="replace") if path.is_file() else "" for path in paths)

    def wait_for(self, condition: Callable[[], Any], *, timeout: float = 120) -> None:
        """Wait until a condition holds or the process has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None and not condition() and time.monotonic() < end:
            time.sleep(0.005)

    def wait(self, timeout: float = 300) -> CompletedProcess[str]:
        """Wait for the end; give the exit code and what was written.

        Raises:
            subprocess.TimeoutExpired: if it does not end in time; it is killed then.
        """
        self._process.join(timeout)
        if self.poll() is None:
            self.close()
            raise subprocess.TimeoutExpired(str(self._arguments), timeout)
        return CompletedProcess(list(self._arguments), self._process.exitcode, *self.output())

    def close(self) -> None:
        """Kill the process if it still runs, and remove its files."""
        if self.poll() is None:
            self._process.kill()
            self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _run(cwd: str, environment: dict[str, str], streams: list[str], function: Callable[..., Any], arguments) -> None:
    """Set up the forked process as a shell would, and call the function."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # Standard output is buffered as in a pipe, standard error by lines.
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what runs in the background
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def ftd(*arguments: str) -> None:
    """Run the ``ftd`` command as its script does."""
    from ftd_lightning.cli import main

    sys.argv = ["ftd", *arguments]
    main()


def start_ftd(*arguments: Any, **options: Any) -> Running:
    """Start ``ftd`` with arguments, which become strings; the options are those of :class:`Running`."""
    return Running(ftd, *map(str, arguments), **options)


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2, timeout: float = 240, **options: Any):
    """Call a function in each of several processes, which Lightning takes for the ranks of one DDP job.

    The function makes its Trainer with ``strategy="ddp", devices=ranks`` and writes its results to files.

    Returns:
        What :meth:`Running.wait` gives, for each rank; a rank that fails ends the others and is an AssertionError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(ranks), **options.pop("env", {})}
    running = [
        Running(function, *arguments, env={**shared, "LOCAL_RANK": str(rank), "NODE_RANK": "0"}, **options)
        for rank in range(ranks)
    ]
    try:
        end = time.monotonic() + timeout
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            assert time.monotonic() < end, [one.output()[1][-2000:] for one in running]
            time.sleep(0.01)
        done = [one.wait(5) for one in running]
        assert not any(one.returncode for one in done), [one.stderr[-2000:] for one in done]
        return done
    finally:
        for one in running:
            one.close()
