"""Write the tables of README.md and docs from the records in notebooks/results: ``make results``.

Each record is the ``compare.json`` of a comparison, or of ``ftd reproduce``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd_lightning.files.schema import per_cent
from ftd_lightning.studies.tables import full_lines, markdown_table, points, short_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RECORDS = Path("notebooks/results")

# Test accuracy in per cent by data set, method and ipc, at full size: Tables 1 and 2 of FTD, which repeats MTT's.
PAPER: dict[str, dict[str, dict[int, float]]] = {
    "cifar10": {"mtt": {1: 46.2, 10: 65.4, 50: 71.6}, "ftd": {1: 46.8, 10: 66.6, 50: 73.8}},
    "cifar100": {"mtt": {1: 24.3, 10: 39.7, 50: 47.7}, "ftd": {1: 25.2, 10: 43.4, 50: 50.7}},
    "tiny-imagenet": {"mtt": {1: 8.8, 10: 23.2}, "ftd": {1: 10.4, 10: 24.5}},
    "imagenette": {"mtt": {1: 47.7, 10: 63.0}, "ftd": {1: 52.2, 10: 67.7}},
    "imagewoof": {"mtt": {1: 28.6, 10: 35.8}, "ftd": {1: 30.1, 10: 38.8}},
    "imagefruit": {"mtt": {1: 26.6, 10: 40.3}, "ftd": {1: 29.1, 10: 44.9}},
    "imagemeow": {"mtt": {1: 30.7, 10: 40.4}, "ftd": {1: 33.8, 10: 43.3}},
}
# Accuracies with one image per class of CIFAR-10, in per cent, from FTD's Table 1 and, where it lists none, from the
# sources in docs/methods.md; and what differs in our rows, besides width, teachers and time.
METHODS: dict[str, tuple[str, float | None, str]] = {
    "random": ("random", 14.4, "as listed by AutoPalette; whitened images here"),
    "herding": ("herding", 21.5, "as listed by AutoPalette; whitened images and a teacher of four epochs here"),
    "dd": ("DD", None, "published for ipc 10, 36.8, on AlexCifarNet; a constant learning rate here"),
    "kip": (
        "KIP",
        49.9,
        (
            "there a convolutional network's kernel, learned labels, and networks of width 1024 trained by squared "
            "error; here a fully connected one's, classes, and cross entropy"
        ),
    ),
    "frepo": (
        "FRePo",
        46.8,
        (
            "there LAMB, flipped copies, and evaluation by Adam, squared error and averaged weights; here Adam, and "
            "evaluation by SGD and cross entropy"
        ),
    ),
    "rat-bptt": (
        "RaT-BPTT",
        53.2,
        "there evaluation by Adam, the best of several lengths on test images; here by SGD, the last epoch",
    ),
    "dc": ("DC", 28.3, "nothing else"),
    "dsa": ("DSA", 28.8, "nothing else"),
    "dm": ("DM", 26.0, "nothing else"),
    "cafe": ("CAFE", 30.3, "loops are bounded here"),
    "cafe+dsa": ("CAFE+DSA", 31.6, "loops are bounded here"),
    "pp": ("PP", 46.4, "DPD's rule: PP states neither its measure nor its threshold, and its code is not published"),
    "mtt": ("MTT", 46.2, "nothing else"),
    "mtt+robust": ("MTT + robust learning", 45.8, "sigma, which is not published, is relative here"),
    "ftd": ("FTD", 46.8, "nothing else"),
}
ONE, TEN = "CIFAR-10, 1 image per class", "CIFAR-10, 10 images per class"
DECODED, IPC10, WIDE = (f"cifar10/study_{name}" for name in ("decoders_w32", "ipc10_w32", "ipc1_w128"))
SMALL, STORAGE = "width 32", "CIFAR-10, storage of 1 image per class, FTD +"
# Cell; published accuracy in per cent (PAPER, METHODS; FreD's and GSDD's by GSDD's Table 15); size; config of the
# record; a row for each seed. The first ones are README's.
IN_README = 9
OVERVIEW: list[tuple[str, float | None, str, str, list[str]]] = [
    (f"{ONE}, MTT", 46.2, "width 128, teachers 4 x 3", WIDE, ["mtt"]),
    (f"{ONE}, FTD", 46.8, "width 128, teachers 4 x 3", WIDE, ["ftd"]),
    (f"{ONE}, MTT", 46.2, f"{SMALL}, teachers 10 x 4", "cifar10/compare_w32_ipc1", ["mtt"]),
    (f"{ONE}, FTD", 46.8, f"{SMALL}, teachers 10 x 4", "cifar10/compare_w32_ipc1", ["ftd-raw"]),
    *(
        (f"{TEN}, {label}", value, f"{SMALL}, teachers 5 x 21", IPC10, [row, f"{row}-1"])
        for label, value, row in [
            ("MTT", 65.4, "mtt"),
            ("FTD", 66.6, "ftd"),
            ("FTD, adaptive ball", None, "ftd-adaptive"),
        ]
    ),
    *(
        (f"{STORAGE} {label}", value, f"{SMALL}, teachers 10 x 3", DECODED, [row, f"{row}-1"])
        for label, value, row in [
            ("Gaussians(22)", 67.6, "gaussians"),
            ("Frequencies(64)", 60.6, "frequencies"),
            ("MultiFormation(2)", None, "multi-formation"),
        ]
    ),
    (f"{ONE}, RaT-BPTT", 53.2, SMALL, "cifar10/compare_hour_w32", ["rat-bptt", "rat-bptt-1"]),
    (f"{ONE}, DM", 26.0, SMALL, "cifar10/compare_w32_ipc1", ["dm"]),
    ("digits, 1 image per class, FTD", None, f"{SMALL}, teachers 8 x 30", "digits/compare", ["ftd-raw"]),
]
NONE = "No run is on record yet."


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all records of a folder, in the order of their names."""
    paths = sorted(folder.glob("*.json"))
    return [{"file": path.name, **json.loads(path.read_text(encoding="utf-8"))} for path in paths]


