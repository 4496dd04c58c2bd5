"""The tables of measured results in the documents: ``python -m ftd_lightning.studies.results_table``.

Records are the files of ``notebooks/results``: those of ``ftd reproduce``, and ``compare.json`` of comparisons.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import replacing
from ftd_lightning.files.schema import per_cent
from ftd_lightning.studies.published_table import published_rows
from ftd_lightning.studies.tables import markdown_table, short_rows
from ftd_lightning.studies.tables import table as comparison_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RECORDS = Path("notebooks/results")
SHORT = (0, 1, 9, 4, 5, 6)  # columns of a comparison that a page has room for: method, last iterate, labels, seconds

# Test accuracy in per cent by data set, method and ipc: Tables 1 and 2 of FTD, which repeats MTT's.
PAPER: dict[str, dict[str, dict[int, float]]] = {
    "cifar10": {"mtt": {1: 46.2, 10: 65.4, 50: 71.6}, "ftd": {1: 46.8, 10: 66.6, 50: 73.8}},
    "cifar100": {"mtt": {1: 24.3, 10: 39.7, 50: 47.7}, "ftd": {1: 25.2, 10: 43.4, 50: 50.7}},
    "tiny-imagenet": {"mtt": {1: 8.8, 10: 23.2}, "ftd": {1: 10.4, 10: 24.5}},
    "imagenette": {"mtt": {1: 47.7, 10: 63.0}, "ftd": {1: 52.2, 10: 67.7}},
    "imagewoof": {"mtt": {1: 28.6, 10: 35.8}, "ftd": {1: 30.1, 10: 38.8}},
    "imagefruit": {"mtt": {1: 26.6, 10: 40.3}, "ftd": {1: 29.1, 10: 44.9}},
    "imagemeow": {"mtt": {1: 30.7, 10: 40.4}, "ftd": {1: 33.8, 10: 43.3}},
}
PAPER_DEPTH = {"tiny-imagenet": 4, "imagenette": 5, "imagewoof": 5, "imagefruit": 5, "imagemeow": 5}  # else 3
PAPER_SIZES = {"teachers": 100, "epochs": 50, "iterations": 5000, "width": 128}
COLUMNS = (
    "data",
    "ipc",
    "method",
    "teachers x epochs",
    "iterations",
    "device",
    "last, raw / EMA",
    "chosen on held-out, raw / EMA",
    "best on test (upper bound), raw / EMA",
    "paper",
)


def _of(value: int, size: str, published: bool) -> str:
    """A size, and beside it the published one where it differs."""
    return f"{value} of {PAPER_SIZES[size]}" if published and value != PAPER_SIZES[size] else str(value)


def row(record: dict[str, Any]) -> list[str]:
    """Lay one record out. The paper's number stands beside the whole data set and the published network only."""
    data = record["settings"]["distill"]["data"]["init_args"]
    options = record["teachers"]["network"].get("options", {})
    name, part = data["dataset"], data.get("max_per_class")
    published = name in PAPER
    parts = [name, *([f"{part} per class"] if part else [])]
    network, width = record["teachers"]["network"].get("name", "?"), options.get("width", PAPER_SIZES["width"])
    depth = PAPER_DEPTH.get(name, 3)
    usual = (network, width, options.get("depth", 3)) == ("convnet", PAPER_SIZES["width"], depth)
    parts += (
        [] if usual else [f"{network} {' '.join(f'{key} {value}' for key, value in sorted(options.items()))}".strip()]
    )
    number = None if part or not usual else PAPER.get(name, {}).get(record["method"], {}).get(record["ipc"])
    teachers = _of(record["teachers"]["count"], "teachers", published)
    accuracy = record["accuracy"]
    cells = [
        f"{per_cent(accuracy['raw'][key], count=True)} / {per_cent(accuracy['ema'][key], count=True)}"
        for key in ("last", "chosen_on_held_out", "best_on_test")
    ]
    return [
        ", ".join(parts),
        str(record["ipc"]),
        record["method"].upper(),
        f"{teachers} x {_of(record['teachers']['epochs'], 'epochs', published)}",
        _of(record["iterations"], "iterations", published),
        record["device"],
        *cells,
        "-" if number is None else str(number),
    ]


