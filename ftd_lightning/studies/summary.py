"""A comparison in short: test accuracy of each row, as ``results.json`` and as a table of two columns."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from ftd_lightning.data.files import replacing, versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.studies.comparison_table import test_part
from ftd_lightning.studies.paired_difference import is_better, points
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
        "accuracy": {row: {"mean", "std", "n"}}, fractions; "difference" by row, where it is compared with another;
        "seconds" of each phase by row; "dataset", "ipc", "device" and "versions".
    """
    rows = results["rows"]
    return {
        "accuracy": {row["name"]: row["accuracy"]["last"] for row in rows},
        "difference": {row["name"]: row["difference"] for row in rows if "difference" in row},
        "dataset": results["dataset"],
        "ipc": results["ipc"],
        "seconds": {row["name"]: row["seconds"] for row in rows},
        "device": results["device"],
        "versions": versions(),
    }


def short_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay a comparison out as lines of cells, the names of the columns first.

    Rows that are compared with another one have a third cell, the paired difference.
    """
    lines = [[row["label"], per_cent(row["accuracy"]["last"])] for row in results["rows"]]
    bases = {row["difference"]["to_label"] for row in results["rows"] if "difference" in row}
    if not bases:
        return [[*HEAD], *lines]
    found = [row.get("difference") for row in results["rows"]]
    cells = [points(one) + ("" if is_better(one) else ", not better") if one else "-" for one in found]
    head = [*HEAD, f"difference to {', '.join(sorted(bases))}"]
    return [head, *([*line, cell] for line, cell in zip(lines, cells, strict=True))]


def verdict(results: Mapping[str, Any]) -> str | None:
    """Say that a distilled set is not better than the row that it is compared with; None where it is.

    Example:
        >>> found = {"to_label": "random images", "mean": 0.01, "standard_error": 0.02, "n": 3}
        >>> print(verdict({"rows": [{"label": "FTD", "iterations": 100, "difference": found}]}))
        FTD is not better than random images: +1.0 ± 2.0 points over 3 networks. Give it more --minutes or images.
    """
    for row in results["rows"]:
        found = row.get("difference")
        if found and row.get("iterations") is not None and not is_better(found):
            return (
                f"{row['label']} is not better than {found['to_label']}: {points(found)} points over {found['n']} "
                "networks. Give it more --minutes or images."
            )
    return None


def short_table(results: Mapping[str, Any]) -> str:
    """Lay the same out for a terminal.

    Example:
        >>> row = {"label": "10 images, FTD", "accuracy": {"last": {"mean": 0.9, "std": 0.01, "n": 5}}}
        >>> print(short_table({"rows": [row]}))
        trained on      test accuracy, %
        --------------------------------
        10 images, FTD  90.0 ± 1.0
        5 fresh networks each, after their last epoch.
    """
    lines = short_rows(results)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    head, *rest = map(str.rstrip, padded)
    counts = sorted({row["accuracy"]["last"]["n"] for row in results["rows"]})
    below = [f"{' or '.join(map(str, counts))} fresh networks each, after their last epoch.", *test_part(results)]
    return "\n".join([head, "-" * len(head), *rest, *below])


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
