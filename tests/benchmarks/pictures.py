"""Curves: a matching step over the number of inner steps, and what grows with what."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {
    "ours": ("adjoint", "-", "o"),
    "compiled": ("adjoint, compiled", "-.", "s"),
    "reference": ("graph", "--", "x"),
}


def _figure(width: float, height: float) -> Figure:
    # No windows, and no style of the user's: the object-oriented interface needs neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def unroll(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw added memory and time of a matching step over the number of inner steps."""
    figure = _figure(10, 4)
    panels = figure.subplots(1, 2)
    sizes = sorted({(case["ipc"], case["width"]) for case in cases})
    for panel, what in zip(panels, ("memory", "seconds"), strict=True):
        for color, (ipc, width) in enumerate(sizes):
            for method, (name, style, marker) in MARKERS.items():
                points = [
                    (case["steps"], median(_values(case[what][method])))
                    for case in cases
                    if (case["ipc"], case["width"]) == (ipc, width) and case[what].get(method)
                ]
                if points:
                    label = f"ipc {ipc}, width {width}: {name}"
                    panel.plot(*zip(*points, strict=True), style, marker=marker, color=f"C{color}", label=label)
        # A small step may find all the memory it takes among what the process held already.
        positive = all(min(curve.get_ydata()) > 0 for curve in panel.lines)
        panel.set(xlabel="inner steps", yscale="log" if positive else "linear")
        panel.grid(visible=True, alpha=0.3)
    panels[0].set(ylabel="memory added by a matching step, MiB")
    panels[1].set(ylabel="time of a matching step, s")
    panels[1].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def _values(runs: list[Any]) -> list[float]:
    return [run["added"] if isinstance(run, dict) else run for run in runs]


def scaling(panels: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw seconds (above) and MiB (below) of every panel of ``scaling.run``, each over its own quantity."""
    figure = _figure(3.2 * len(panels), 6)
    for column, (quantity, panel) in enumerate(panels.items()):
        for below, (key, unit) in enumerate((("seconds", "s"), ("mib", "MiB"))):
            axes = figure.add_subplot(2, len(panels), 1 + column + below * len(panels))
            for curve, marker in zip(panel["curves"], "ox", strict=False):
                points = [(p["x"], p[key]) for p in panel["points"] if p["curve"] == curve and p[key] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=marker, label=curve)
            axes.set(xlabel=quantity, ylabel=f"{panel[key]}, {unit}")
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, alpha=0.3)
            if not below:
                axes.set_title(panel["title"], fontsize="small")
                if axes.lines:
                    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)
