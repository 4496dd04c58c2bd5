"""What fits gave, as ``compare.json`` and as tables."""

from __future__ import annotations

import math
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ftd_lightning.callbacks.progress import FILE as PEAKS
from ftd_lightning.core.evaluation import REAL_STEPS
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore
from ftd_lightning.files.safetensors_io import read_json, replacing, versions
from ftd_lightning.files.schema import markdown_table, per_cent
from ftd_lightning.studies.comparison import EVALUATION, made_set
from ftd_lightning.studies.plots import count_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ftd_lightning.studies.comparison import Comparison
    from ftd_lightning.studies.fits import Fit


def paired_difference(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compare two evaluations, contents of ``evaluation.json``, network by network; None where no network is in both.

    Accuracies of networks of the same seed are correlated over sets: the mean of their differences has a smaller
    standard error, of n - 1 degrees of freedom, than either mean.
    """
    known = dict(zip(base["seeds"], base["each"], strict=True))
    differences = [each - known[seed] for seed, each in zip(own["seeds"], own["each"], strict=True) if seed in known]
    if not differences:
        return None
    count, mean = len(differences), math.fsum(differences) / len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1) if count > 1 else None
    error = None if variance is None else math.sqrt(variance / count)
    return {"mean": mean, "standard_error": error, "n": count}


def is_better(found: Mapping[str, Any]) -> bool:
    """Tell whether a difference is above 0 by more than chance: by two standard errors."""
    return bool(found["mean"] > 2 * (found["standard_error"] or 0.0))


def add_differences(rows: Sequence[dict[str, Any]], bases: Mapping[str, str | None]) -> None:
    """Give rows that are done the "difference" to their base, by name; see :func:`paired_difference`."""
    done = {row["name"]: row for row in rows if row["state"] == "done"}
    for name, row in done.items():
        base = done.get(bases.get(name) or "")
        if base is not None and base is not row and (found := paired_difference(row, base)):
            row["difference"] = {"to": base["name"], "to_label": base["label"], **found}


def points(found: Mapping[str, Any]) -> str:
    """Format a difference in percentage points."""
    error = found["standard_error"]
    return f"{100 * found['mean']:+.1f}{'' if error is None else f' ± {100 * error:.1f}'}"


def _seconds(fits: Iterable[Fit | None]) -> float | None:
    """Sum the wall time of fits; None where there are none."""
    found = [fit.status()["seconds"] for fit in fits if fit is not None]
    return round(sum(found), 1) if found else None


def row_result(job: Comparison, name: str, failures: Mapping[str, str]) -> dict[str, Any]:
    """Describe a row and its results; ``failures`` are reasons by name of row.

    "state" is "done", "failed" (with a "reason") or "to do". "accuracy" is of the first network, fractions; "networks"
    holds each where several are named. ``plots.count_images`` explains "images" and what follows.
    """
    row = job.rows[name]
    facts: dict[str, Any] = {"name": name, "label": row.label or name, "state": "to do"}
    facts |= {"x": row.x} if row.x is not None else {}
    facts |= {"reference": True} if row.reference else {}
    try:
        fits = job.fits_of(name)
    except InputError as error:  # a row that was not asked for may lack a config
        failures = {name: str(error), **failures}
    if name in failures:
        return facts | {"state": "failed", "reason": failures[name]}
    if not all(fit.is_done() for fit in fits.each()):
        return facts
    measured = {network: read_json(fit.folder / EVALUATION) for network, fit in fits.evaluations.items()}
    accuracy = {
        network: {
            "last": next(iter(found["accuracy"].values())),
            **{key: found.get(key) for key in ("chosen_on_held_out", "best_on_test")},
        }
        for network, found in measured.items()
    }
    first, folder = next(iter(measured.values())), next(iter(fits.evaluations.values())).folder
    counts = count_images(folder)
    if row.synthetic == "real":
        ended = first.get("levelled_off", first["epochs"] * counts["steps_per_epoch"] >= REAL_STEPS)
        short = "" if ended else ", not trained to its end"
        facts["label"] += f" ({counts['images']:,}, {first['epochs']} epochs{short})"
        facts["trained_to_its_end"] = ended
    made = SyntheticSet.read_metadata(made_set(fits.distill, row.iterate)) if fits.distill else {}
    return {
        **facts,
        "state": "done",
        "accuracy": next(iter(accuracy.values())),
        **({"networks": accuracy} if "" not in accuracy else {}),
        **{key: first[key] for key in ("epochs", "seeds", "each", "balanced_accuracy") if key in first},
        **counts,
        "evaluation_steps": first["epochs"] * counts["steps_per_epoch"],
        "iterations": made.get("iterations"),
        "seconds": {
            "teachers": _seconds([fits.teachers]),
            "distillation": _seconds([fits.distill, fits.labels]),
            "evaluation": _seconds(fits.evaluations.values()),
        },
        "peak_memory_MiB": read_json(fits.distill.folder / PEAKS) if fits.distill else None,
        "teacher_at_evaluation": False,
        "folders": [str(fit.folder) for fit in fits.each()],
        "devices": sorted({fit.status()["device"] for fit in fits.each()}),
    }


def _teachers(job: Comparison) -> dict[str, dict[str, Any]]:
    """Describe the teachers of rows that are there: "count", "epochs" and "network"."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in job.rows.items():
        try:
            store = TrajectoryStore(job.fits_of(name).store or "")
            network = store.metadata["network"]
        except (InputError, KeyError):
            continue
        found[str(row.teachers)] = {"count": len(store), "epochs": store.epochs, "network": network}
    return found


def collect(job: Comparison, failures: Mapping[str, str]) -> dict[str, Any]:
    """Collect the content of ``compare.json``."""
    rows = [row_result(job, name, failures) for name in job.rows]
    # A row may be limited to a part of the training images; shares are of the most that any row has.
    whole = max((row["training_images"] for row in rows if "training_images" in row), default=None)
    rows = [row | {"share": row["images_stored"] / whole} if whole and "images_stored" in row else row for row in rows]
    add_differences(rows, {name: job.base(name) for name in job.rows})
    return {
        "kind": "comparison",
        "title": job.title or job.file.stem,
        "config": "/".join(job.file.parts[-2:]),
        "dataset": job.dataset,
        "ipc": job.ipc,
        "networks": [name for name in job.networks if name],
        "rows": rows,
        "teachers": _teachers(job),
        "device": "; ".join(sorted({name for row in rows for name in row.get("devices", [])})),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce ``compare.json``, all rows done, to ``results.json`` of the demo and of ``ftd distill``, by row."""
    rows = results["rows"]
    balanced = {row["name"]: row["balanced_accuracy"] for row in rows if "balanced_accuracy" in row}
    return {
        "accuracy": {row["name"]: row["accuracy"]["last"] for row in rows},
        "difference": {row["name"]: row["difference"] for row in rows if "difference" in row},
        **({"balanced_accuracy": balanced} if balanced else {}),
        "seconds": {row["name"]: row["seconds"] for row in rows},
        **{key: results[key] for key in ("dataset", "ipc", "device", "versions")},
    }


def copy_set(job: Comparison, name: str, path: Path) -> Path | None:
    """Copy the set of a row, and return the path; None for a row of real images."""
    if (file := job.set_file(name)) is None:
        return None
    with replacing(path) as part:
        shutil.copyfile(file, part)
    return path


def verdict(results: Mapping[str, Any]) -> str:
    """Say how much better than random images a set is, and how far from real ones that were trained to the end."""
    rows = {row["name"]: row for row in results["rows"]}
    learned = next(row for row in results["rows"] if row.get("iterations") is not None)
    found, real = learned["difference"], rows["real"]
    said = (
        f"The set is {'' if is_better(found) else 'not clearly '}better than random images: {points(found)} points "
        f"(mean difference of {found['n']} networks ± standard error)."
    )
    if not real["trained_to_its_end"]:
        return said
    gap = 100 * (real["accuracy"]["last"]["mean"] - learned["accuracy"]["last"]["mean"])
    which = real["label"].partition(" (")[0]
    return f"{said} Networks trained on {which} reach {abs(gap):.1f} points {'more' if gap > 0 else 'less'}."


def _test_part(results: Mapping[str, Any]) -> list[str]:
    """Give the number of test images, the uncertainty that follows from it, and the accuracy of chance."""
    found = sorted({(row["test_images"], row["chance"]) for row in results["rows"] if "test_images" in row})
    return [
        f"Measured on {count:,} test images: an accuracy is uncertain by {50 / count**0.5:.2g} points. "
        f"Chance: {100 * chance:.1f} %."
        for count, chance in found
    ]


def short_lines(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay a comparison out as label, accuracy and, where there is any, the paired difference; the head first."""
    bases = {row["difference"]["to_label"] for row in results["rows"] if "difference" in row}
    balanced = _balanced(results)
    varied = len({row["accuracy"]["last"]["n"] for row in results["rows"]}) > 1
    head = ["trained on", f"test accuracy, %{' (networks)' * varied}", *balanced]
    lines = [[*head, *([f"difference to {', '.join(sorted(bases))}"] if bases else [])]]
    for row in results["rows"]:
        found = row.get("difference")
        cell = points(found) + ("" if is_better(found) else ", not better") if found else "-"
        accuracies = [row["accuracy"]["last"], *(row.get("balanced_accuracy") for _ in balanced)]
        shown = [per_cent(value, count=varied) for value in accuracies]
        lines.append([row["label"], *shown, *([cell] if bases else [])])
    return lines


def _balanced(results: Mapping[str, Any]) -> list[str]:
    """Name the column of balanced accuracies; none where they differ from the others by less than half a point."""
    pairs = [
        (row["balanced_accuracy"], row["accuracy"]["last"]) for row in results["rows"] if "balanced_accuracy" in row
    ]
    return ["balanced, %"] if any(abs(one["mean"] - other["mean"]) >= 0.005 for one, other in pairs) else []


def short_table(results: Mapping[str, Any]) -> str:
    """Lay the rows of a comparison, all done, out for a terminal."""
    head, *rest = _aligned(short_lines(results))
    count, *others = {row["accuracy"]["last"]["n"] for row in results["rows"]}
    networks = "Fresh networks" if others else f"{count} fresh networks each"
    return "\n".join([head, "-" * len(head), *rest, f"{networks}, after their last epoch.", *_test_part(results)])


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to columns; a line of two cells only, of a row that failed, widens the first column alone."""
    columns = list(zip(*(line for line in lines if len(line) == len(lines[0])), strict=True))
    widths = [max(map(len, column)) for column in columns]
    widths[0] = max(len(line[0]) for line in lines)
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)).rstrip() for line in lines]


def _decoded(results: Mapping[str, Any]) -> bool:
    """Tell whether a row has a decoder: images per class do not say then what a set stores."""
    return any(row.get("decoder") for row in results["rows"])


BUDGET = {"numbers_stored": "numbers", "bytes_stored": "bytes", "evaluation_steps": "steps"}


def full_lines(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay the content of ``compare.json`` out as lines of cells, the names of the columns first."""
    networks = results.get("networks", [])
    kinds = ["last", "chosen on held-out", "best on test (upper bound)"]
    balanced = _balanced(results)
    head = ["method", *(networks or kinds), *balanced, "iterations", "peak, MiB", "labels", "images", "share"]
    budget = BUDGET if _decoded(results) else {}
    differences = any("difference" in row for row in results["rows"])
    head += [*budget.values(), *(["paired difference"] if differences else [])]
    return [head, *(_cells(row, networks, differences, balanced, list(budget)) for row in results["rows"])]


def _cells(
    row: Mapping[str, Any], networks: Sequence[str], differences: bool, balanced: Sequence[str], budget: Sequence[str]
) -> list[str]:
    if row["state"] != "done":
        return [row["label"], "to do" if row["state"] == "to do" else f"failed: {row['reason']}"]
    difference = row.get("difference")
    found = [row["networks"][name]["last"] for name in networks] or list(row["accuracy"].values())
    found += [row.get("balanced_accuracy") for _ in balanced]
    peak = row["peak_memory_MiB"] or {}
    numbers = [row.get("iterations"), peak.get("device", peak.get("process"))]
    stored, share = row.get("images_stored", row["images"]), row.get("share")
    return [
        row["label"],
        *(per_cent(value, count=True) for value in found),
        *("-" if value is None else f"{value:.0f}" for value in numbers),
        row.get("labels", "hard"),
        str(row["images"]) if stored == row["images"] else f"{stored} -> {row['images']}",
        "-" if share is None else f"{100 * share:.3g} %",
        *(f"{row[key]:,}" if key in row else "-" for key in budget),
        *([f"{points(difference)} to {difference['to_label']}" if difference else "-"] if differences else []),
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Write the content of ``compare.md``."""
    measured = [
        "Last: after the last epoch. Chosen on held-out: at the epoch that held-out training images chose.",
        "Best on test: at the epoch that is best on the test images themselves, which is an upper bound only.",
    ]
    if results.get("networks"):
        measured = ["A column for each network that the sets were evaluated on: after the last epoch."]
    if _balanced(results):
        measured.append("Balanced: mean of the recalls of all classes, after the last epoch (of the first network).")
    if any("difference" in row for row in results["rows"]):
        measured.append(
            "Paired difference: mean over networks of the same seed ± its standard error, in points, last epoch."
        )
    if _decoded(results):
        measured.append("Numbers and bytes: stored for the images, without labels. Steps: of SGD, of one evaluation.")
    notes = [
        "Networks are trained on the images and labels of a set alone, without a teacher.",
        "Test accuracy in %: mean ± population standard deviation over networks (how many).",
        *measured,
        *_test_part(results),
        "Peak memory during distillation: of tensors on a GPU, else of the process.",
        results["device"] or "nothing is done yet",
    ]
    below = "".join(f"- {note}\n" for note in notes)
    return f"# {results['title']}\n\n{markdown_table(full_lines(results))}\n\n{below}"


def text(results: Mapping[str, Any]) -> str:
    """Lay the same table out for a terminal."""
    return "\n".join(_aligned(full_lines(results)))
