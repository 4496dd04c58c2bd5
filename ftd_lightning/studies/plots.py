"""Pictures of sets, and plots of studies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ftd_lightning.callbacks.tensorboard import COLUMNS, picture_grid, picture_sheet
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.files.safetensors_io import read_json, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ftd_lightning.studies.comparison import Comparison

COUNTS, PICTURE = "images.json", "images.png"


def count_images(folder: Path) -> dict[str, Any]:
    """Count the images of a done evaluation, and draw those that it trained on as ``images.png`` in its folder; once.

    "images" are those that networks are trained on, "steps_per_epoch" of SGD; see ``SyntheticSet.budget`` for what is
    stored. "training_images" include held-out ones; "chance" is the share of the largest class of the test images.
    """
    found = read_json(folder / COUNTS)
    if "numbers_stored" in found:
        return found
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationDataModule, "data")  # which may wrap a module that has a class path
    data = parser.instantiate_classes(parser.parse_object({"data": settings})).data
    synthetic = data.training_set()
    assert synthetic is not None, "an evaluation has a set"
    pictures, names = synthetic.pictures(ema=settings["ema"]), synthetic.class_names
    grid = picture_grid(pictures, synthetic.labels, class_names=names, columns=COLUMNS)
    with replacing(folder / PICTURE) as part:
        to_pil_image(grid).save(part, format="PNG")
    test, budget = data.count("test"), synthetic.budget()
    trained_on = budget.pop("images_trained_on")
    counts = {
        "images": trained_on,
        **budget,
        "labels": synthetic.label_description,
        "steps_per_epoch": -(-trained_on // settings["batch_size"]),
        "training_images": sum(data.count("train")) + sum(data.count("val")),
        "test_images": sum(test),
        "chance": max(test) / sum(test),
    }
    write_json(folder / COUNTS, counts, indent=None)
    return counts


def write_pictures(job: Comparison, names: Sequence[str]) -> None:
    """Write ``ROW.png`` of rows that are done, and ``images.png``: all but the whole training set."""
    grids = {}
    for name in names:
        drawn = next(iter(job.fits_of(name).evaluations.values())).folder / PICTURE
        with replacing(job.folder / f"{name}.png") as part:
            part.write_bytes(drawn.read_bytes())
        if job.rows[name].synthetic != "real":
            with Image.open(drawn) as picture:
                grids[job.rows[name].label or name] = pil_to_tensor(picture)
    if grids:  # strips below one another, others in two columns
        across = 1 if all(grid.shape[2] > 2 * grid.shape[1] for grid in grids.values()) else 2
        with replacing(job.folder / PICTURE) as part:
            to_pil_image(picture_sheet(grids, across)).save(part, format="PNG")


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
