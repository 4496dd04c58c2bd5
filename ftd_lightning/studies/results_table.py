"""The README's table of reproduced results, made of all records: ``python -m ftd_lightning.studies.results_table``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ftd_lightning.data.files import replacing
from ftd_lightning.errors import InputError

README = Path("README.md")
RECORDS = Path("notebooks/results")
OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"

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


def _accuracy(value: dict[str, Any] | None) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f} ({value['n']})" if value else "-"


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
        f"{_accuracy(accuracy['raw'][key])} / {_accuracy(accuracy['ema'][key])}"
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


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all records of a folder, by data set, ipc and method.

    Raises:
        InputError: for a JSON file that is none.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["kind"] != "reproduction":
                raise KeyError(record["kind"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: a record of ftd reproduce is needed here") from error
        records.append(record)
    sizes = ("dataset", "ipc", "method")
    return sorted(records, key=lambda record: [*(record[key] for key in sizes), -record["teachers"]["count"]])


def table(records: list[dict[str, Any]]) -> str:
    """Lay records out as a Markdown table; accuracies in per cent, with the number of networks behind each.

    Example:
        >>> print(table([]))
        No run is on record yet.
    """
    if not records:
        return "No run is on record yet."
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row(record) for record in records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(readme: str, records: list[dict[str, Any]]) -> str:
    """Put the table between the README's markers.

    Raises:
        InputError: for a text without them.

    Example:
        >>> with_table("<!-- results -->old<!-- /results -->", []).splitlines()
        ['<!-- results -->', 'No run is on record yet.', '<!-- /results -->']
    """
    before, opening, rest = readme.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not (opening and closing):
        raise InputError(f"the README has no {OPENING} ... {CLOSING} to put the table between")
    return f"{before}{OPENING}\n{table(records)}\n{CLOSING}{after}"


def main() -> None:
    """Write the table of all records into the README of this folder."""
    if not README.is_file():
        raise InputError(f"{README} is not here: run this in the project's folder")
    text = with_table(README.read_text(encoding="utf-8"), read_records(RECORDS))
    with replacing(README) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"ftd: error: {error}")
