"""What a ranking shows: a table of scores and one of accuracies, and a picture of accuracy over images kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftd_lightning.data.files import replacing
from ftd_lightning.studies.comparison_table import markdown_table
from ftd_lightning.studies.rank_plan import COLUMNS
from ftd_lightning.studies.rank_scores import SCORES
from ftd_lightning.training.evaluation_protocol import per_cent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NOTES = (
    "Scores are fractions, mean ± population standard deviation over networks; sets are in the order of their LRS.",
    "HLR: accuracy that the set with hard labels lacks of that of all real images; lower is better.",
    "IOR: accuracy gained over as many random real images of each class, with labels of the same kind.",
    "LRS of HLR and IOR, ARS of IOR with and without augmentation: in [0, 1]; 0.269 is neither gained nor lost.",
    "Accuracies are on the test images after the last epoch, in %: the set / random real images.",
    "Learning rates, in brackets, are chosen on held-out training images, for each by itself.",
    "Teacher: its labels of every augmented batch, for the set and for random images alike.",
)


def in_order(results: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return names and results of the sets, the highest label-robust score first.

    Example:
        >>> [name for name, _ in in_order({"sets": {n: {"lrs": {"mean": v}} for n, v in [("a", 0.2), ("b", 0.3)]}})]
        ['b', 'a']
    """
    return sorted(results["sets"].items(), key=lambda item: -float(item[1]["lrs"]["mean"]))


def _score(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f} ± {value['std']:.3f}"


def _column(column: Mapping[str, Any] | None) -> str:
    if column is None:
        return "-"
    return " / ".join(f"{per_cent(column[side]['accuracy'])} ({column[side]['lr']:.3g})" for side in ("set", "random"))


def short_names(names: list[str]) -> dict[str, str]:
    """Name sets by the ends of their paths, as short as they differ.

    Example:
        >>> short_names(["runs/a/set.safetensors", "runs/b/set.safetensors"])
        {'runs/a/set.safetensors': 'a/set.safetensors', 'runs/b/set.safetensors': 'b/set.safetensors'}
    """
    parts = {name: name.replace("\\", "/").split("/") for name in names}
    for length in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(own[-length:]) for name, own in parts.items()}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


def markdown(results: Mapping[str, Any]) -> str:
    """Write the content of ``rank.md``."""
    ranked = in_order(results)
    scores = [["set", "labels", "images", *(name.upper() for name in SCORES), "networks"]]
    measured = [["set", *COLUMNS, "all real images"]]
    for name, one in ranked:
        cells = [_score(one[score]) for score in SCORES]
        scores.append([name, one["labels"], str(one["images_trained_on"]), *cells, str(one["lrs"]["n"])])
        real = f"{per_cent(one['real']['accuracy'])} ({one['real']['lr']:.3g})"
        measured.append([name, *(_column(one["columns"][column]) for column in COLUMNS), real])
    seen = [name for name, one in ranked if one["held_out_seen"]]
    notes = [*NOTES, *([f"Distilled from images that are held out here too: {', '.join(seen)}."] if seen else [])]
    below = "".join(f"- {note}\n" for note in notes)
    return f"{markdown_table(scores)}\n\n{markdown_table(measured)}\n\n{below}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy over images kept per class: sets, random real images beside them, and all real images as lines.

    Args:
        results: the content of ``rank.json``.
        path: of the PNG.
    """
    # Not pyplot, which keeps figures in a global state; not at the top, because it is slow.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = short_names(list(results["sets"]))
    marks = {"hard": "o", "soft": "s", "teacher": "D"}
    lines: dict[str, dict[str, Any]] = {}
    points = in_order(results)
    for index, (name, one) in enumerate(points):
        kept = one["images_trained_on"] / len(one["images_per_class"])
        for offset, (kind, mark) in enumerate(marks.items()):
            if (column := one["columns"][kind]) is None:
                continue
            own = kind == one["compared_by"]
            # Beside each other where sets are of one size.
            x = kept * 1.02 ** (index - (len(points) - 1) / 2) * 1.05 ** (offset - 1)
            for side, colour in (("set", f"C{index % 10}"), ("random", "0.6")):
                found = column[side]["accuracy"]
                style: dict[str, Any] = {"color": colour, "marker": mark, "capsize": 2, "linestyle": "none"}
                style |= {"markersize": 5} if own else {"markersize": 5, "markerfacecolor": "none"}
                style |= {"label": f"{names[name]}, {one['labels']} labels"} if own and side == "set" else {}
                axes.errorbar(x, 100 * found["mean"], yerr=100 * found["std"], **style)
        lines[str(one["transform"])] = one["real"]
    for real in lines.values():
        axes.axhline(100 * real["accuracy"]["mean"], color="black", linestyle="--", linewidth=0.8)
    axes.errorbar([], [], color="0.6", marker="o", linestyle="none", label="random real images, each beside its set")
    axes.plot([], [], color="black", linestyle="--", linewidth=0.8, label="all real images")
    axes.set_xscale("log")
    axes.set(xlabel="images kept per class", ylabel="test accuracy, %")
    sizes = sorted({one["images_trained_on"] / len(one["images_per_class"]) for _, one in points})
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_title("circles: hard labels, squares: soft, diamonds: by a teacher; filled: the set's own", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center")  # a place among the points may not be free
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
