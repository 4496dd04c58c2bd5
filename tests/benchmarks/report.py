"""What is shown of the figures: a Markdown table, JSON, and curves over the number of inner steps."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Result, Row, about

HEAD = "| part | case | quantity | ours | reference | ours / reference | range, pairs | better |"


def verdict(row: dict[str, Any]) -> str:
    """Say which side is better, and how many times; nothing where pairs disagree.

    Example:
        >>> verdict({"ratio": 0.5, "low": 0.4, "high": 0.6, "more_is_better": False})
        'ours, 2.00x'
        >>> verdict({"ratio": 0.9, "low": 0.8, "high": 1.1, "more_is_better": False})
        'no difference seen'
    """
    if row["ratio"] is None:
        return "-"
    if row["low"] <= 1 <= row["high"]:
        return "no difference seen"
    factor = max(row["ratio"], 1 / row["ratio"])
    return f"{'ours' if (row['ratio'] > 1) == row['more_is_better'] else 'reference'}, {factor:.2f}x"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "out of memory"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def _line(row: dict[str, Any]) -> str:
    spread = f"{row['low']:.2f} to {row['high']:.2f}, {row['pairs']}" if row["pairs"] else "-"
    ratio = f"{row['ratio']:.2f}" if row["pairs"] else "-"
    sides = (_number(row[side], row["unit"]) for side in ("ours", "reference"))
    return "| " + " | ".join([row["part"], row["case"], row["quantity"], *sides, ratio, spread, verdict(row)]) + " |"


def markdown(rows: list[Row], remarks: list[str], machine: dict[str, Any]) -> str:
    """The table, with what it was measured on above it and remarks below."""
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [_line(row.summary()) for row in rows]
    notes = [f"- {remark}" for remark in remarks]
    about_table = (
        f"On {device}; {versions}. Medians; the ratio is the median of ratios of neighbouring pairs, with their range."
    )
    rule = "|" + "---|" * (HEAD.count("|") - 1)
    return "\n".join(["# Benchmark", "", about_table, "", HEAD, rule, *lines, "", *notes]).rstrip() + "\n"


def write(folder: Path, results: dict[str, Result], settings: dict[str, Any]) -> str:
    """Write ``benchmark.md``, ``benchmark.json`` and, with the matching part, ``unroll.png``; gives the table."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = about()
    rows = [row for result in results.values() for row in result.rows]
    table = markdown(rows, [remark for result in results.values() for remark in result.remarks], machine)
    (folder / "benchmark.md").write_text(table)
    content = {
        **machine,
        "settings": settings,
        "rows": [row.summary() for row in rows],
        "details": {part: result.details for part, result in results.items() if result.details},
    }
    (folder / "benchmark.json").write_text(json.dumps(content, indent=2) + "\n")
    if "matching" in results:
        plot(results["matching"].details["cases"], folder / "unroll.png")
    return table


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw added memory and time of a matching step over the number of inner steps."""
    # No windows, and no style of the user's: the object-oriented interface needs neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    styles = {
        "ours": ("adjoint", "-", "o"),
        "compiled": ("adjoint, compiled", "-.", "s"),
        "reference": ("graph", "--", "x"),
    }
    sizes = sorted({(case["ipc"], case["width"]) for case in cases})
    for panel, what in zip(panels, ("memory", "seconds"), strict=True):
        for color, (ipc, width) in enumerate(sizes):
            for method, (name, line, marker) in styles.items():
                points = [
                    (case["steps"], median(_values(case[what][method])))
                    for case in cases
                    if (case["ipc"], case["width"]) == (ipc, width) and case[what].get(method)
                ]
                if points:
                    label = f"ipc {ipc}, width {width}: {name}"
                    panel.plot(*zip(*points, strict=True), line, marker=marker, color=f"C{color}", label=label)
        # A small step may find all the memory it takes among what the process held already.
        positive = all(min(curve.get_ydata()) > 0 for curve in panel.lines)
        panel.set(xlabel="inner steps", yscale="log" if positive else "linear")
        panel.grid(visible=True, alpha=0.3)
    panels[0].set(ylabel="memory added by a matching step, MiB")
    panels[1].set(ylabel="time of a matching step, s")
    panels[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def _values(runs: list[Any]) -> list[float]:
    return [run["added"] if isinstance(run, dict) else run for run in runs]
