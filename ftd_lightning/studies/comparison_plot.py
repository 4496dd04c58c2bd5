"""What a comparison shows: the images of each row, all of them on one sheet, and accuracy over the value of a study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image

from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.files import replacing
from ftd_lightning.data.json_files import read_json, write_json
from ftd_lightning.studies.picture_sheet import set_picture, write_sheet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ftd_lightning.studies.comparison_plan import Comparison, Row

COUNTS = "images.json"
PICTURE = "images.png"


def look_at_set(folder: Path) -> None:
    """Draw the images that an evaluation trained on, and count them, beside its logs; once.

    Args:
        folder: of an evaluation that is done.
    """
    if {"images", "steps_per_epoch", "training_images", "test_images", "chance"} <= read_json(folder / COUNTS).keys():
        return
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    data = DistillationDataModule(**settings)
    data.prepare_data()
    data.setup()
    synthetic = data.synthetic_set
    assert synthetic is not None, "an evaluation has a set"
    with replacing(folder / PICTURE) as part:
        set_picture(synthetic, ema=settings["ema"]).save(part, format="PNG")
    images, test = len(synthetic.labels), data.count("test")
    counts = {
        "images": images,
        "steps_per_epoch": -(-images // settings["batch_size"]),
        "training_images": sum(data.count("train")) + sum(data.count("val")),
        "test_images": sum(test),
        "chance": max(test) / sum(test),
    }
    write_json(folder / COUNTS, counts, indent=None)


def write_pictures(job: Comparison, rows: Iterable[Row]) -> None:
    """Write ``ROW.png`` of rows that are done and, at 1 image per class, ``images.png``: all of them."""
    sheet = {}
    for row in rows:
        folder = job.evaluation_step(row, next(iter(job.networks))).folder
        look_at_set(folder)
        content = (folder / PICTURE).read_bytes()
        with replacing(job.folder / f"{row.name}.png") as part:
            part.write_bytes(content)
        # The whole training set has no place on a sheet of one image per class.
        if job.given.get("ipc", 1) == 1 and row.given.get("synthetic") != "real":
            with Image.open(folder / PICTURE) as picture:
                sheet[row.label] = picture.convert("RGB")
    if sheet:
        write_sheet(sheet, job.folder / PICTURE)


def plot_points(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Pick what a study draws from the rows that are done.

    Returns:
        "points": of rows with an x, by rising x; "references": of rows marked as such. Each has mean and std of the
        last iterates' test accuracy, fractions.

    Example:
        >>> last = {"accuracy": {"last": {"mean": 0.5, "std": 0.0}}, "state": "done"}
        >>> found = plot_points([{"x": 0.1, "label": "b", **last}, {"x": 0.01, "label": "a", **last}])
        >>> [point["x"] for point in found["points"]]
        [0.01, 0.1]
    """

    def value(row: Mapping[str, Any]) -> dict[str, Any]:
        last = row["accuracy"]["last"]
        return {"label": row["label"], "mean": last["mean"], "std": last["std"]}

    done = [row for row in rows if row["state"] == "done"]
    points = [{"x": row["x"], **value(row)} for row in done if "x" in row]
    return {
        "points": sorted(points, key=lambda point: float(point["x"])),
        "references": [value(row) for row in done if row.get("reference")],
    }


def draw_plot(plot: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw accuracy over x with bars of one standard deviation, references as lines; nothing where nothing is done.

    Args:
        plot: what :func:`plot_points` gave, and "x", the axis's name.
        title: of the picture.
        path: of the PNG.
    """
    if not plot["points"] and not plot["references"]:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    x, mean, std = ([point[key] for point in plot["points"]] for key in ("x", "mean", "std"))
    bars = [100 * value for value in std]
    axes.errorbar(x, [100 * value for value in mean], yerr=bars, marker="o", capsize=3, color="black")
    for index, line in enumerate(plot["references"]):
        middle, spread, colour = 100 * line["mean"], 100 * line["std"], f"C{index}"
        axes.axhline(middle, linestyle="--", color=colour, label=line["label"])
        axes.axhspan(middle - spread, middle + spread, color=colour, alpha=0.15)
    if plot["references"]:
        axes.legend()
    axes.set(xlabel=plot["x"], ylabel="test accuracy, %")
    axes.set_title(title, fontsize=10)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)
