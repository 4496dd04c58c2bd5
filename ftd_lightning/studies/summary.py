"""A comparison in short: test accuracy of each row, as ``results.json`` and as a table of two columns."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from ftd_lightning.data.files import replacing, versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.training.evaluation_protocol import per_cent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ftd_lightning.studies.comparison_plan import Comparison, Row

HEAD = ("trained on", "test accuracy, %")


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce ``compare.json`` to the accuracy of each row after the last epoch, and what it took.

    Args:
        results: the content of ``compare.json``, all rows done.

    Returns:
        "accuracy": {row: {"mean", "std", "n"}}, fractions; "seconds" of each phase by row; "dataset", "ipc", "device"
        and "versions".
    """
    rows = results["rows"]
    return {
        "accuracy": {row["name"]: row["accuracy"]["last"] for row in rows},
        "dataset": results["dataset"],
        "ipc": results["ipc"],
        "seconds": {row["name"]: row["seconds"] for row in rows},
        "device": results["device"],
        "versions": versions(),
    }


def short_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay a comparison out as lines of two cells, the names of the columns first."""
    lines = [[row["label"], per_cent(row["accuracy"]["last"])] for row in results["rows"]]
    return [[*HEAD], *lines]


def short_table(results: Mapping[str, Any]) -> str:
    """Lay the same out for a terminal.

    Example:
        >>> row = {"label": "10 images, FTD", "accuracy": {"last": {"mean": 0.9, "std": 0.01, "n": 5}}}
        >>> print(short_table({"rows": [row]}))
        trained on      test accuracy, %
        --------------------------------
        10 images, FTD  90.0 ± 1.0
        5 fresh networks each, after their last epoch
    """
    lines = short_rows(results)
    width = max(len(line[0]) for line in lines)
    head, *rest = [f"{name:<{width}}  {value}" for name, value in lines]
    counts = sorted({row["accuracy"]["last"]["n"] for row in results["rows"]})
    below = f"{' or '.join(map(str, counts))} fresh networks each, after their last epoch"
    return "\n".join([head, "-" * len(head), *rest, below])


def write_summary(results: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write :func:`summarize` as JSON, and return it."""
    content = summarize(results)
    write_json(path, content)
    return content


def keep_set(job: Comparison, row: Row, path: Path) -> Path | None:
    """Copy the set of a row to a place where people find it; None for a row of real images."""
    if row.given.get("distill") is None or (file := job.set_file(row)) is None:
        return None
    with replacing(path) as part:
        shutil.copyfile(file, part)
    return path
