"""Measurements in a process of their own, so that no peak hides in another's memory."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
MIB = 2**20
NO_MEMORY = {"out_of_memory": True}


def in_process(function: str, **options: Any) -> dict[str, Any]:
    """Call ``module:function`` of this folder in a new process and give what it returns.

    Args:
        function: e.g. "matching:memory".
        options: its arguments, as JSON holds them.

    Raises:
        RuntimeError: if it fails otherwise than by running out of memory, with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.processes", function, json.dumps(options)]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode == -signal.SIGKILL:  # by the kernel, whose limit for this group of processes is below ours
        return NO_MEMORY
    if done.returncode:
        raise RuntimeError(f"{function} {options} failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for this process and those it starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def empty_compiler_cache() -> Iterator[None]:
    """Give inductor an empty cache in this process and those it starts, so that compiling takes what it takes once."""
    with tempfile.TemporaryDirectory() as folder, environment("TORCHINDUCTOR_CACHE_DIR", folder):
        yield


def _status(key: str) -> float:
    """A size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def resident() -> float:
    """MiB that the process holds now (resident set)."""
    return _status("VmRSS")


def held() -> float:
    """MiB held now on the device, and the peak counted from here on."""
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")
        return resident()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / MIB


def peak() -> float:
    """MiB held at most since :func:`held`: resident set on the CPU, allocated on CUDA.

    Not ``ru_maxrss``: that one begins with the memory of the process that started this one.
    """
    if not torch.cuda.is_available():
        return _status("VmHWM")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / MIB


def stay_within_free_memory(share: float = 0.9) -> None:
    """Make allocations beyond the memory that is free now fail, instead of driving the machine into swap."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = int(_status("VmData") * MIB + share * free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    """Answer :func:`in_process`."""
    where, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(f"benchmarks.{where}"), name)
    try:
        answer = function(**json.loads(sys.argv[2]))
    except (torch.OutOfMemoryError, MemoryError):
        answer = NO_MEMORY
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        answer = NO_MEMORY
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
