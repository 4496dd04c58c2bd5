"""Measure ours beside plain loops, and print ratios with their spread.

    make bench
    PYTHONPATH=tests python -m benchmarks.run [--parts teacher matching evaluation scaling store startup]
                                              [--quick | --short | --full]

Within 25 minutes on two CPU cores. Figures of a machine that does something else as well have a wide range.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import evaluation, matching, report, scaling, startup, store, teacher
from benchmarks.measure import CLOCK, DEVICE, Result
from benchmarks.processes import empty_compiler_cache, environment

PARTS = {
    "teacher": teacher.run,
    "matching": matching.run,
    "evaluation": evaluation.run,
    "scaling": scaling.run,
    "store": store.run,
    "startup": startup.run,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables and write them with the JSON and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all, if not given")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    scale.add_argument("--short", action="store_true", help="three cases of matching, for minutes on a GPU")
    scale.add_argument("--full", action="store_true", help="the whole grid of matching on the CPU too: hours")
    parser.add_argument("--compile", action="store_true", help="compiled paths with --quick too; otherwise always")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of every comparison, at least 1")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of what is written")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: what the process computed, on one thread of a machine that does something else as well",
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.clock == "cpu" and DEVICE != "cpu":
        parser.error("--clock cpu: a GPU does not compute in the process's time")
    scale_name = next((name for name in ("quick", "short", "full") if getattr(options, name)), "normal")
    compiled = options.compile or not options.quick
    settings = {"parts": options.parts, "scale": scale_name, "repeats": options.repeats, "compile": compiled}
    settings["clock"] = options.clock
    results: dict[str, Result] = {}
    for part in options.parts:
        began = time.perf_counter()
        with empty_compiler_cache(), environment(CLOCK, options.clock):
            results[part] = PARTS[part](scale_name, options.repeats, compiled=compiled)
        report.write(options.output, results, settings)  # as far as it has come: the next part may take long
        print(f"{part}: measured in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(report.write(options.output, results, settings))


if __name__ == "__main__":
    main()