def named(*names: str) -> list[dict[str, Any]]:
    """Return the records of configs, in the order of their names."""
    records = read_records(RECORDS)
    return [record for name in names for record in records if record["config"].removesuffix(".yaml").endswith(name)]


def of_config(name: str, lines: Callable[[dict[str, Any]], Sequence[Sequence[str]]]) -> str:
    """Lay out the comparison of a shipped config."""
    found = named(name)
    return markdown_table(lines(found[0])) if found else NONE


def columns(*names: str) -> Callable[[dict[str, Any]], list[list[str]]]:
    """Lay a comparison out in some columns: method, accuracy after the last epoch, and those of these names."""

    def lines(record: dict[str, Any]) -> list[list[str]]:
        head, *rows = full_lines(record)
        chosen = [head.index(name) for name in ("method", "last", *names)]
        return [[row[column] for column in chosen if column < len(row)] for row in (head, *rows)]

    return lines


def without_memory(record: dict[str, Any]) -> list[list[str]]:
    """Lay a comparison out in full, but for the memory."""
    head, *lines = full_lines(record)
    left_out = head.index("peak, MiB")
    return [[cell for column, cell in enumerate(line) if column != left_out] for line in (head, *lines)]


def seed_lines(record: dict[str, Any]) -> list[list[str]]:
    """Lay a comparison out with the rows of several seeds, "METHOD, seed 0", in one line."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["state"] == "done":
            lines.setdefault(row["label"].partition(", seed")[0], []).append(row)
    bases = {row["difference"]["to_label"] for rows in lines.values() for row in rows if "difference" in row}
    head = ["method", "last, each seed", f"paired difference to {' or '.join(sorted(bases))}"]
    return [head] + [
        [
            label,
            ", ".join(per_cent(row["accuracy"]["last"], count=True) for row in rows),
            ", ".join(points(row["difference"]) for row in rows if "difference" in row) or "-",
        ]
        for label, rows in lines.items()
    ]


def cell_lines(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lay records of ``ftd reproduce`` out, beside the paper's numbers where the size is the published one."""
    lines = [["run", "teachers x epochs", "iterations", "last, raw / EMA", "chosen on held-out, raw / EMA", "paper"]]
    for record in records:
        rows = {row["name"]: row for row in record["rows"] if row["state"] == "done"}
        ((method, teachers),) = record["teachers"].items()
        options = teachers["network"]["options"]
        found = [
            " / ".join(
                per_cent(rows[name]["accuracy"]["last"], count=True) if name in rows else "-"
                for name in (f"{method}{suffix}", f"{method}-ema{suffix}")
            )
            for suffix in ("", "-chosen")
        ]
        full = options.get("width") == 128 and teachers["count"] == 100 and rows[method]["iterations"] == 5000
        number = PAPER.get(record["dataset"], {}).get(method, {}).get(record["ipc"]) if full else None
        size = f"{record['title']}, width {options.get('width')}"
        sizes = [f"{teachers['count']} x {teachers['epochs']}", str(rows[method]["iterations"])]
        lines.append([size, *sizes, *found, "-" if number is None else str(number)])
    return lines


