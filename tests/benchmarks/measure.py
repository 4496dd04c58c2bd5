"""Times in turns, and the ratio of two costs with its spread.

What else the machine does at the time meets both sides alike when they take turns, so pairs of neighbours are divided:
the median of these ratios is the figure, their range its spread.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

CLOCK = "FTD_BENCHMARK_CLOCK"  # an environment variable, which processes of single measurements inherit
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Row:
    """One quantity of one case, of ours and of the reference, pair by pair.

    A side that ran out of memory has no values, and the row no ratio.
    """

    part: str
    case: str
    quantity: str
    unit: str
    ours: Sequence[float]
    reference: Sequence[float]
    more_is_better: bool = False

    def ratios(self) -> list[float]:
        """ours / reference of every pair."""
        if not (self.ours and self.reference):
            return []
        # A step can leave the peak where it was: 0 MiB added has no ratio, on either side.
        pairs = list(zip(self.ours, self.reference, strict=True))
        return [o / r for o, r in pairs] if all(min(pair) > 0 for pair in pairs) else []

    def summary(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        ratios = self.ratios()
        spread = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)} if ratios else {}
        return {
            **{name: getattr(self, name) for name in ("part", "case", "quantity", "unit", "more_is_better")},
            "ours": median(self.ours) if self.ours else None,
            "reference": median(self.reference) if self.reference else None,
            "ratio": None,
            **spread,
            "pairs": len(ratios),
            "each": {"ours": list(self.ours), "reference": list(self.reference)},
        }


@dataclass
class Result:
    """What a part found: rows of the table, remarks under it, figures for the JSON file, both paths of its cases."""

    rows: list[Row]
    remarks: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Result) -> None:
        """Append another's rows and remarks."""
        self.rows += other.rows
        self.remarks += other.remarks


def now() -> float:
    """Seconds of the clock that times are taken with: the wall clock, or what this process has computed (``CLOCK``)."""
    return time.process_time() if os.environ.get(CLOCK) == "cpu" else time.perf_counter()


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes, with all that it started on the GPU."""
    _wait()
    began = now()
    work()
    _wait()
    return now() - began


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turns(works: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each once a round, in turned order every other round, and collect what they give.

    Turned, because whoever goes first after a pause finds another clock frequency and other caches.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            found[name].append(works[name]())
    return found


def about() -> dict[str, Any]:
    """Name the versions and the machine that figures depend on."""
    # Here, for it brings Lightning along, which processes that measure the mathematics' memory do without.
    from ftd_lightning.files.safetensors_io import versions

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        cpu = models[0] if models else cpu
    found = {"device": DEVICE, "cpu": cpu, "threads": torch.get_num_threads(), "versions": versions()}
    return {**found, "gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else found
