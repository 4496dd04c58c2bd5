"""What is shown of the figures: Markdown tables, JSON, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import pictures
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


def _rule(head: str) -> str:
    return "|" + "---|" * (head.count("|") - 1)


def markdown(rows: list[Row], remarks: list[str], machine: dict[str, Any]) -> str:
    """The table, with what they were measured on above them and remarks below."""
    device = (
        machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [_line(row.summary()) for row in rows]
    notes = [f"- {remark}" for remark in remarks]
    about_table = (
        f"On {device}; {versions}. Medians; the ratio is the median of ratios of neighbouring pairs, with their range."
        + (" Seconds are what the process computed." if machine.get("clock") == "cpu" else "")
    )
    first = [about_table, "", HEAD, _rule(HEAD), *lines]
    return "\n".join(["# Benchmark", "", *first, "", *notes]).rstrip() + "\n"


def write(folder: Path, results: dict[str, Result], settings: dict[str, Any]) -> str:
    """Write ``benchmark.md``, ``benchmark.json`` and the pictures of the parts that have one; gives the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {**about(), "clock": settings["clock"]}
    rows = [row for result in results.values() for row in result.rows]
    remarks = [remark for result in results.values() for remark in result.remarks]
    table = markdown(rows, remarks, machine)
    (folder / "benchmark.md").write_text(table)
    content = {
        **machine,
        "settings": settings,
        "rows": [row.summary() for row in rows],
        "details": {part: result.details for part, result in results.items() if result.details},
    }
    (folder / "benchmark.json").write_text(json.dumps(content, indent=2) + "\n")
    if "matching" in results:
        cases = results["matching"].details["cases"]
        if len({(case["ipc"], case["width"]) for case in cases}) < len(cases):  # some case has several counts of steps
            pictures.unroll(cases, folder / "unroll.png")
    if "scaling" in results:
        pictures.scaling(results["scaling"].details["panels"], folder / "scaling.png")
    return table