def read_records(folder: Path, kind: str = "reproduction") -> list[dict[str, Any]]:
    """Read all records of a kind, reproductions by data set, ipc and method.

    Raises:
        InputError: for a JSON file that is no record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["kind"] not in ("reproduction", "comparison"):
                raise KeyError(record["kind"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: a record of ftd reproduce or ftd compare is needed here") from error
        records += [record] if record["kind"] == kind else []
    if kind == "comparison":
        return records
    sizes = ("dataset", "ipc", "method")
    return sorted(records, key=lambda record: [*(record[key] for key in sizes), -record["teachers"]["count"]])


def table(records: list[dict[str, Any]]) -> str:
    """Lay reproductions out as a Markdown table; accuracies in per cent, with the number of networks behind each.

    Example:
        >>> print(table([]))
        No run is on record yet.
    """
    return markdown_table([COLUMNS, *map(row, records)]) if records else "No run is on record yet."


def _comparison(name: str, lines: Callable[[dict[str, Any]], Sequence[Sequence[str]]]) -> str:
    """Lay the comparison of a shipped config out, of the record that names it."""
    for record in read_records(RECORDS, "comparison"):
        if record["config"].removesuffix(".yaml").endswith(name):
            return markdown_table(lines(record))
    return "No run is on record yet."


def _shortened(record: dict[str, Any]) -> list[list[str]]:
    return [[line[column] for column in SHORT if column < len(line)] for line in comparison_rows(record)]


def _published() -> str:
    records = read_records(RECORDS, "comparison")

    def of(*names: str) -> list[dict[str, Any]]:
        return [record for name in names for record in records if record["config"].removesuffix(".yaml").endswith(name)]

    return markdown_table(published_rows(of("compare_w32_ipc1", "compare_hour_w32"), of("digits/compare_all")))


# Name of the markers -> file, and the table between them.
TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "demo": (Path("README.md"), lambda: _comparison("demo", short_rows)),
    "compare": (Path("docs/reproduction.md"), lambda: _comparison("compare", _shortened)),
    "compare_all": (Path("docs/reproduction.md"), lambda: _comparison("compare_all", _shortened)),
    "hour": (Path("docs/reproduction.md"), lambda: _comparison("compare_hour_w32", comparison_rows)),
    "published": (Path("docs/methods.md"), _published),
    "compare_w32": (Path("docs/reproduction.md"), lambda: _comparison("compare_w32_ipc1", comparison_rows)),
    "study_ideas": (Path("docs/reproduction.md"), lambda: _comparison("study_ideas", comparison_rows)),
    "labels_window": (
        Path("docs/reproduction.md"),
        lambda: _comparison("study_labels_window_w32", comparison_rows),
    ),
    "results": (Path("docs/reproduction.md"), lambda: table(read_records(RECORDS))),
}


def with_table(text: str, name: str, content: str) -> str:
    """Put a table between the markers of its name.

    Raises:
        InputError: for a text without them.

    Example:
        >>> with_table("<!-- demo -->old<!-- /demo -->", "demo", "new").splitlines()
        ['<!-- demo -->', 'new', '<!-- /demo -->']
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (found and end):
        raise InputError(f"there is no {opening} ... {closing} to put the table between")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def main() -> None:
    """Write all tables into the documents of this folder."""
    for name, (path, content) in TABLES.items():
        if not path.is_file():
            raise InputError(f"{path} is not here: run this in the project's folder")
        text = with_table(path.read_text(encoding="utf-8"), name, content())
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"ftd: error: {error}")
