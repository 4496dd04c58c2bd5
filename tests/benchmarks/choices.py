"""Eager or compiled: what each takes for a fit of full length, which one ``compile: auto`` takes, and the goals."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.measure import DEVICE, Row

# Times the speed of the plain loop that the path of "auto" is to have on a CPU, compilation not counted.
GOALS = {"teacher": 1.8, "matching": 1.5, "evaluation": 1.2}
UNCLEAR = "no clear difference"
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
            return {**about, "seconds": None, "faster": None, "right": None, "speed_up": None}
        plain = median([*self.eager.reference, *self.compiled.reference])
        # Of every pair: the whole fit, and from it what is clear whichever pair one takes.
        each = {name: [self.units * plain * ratio for ratio in row.ratios()] for name, row in rows.items()}
        each["compiled"] = [seconds + self.compile_seconds for seconds in each["compiled"]]
        clear = [a for a, b in (("eager", "compiled"), ("compiled", "eager")) if max(each[a]) < min(each[b])]
        speed_ups = sorted(1 / ratio for ratio in rows[about["auto"]].ratios())
        return {
            **about,
            "seconds": {name: median(times) for name, times in each.items()},
            "faster": clear[0] if clear else UNCLEAR,
            "right": not clear or clear[0] == about["auto"],
            "speed_up": median(speed_ups),
            "range": [speed_ups[0], speed_ups[-1]],
            "goal": GOALS[self.part] if DEVICE == "cpu" else None,
        }


def against_goal(choice: dict[str, Any]) -> str:
    """Say whether all pairs reach the goal, none does, or some do.

    Example:
        >>> [against_goal({"goal": 1.5, "range": found}) for found in ([1.6, 2.0], [1.0, 1.2], [1.4, 1.6])]
        ['1.5x reached', '1.5x missed', '1.5x undecided']
    """
    (low, high), goal = choice["range"], choice["goal"]
    return f"{goal}x {'reached' if low >= goal else 'missed' if high < goal else 'undecided'}"


def line(choice: dict[str, Any]) -> str:
    """A line of the table, of what :meth:`Choice.summary` gives."""
    cells = [choice["part"], choice["case"], choice["fit"]]
    if choice["seconds"] is None:
        return (
            "| " + " | ".join([*cells, "-", "-", f"{choice['compile_seconds']:.0f}", choice["auto"], "-", "-"]) + " |"
        )
    speed = "{:.2f}x ({:.2f} to {:.2f})".format(choice["speed_up"], *choice["range"])
    speed += f", {against_goal(choice)}" if choice["goal"] else ""
    cells += [f"{choice['seconds'][path]:,.0f}" for path in ("eager", "compiled")]
    cells += [f"{choice['compile_seconds']:.0f}", choice["auto"], choice["faster"]]
    return "| " + " | ".join([*cells, speed]) + " |"
