"""Pictures of sets: each one's own, and all of them one below the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image, ImageDraw

from ftd_lightning.callbacks.tensorboard import picture_grid
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.files.safetensors_io import read_json, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ftd_lightning.files import SyntheticSet
    from ftd_lightning.studies.comparison import Comparison, Row


def set_picture(synthetic: SyntheticSet, *, ema: bool = False) -> Image.Image:
    """Lay a set's images out as a grid, one column per class, at most ten images of each; see ``picture_grid``.

    Raises:
        InputError: if averaged images are asked for and there are none.
    """
    grid = picture_grid(synthetic.pictures(ema=ema), synthetic.labels, class_names=synthetic.class_names)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def write_sheet(rows: Mapping[str, Image.Image], path: Path) -> None:
    """Write pictures as one PNG, one below the other, each with its name on its left."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(96, *(round(pen.textlength(name)) + 16 for name in rows))
    size = (margin + max(picture.width for picture in rows.values()), sum(p.height for p in rows.values()))
    sheet, top = Image.new("RGB", size, "white"), 0
    for name, picture in rows.items():
        sheet.paste(picture, (margin, top))
        ImageDraw.Draw(sheet).text((8, top + picture.height // 2 - 6), name, fill="black")
        top += picture.height
    with replacing(path) as part:
        sheet.save(part, format="PNG")


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
