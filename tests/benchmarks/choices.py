"""Eager or compiled: what each takes for a fit of full length, which one ``compile: auto`` takes, and the goals."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.measure import DEVICE, Row

# Times the speed of the plain loop that the path of "auto" is to have on a CPU, compilation not counted.
GOALS = {"teacher": 1.8, "matching": 1.5, "evaluation": 1.2}
NO_CLEAR_DIFFERENCE = 0.05  # of the seconds of a fit: medians of a few pairs are no better than that
HEAD = "| part | case | full fit | eager, s | compiled, s | compiling, s | auto | the faster | speed, goal |"


@dataclass
class Choice:
    """One case of one part, on both paths.

    Attributes:
        part: of the benchmark.
        case: of the part.
        fit: what a fit of full length does, in words.
        units: how many times it does what the rows time.
        eager: seconds of a unit, beside the plain loop.
        compiled: the same, without compilation.
        compile_seconds: from an empty compiler cache.
        auto: whether ``compile: auto`` compiles the full fit.
    """

    part: str
    case: str
    fit: str
    units: float
    eager: Row
    compiled: Row
    compile_seconds: float
    auto: bool

    def summary(self) -> dict[str, Any]:
        """Seconds of the full fit on both paths, and which of them is the faster; as JSON holds it.

        Both are set against one and the same speed of the plain loop, for the machine may have had another speed when
        the other path was measured.
        """
        about = {name: getattr(self, name) for name in ("part", "case", "fit", "units", "compile_seconds")}
        about["auto"] = "compiled" if self.auto else "eager"
        rows = {"eager": self.eager, "compiled": self.compiled}
        if not all(row.ratios() for row in rows.values()):
            return {**about, "seconds": None, "faster": None, "right": None, "speed_up": None, "goal": None}
        plain = median([*self.eager.reference, *self.compiled.reference])
        ratios = {name: median(row.ratios()) for name, row in rows.items()}
        seconds = {name: self.units * plain * ratio for name, ratio in ratios.items()}
        seconds["compiled"] += self.compile_seconds
        low, high = sorted(seconds.values())
        faster = min(seconds, key=lambda name: seconds[name])
        return {
            **about,
            "seconds": seconds,
            "faster": "no clear difference" if high - low < NO_CLEAR_DIFFERENCE * high else faster,
            "right": bool(seconds[about["auto"]] <= low or high - low < NO_CLEAR_DIFFERENCE * high),
            "speed_up": 1 / ratios[about["auto"]],
            "goal": GOALS[self.part] if DEVICE == "cpu" else None,
        }


def line(choice: dict[str, Any]) -> str:
    """A line of the table, of what :meth:`Choice.summary` gives."""
    cells = [choice["part"], choice["case"], choice["fit"]]
    if choice["seconds"] is None:
        return (
            "| " + " | ".join([*cells, "-", "-", f"{choice['compile_seconds']:.0f}", choice["auto"], "-", "-"]) + " |"
        )
    goal = choice["goal"]
    reached = "" if goal is None else f", {goal}x {'reached' if choice['speed_up'] >= goal else 'missed'}"
    cells += [f"{choice['seconds'][path]:,.0f}" for path in ("eager", "compiled")]
    cells += [f"{choice['compile_seconds']:.0f}", choice["auto"], choice["faster"]]
    return "| " + " | ".join([*cells, f"{choice['speed_up']:.2f}x{reached}"]) + " |"
