"""Pictures of sets, and plots of studies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image, ImageDraw

from ftd_lightning.callbacks.tensorboard import picture_grid
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.files.safetensors_io import read_json, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ftd_lightning.files import SyntheticSet
    from ftd_lightning.studies.comparison import Comparison

COUNTS, PICTURE = "images.json", "images.png"


def set_picture(synthetic: SyntheticSet, *, ema: bool = False) -> Image.Image:
    """Lay a set's images out as a grid, one column per class, at most ten images of each; see ``picture_grid``."""
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


def count_images(folder: Path) -> dict[str, Any]:
    """Count the images of a done evaluation, and draw those that it trained on as ``images.png`` in its folder; once.

    "training_images" include held-out ones; "chance" is the share of the largest class of the test images.
    """
    found = read_json(folder / COUNTS)
    if "chance" in found:
        return found
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    data = DistillationDataModule(**settings)
    synthetic = data.training_set()
    assert synthetic is not None, "an evaluation has a set"
    with replacing(folder / PICTURE) as part:
        set_picture(synthetic, ema=settings["ema"]).save(part, format="PNG")
    test, (stored, trained_on) = data.count("test"), synthetic.image_counts
    counts = {
        "images": trained_on,
        "images_stored": stored,
        "labels": synthetic.label_description,
        "steps_per_epoch": -(-trained_on // settings["batch_size"]),
        "training_images": sum(data.count("train")) + sum(data.count("val")),
        "test_images": sum(test),
        "chance": max(test) / sum(test),
    }
    write_json(folder / COUNTS, counts, indent=None)
    return counts


def write_pictures(job: Comparison, names: Sequence[str]) -> None:
    """Write ``ROW.png`` of rows that are done and, at 1 image per class, ``images.png``: all of them."""
    sheet = {}
    for name in names:
        drawn = next(iter(job.fits_of(name).evaluations.values())).folder / PICTURE
        with replacing(job.folder / f"{name}.png") as part:
            part.write_bytes(drawn.read_bytes())
        # The whole training set does not fit on a sheet of one image per class.
        if job.ipc == 1 and job.rows[name].synthetic != "real":
            with Image.open(drawn) as picture:
                sheet[job.rows[name].label or name] = picture.convert("RGB")
    if sheet:
        write_sheet(sheet, job.folder / PICTURE)


def write_plot(path: Path, draw: Callable[[Any], None], *, size: tuple[float, float] = (5.5, 4.0)) -> None:
    """Write what ``draw`` draws on matplotlib's ``Axes`` as a PNG, in inches; without matplotlib, say how to get it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn without matplotlib: pip install ftd_lightning[plots]")
        return
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def draw_study(results: Mapping[str, Any], x: str, path: Path) -> None:
    """Draw accuracy ± std over x, the axis of that label, and references as lines; nothing where nothing is done."""
    done = [row for row in results["rows"] if row["state"] == "done"]
    points = sorted((row for row in done if "x" in row), key=lambda row: float(row["x"]))
    references = [row for row in done if row.get("reference")]

    def draw(axes: Any) -> None:
        mean, std = ([100 * row["accuracy"]["last"][key] for row in points] for key in ("mean", "std"))
        axes.errorbar([row["x"] for row in points], mean, yerr=std, marker="o", capsize=3, color="black")
        for index, row in enumerate(references):
            middle, spread = (100 * row["accuracy"]["last"][key] for key in ("mean", "std"))
            axes.axhline(middle, linestyle="--", color=f"C{index}", label=row["label"])
            axes.axhspan(middle - spread, middle + spread, color=f"C{index}", alpha=0.15)
        if references:
            axes.legend()
        axes.set(xlabel=x, ylabel="test accuracy, %")
        axes.set_title(results["title"], fontsize=10)

    if points or references:
        write_plot(path, draw)