def overview_lines() -> list[list[str]]:
    """Lay the cells of ``OVERVIEW`` out: published, measured, at what size, on what, by which command."""
    lines = [["cell", "published", "here", "size, teachers x epochs", "iterations", "device", "command", "record"]]
    for cell, value, size, config, names in OVERVIEW:
        for record in named(config):
            rows = [row for row in record["rows"] if row["name"] in names and row["state"] == "done"]
            if not rows:
                continue
            lines.append(
                [
                    cell,
                    "-" if value is None else f"{value:.1f}",
                    ", ".join(per_cent(row["accuracy"]["last"], count=True) for row in rows),
                    size,
                    ", ".join(dict.fromkeys(str(row.get("iterations") or "-") for row in rows)),
                    record["device"],
                    f"`ftd compare --config {config}`",
                    f"`{record['file']}`",
                ]
            )
    return lines


def published_lines(cifar10: Sequence[dict[str, Any]], digits: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lay published and measured accuracies out, a line for each method.

    Args:
        cifar10: records of comparisons on CIFAR-10; of several that have a method, the first counts.
        digits: records of comparisons on the digits.
    """

    def measured(name: str, records: Sequence[dict[str, Any]]) -> str:
        rows = [row for record in records for row in record["rows"] if row["name"] == name and row["state"] == "done"]
        return per_cent(rows[0]["accuracy"]["last"], count=True) if rows else "-"

    head = ["method", "published, CIFAR-10", "here, CIFAR-10, width 32", "here, digits", "what differs, besides size"]
    return [head] + [
        [label, "-" if value is None else f"{value:.1f}", measured(name, cifar10), measured(name, digits), differs]
        for name, (label, value, differs) in METHODS.items()
    ]


REPRODUCTION, DECODERS, ENCODERS = (Path(f"docs/{name}.md") for name in ("reproduction", "decoders", "encoders"))
STORED = columns("images", "numbers", "bytes", "steps", "paired difference")
# Name of the markers -> file, and the table between them.
TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "demo": (Path("README.md"), lambda: of_config("demo", short_lines)),
    "start": (Path("docs/index.md"), lambda: of_config("demo", short_lines)),
    "compare": (REPRODUCTION, lambda: of_config("digits/compare", columns("labels"))),
    "compare_all": (REPRODUCTION, lambda: of_config("compare_all", columns("labels"))),
    "hour": (REPRODUCTION, lambda: of_config("compare_hour_w32", without_memory)),
    "compare_w32": (REPRODUCTION, lambda: of_config("compare_w32_ipc1", full_lines)),
    "study_ideas": (REPRODUCTION, lambda: of_config("study_ideas", without_memory)),
    "bf16_digits": (REPRODUCTION, lambda: of_config("digits/study_bf16", without_memory)),
    "bf16": (REPRODUCTION, lambda: of_config("study_bf16_w32", without_memory)),
    "labels_window": (REPRODUCTION, lambda: of_config("study_labels_window_w32", without_memory)),
    "decoders": (DECODERS, lambda: of_config("study_decoders_w32", STORED)),
    "decoders_digits": (DECODERS, lambda: of_config("digits/study_decoders", STORED)),
    "backbone_digits": (ENCODERS, lambda: of_config("digits/study_backbone", seed_lines)),
    "backbone": (ENCODERS, lambda: of_config("study_backbone_w32", seed_lines)),
    "ipc1": (REPRODUCTION, lambda: of_config("study_ipc1_w128", seed_lines)),
    "ipc10": (REPRODUCTION, lambda: of_config("study_ipc10_w32", seed_lines)),
    "status": (Path("README.md"), lambda: markdown_table([line[:5] for line in overview_lines()[: 1 + IN_README]])),
    "overview": (REPRODUCTION, lambda: markdown_table(overview_lines())),
    "results": (REPRODUCTION, lambda: markdown_table(cell_lines(named("reproduce")))),
    "published": (
        Path("docs/methods.md"),
        lambda: markdown_table(
            published_lines(named("compare_w32_ipc1", "compare_hour_w32"), named("digits/compare_all"))
        ),
    ),
}


def with_table(text: str, name: str, content: str) -> str:
    """Put a table between the markers of its name."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (found and end):
        sys.exit(f"there is no {opening} ... {closing} to put the table between")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def main() -> None:
    """Write all tables into the documents of the current folder, the project's."""
    for name, (path, content) in TABLES.items():
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, content()), encoding="utf-8")


if __name__ == "__main__":
    main()
