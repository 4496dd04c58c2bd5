"""Records say nothing of where files lay on a machine."""

from __future__ import annotations

import math
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd_lightning.callbacks.progress import FILE
from ftd_lightning.core.evaluation import REAL_STEPS
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import read_json, replacing, versions, write_json
from ftd_lightning.files.schema import per_cent
from ftd_lightning.studies.fits import is_done, read_notes
from ftd_lightning.studies.plots import COUNTS, plot_points

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ftd_lightning.studies.comparison import Comparison, Row
    from ftd_lightning.studies.fits import FitStep


ABSOLUTE = re.compile(r"(?<![\w.~/-])[/~][^\s,'\"\]}]*")


def without_machine_paths(value: Any) -> Any:
    """Cut absolute paths down to their last part: where a file lay on a machine is no part of a result.

    Example:
        >>> without_machine_paths({"command": "--data.root=/srv/images --data.zca true", "store": "runs/x"})
        {'command': '--data.root=images --data.zca true', 'store': 'runs/x'}
    """
    if isinstance(value, dict):
        return {key: without_machine_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine_paths(part) for part in value]
    return ABSOLUTE.sub(lambda found: Path(found[0]).name, value) if isinstance(value, str) else value


def paired_difference(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compare two evaluations network by network.

    Accuracies of networks of the same seed go together on any set, so the mean of their differences is known better
    than either mean: its standard error, of n - 1 degrees of freedom, is that of the differences.

    Args:
        own: the content of an ``evaluation.json``: "each" accuracy and the "seeds", in the same order.
        base: likewise.

    Returns:
        "mean", "standard_error" (None for one network) and "n"; None where no network is in both.

    Example:
        >>> own, base = {"each": [0.5, 0.7], "seeds": [1, 2]}, {"each": [0.4, 0.6], "seeds": [1, 2]}
        >>> {key: round(value, 6) for key, value in paired_difference(own, base).items()}
        {'mean': 0.1, 'standard_error': 0.0, 'n': 2}
    """
    known = dict(zip(base["seeds"], base["each"], strict=True))
    pairs = [(value, known[seed]) for seed, value in zip(own["seeds"], own["each"], strict=True) if seed in known]
    if not pairs:
        return None
    differences = [value - other for value, other in pairs]
    count, mean = len(differences), math.fsum(differences) / len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1) if count > 1 else None
    error = None if variance is None else math.sqrt(variance / count)
    return {"mean": mean, "standard_error": error, "n": count}


def is_better(found: Mapping[str, Any]) -> bool:
    """Tell whether a difference is above 0 by more than chance: by two standard errors.

    Example:
        >>> is_better({"mean": 0.05, "standard_error": 0.02}), is_better({"mean": 0.05, "standard_error": 0.03})
        (True, False)
    """
    return bool(found["mean"] > 2 * (found["standard_error"] or 0.0))


def add_differences(rows: Sequence[dict[str, Any]], bases: Mapping[str, str | None]) -> None:
    """Give rows their "difference" to their base, with its name as "to", where both are done.

    Args:
        rows: as ``comparison_table.outcome`` gives them; those that are done have "each" and "seeds".
        bases: base of each row, by name.
    """
    done = {row["name"]: row for row in rows if row["state"] == "done"}
    for name, row in done.items():
        base = done.get(bases.get(name) or "")
        if base is not None and base is not row:
            found = paired_difference(row, base)
            if found is not None:
                row["difference"] = {"to": base["name"], "to_label": base["label"], **found}


def points(found: Mapping[str, Any]) -> str:
    """Format a difference in percentage points.

    Example:
        >>> points({"mean": 0.004, "standard_error": 0.003})
        '+0.4 ± 0.3'
    """
    error = found["standard_error"]
    return f"{100 * found['mean']:+.1f}{'' if error is None else f' ± {100 * error:.1f}'}"


def difference_cell(row: Mapping[str, Any]) -> str:
    """Format the difference of a row.

    Example:
        >>> difference_cell({"difference": {"to_label": "MTT", "mean": 0.004, "standard_error": 0.003, "n": 5}})
        '+0.4 ± 0.3 to MTT'
        >>> difference_cell({})
        '-'
    """
    found = row.get("difference")
    return f"{points(found)} to {found['to_label']}" if found else "-"


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


KIND = "comparison"
NO_TEACHER = "No row has a teacher at evaluation: networks are trained on the images and labels of a set alone."
ACCURACY = "Test accuracy in %: mean ± population standard deviation over networks (how many)."
ITERATES = (
    "Last: after the last epoch. Chosen on held-out: at the epoch that held-out training images chose.",
    "Best on test: at the epoch that is best on the test images themselves, which is an upper bound only.",
)
DIFFERENCES = (
    "Paired difference: mean over networks of the same seed ± its standard error, in points, after the last epoch."
)
ARCHITECTURES = "A column for each network that the sets were evaluated on: after the last epoch."
COSTS = (
    "Seconds are wall time. What several rows share (teachers, a distillation) is done once and shown in each.",
    "Seconds of a distillation include measuring it on the way (EvaluateSynthetic).",
    "Peak memory is a distillation's, measuring on the way included: on the GPU of tensors, else of the whole process.",
)


def _has_differences(results: Mapping[str, Any]) -> bool:
    return any("difference" in row for row in results["rows"])


def test_part(results: Mapping[str, Any]) -> list[str]:
    """Give the number of test images, the uncertainty that follows from it, and the accuracy of chance.

    Example:
        >>> test_part({"rows": [{"test_images": 4, "chance": 0.5}, {"state": "to do"}]})
        ['Measured on 4 test images: an accuracy is uncertain by 25 points. Chance: 50.0 %.']
    """
    found = sorted({(row["test_images"], row["chance"]) for row in results["rows"] if "test_images" in row})
    return [
        f"Measured on {count:,} test images: an accuracy is uncertain by {50 / count**0.5:.2g} points. "
        f"Chance: {100 * chance:.1f} %."
        for count, chance in found
    ]


def notes(results: Mapping[str, Any]) -> list[str]:
    """Say what the columns are: iterates on one network, or the last ones on several."""
    measured = [ARCHITECTURES] if results.get("networks") else list(ITERATES)
    differences = [DIFFERENCES] if _has_differences(results) else []
    return [ACCURACY, *measured, *differences, *test_part(results), *COSTS]


def seconds_of(steps: Iterable[FitStep | None]) -> float | None:
    """Wall time of fits that are done; of teachers that others joined later, their share. None where none is timed."""
    total: float | None = None
    for step in (step for step in steps if step is not None):
        finished = {int(target): seconds for target, seconds in read_notes(step.folder)["finished"].items()}
        further = [target for target in finished if target >= step.target]
        if further:
            total = (total or 0.0) + finished[min(further)] * step.target / min(further)
    return None if total is None else round(total, 1)


def _accuracy(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "evaluation.json")
    last = next(iter(found["accuracy"].values()))
    return {"last": last, **{key: found.get(key) for key in ("chosen_on_held_out", "best_on_test")}}


def state(job: Comparison, row: Row, failures: Mapping[str, str]) -> dict[str, str]:
    """Say how far a row is: "state" is "done", "to do" or, with a "reason", "failed".

    A row that was not asked for may lack a config; it is no reason to throw the others' results away.
    """
    if row.name in failures:
        return {"state": "failed", "reason": failures[row.name]}
    try:
        done = all(map(is_done, job.steps(row)))
    except InputError as error:
        return {"state": "failed", "reason": str(error)}
    return {"state": "done" if done else "to do"}


def outcome(job: Comparison, row: Row, failures: Mapping[str, str]) -> dict[str, Any]:
    """Say what a row gave.

    Args:
        job: the comparison.
        row: one of it.
        failures: reasons by name of row.

    Returns:
        "state" is "done", "failed" (with a "reason") or "to do". "accuracy" holds "last", "chosen_on_held_out" and
        "best_on_test", fractions, on the first network; "networks" the same of each where several are named. "labels"
        is the set's ``label_description``, "images" those that networks are trained on, "images_stored" those that the
        set takes the storage of. "teacher_at_evaluation" is False: none of these evaluations asks a teacher.
        "training_images" include held-out ones. "chance" is the share of the most common class of the test images.
    """
    facts: dict[str, Any] = {"name": row.name, "label": row.label}
    facts |= {key: row.given[key] for key in ("x", "reference") if key in row.given}
    facts |= state(job, row, failures)
    if facts["state"] != "done":
        return facts
    steps = job.steps(row)
    teachers, distill, file = row.given.get("teachers"), job.distill_step(row), job.set_file(row)
    labels = job.label_step(row)
    evaluations = {network: job.evaluation_step(row, network) for network in job.networks}
    accuracy = {network: _accuracy(step.folder) for network, step in evaluations.items()}
    first = next(iter(evaluations.values()))
    counts, measured = read_json(first.folder / COUNTS), read_json(first.folder / "evaluation.json")
    synthetic = SyntheticSet.load(file) if file else None
    stored, trained_on = synthetic.image_counts if synthetic else (counts.get("images"), counts.get("images"))
    return {
        **facts,
        "accuracy": next(iter(accuracy.values())),
        **({"networks": accuracy} if "" not in accuracy else {}),
        "iterations": synthetic.metadata.get("iterations") if distill and synthetic else None,
        "epochs": measured["epochs"],
        "seconds": {
            "teachers": seconds_of([job.teacher_step(teachers) if teachers is not None else None]),
            "distillation": seconds_of([distill, labels]),
            "evaluation": seconds_of(evaluations.values()),
        },
        "peak_memory_MiB": read_json(distill.folder / FILE) if distill else None,
        "labels": synthetic.label_description if synthetic else "hard",
        "images": trained_on,
        "images_stored": stored,
        "teacher_at_evaluation": False,
        "seeds": measured["seeds"],
        "each": measured["each"],
        "folders": [str(step.folder) for step in steps],
        "devices": sorted({name for step in steps for name in read_notes(step.folder)["devices"]}),
        **_real(row, counts, measured["epochs"]),
        **{key: counts[key] for key in ("training_images", "test_images", "chance") if key in counts},
    }


def _real(row: Row, counts: Mapping[str, Any], epochs: int) -> dict[str, str]:
    """Give the label of a row of all real images: how many there are, and how long networks learn them."""
    if row.given.get("synthetic") != "real" or not counts:
        return {}
    short = ", not trained to their end" if epochs * counts["steps_per_epoch"] < REAL_STEPS else ""
    return {"label": f"{row.label} ({counts['images']:,}, {epochs} epochs{short})"}


def _teachers(job: Comparison) -> dict[str, dict[str, Any]]:
    """Give the "seconds" of teachers that are done; with a "reason", None, of those that cannot be."""
    found: dict[str, dict[str, Any]] = {}
    for name in job.given.get("teachers") or {}:
        try:
            step = job.teacher_step(name)
            if step is not None and is_done(step):
                found[name] = {"seconds": seconds_of([step])}
        except InputError as error:
            found[name] = {"seconds": None, "reason": str(error)}
    return found


def gather(job: Comparison, failures: Mapping[str, str]) -> dict[str, Any]:
    """Gather the content of ``compare.json``."""
    rows = [outcome(job, row, failures) for row in job.rows.values()]
    base = job.given.get("paired_with")
    # A row may be limited to a part of the training images; shares are of the most that any row has.
    whole = max((row["training_images"] for row in rows if "training_images" in row), default=None)
    rows = [row | {"share": row["images_stored"] / whole} if whole and "images_stored" in row else row for row in rows]
    add_differences(rows, {name: row.given.get("paired_with", base) for name, row in job.rows.items()})
    facts = {
        "kind": KIND,
        "title": job.given.get("title", job.file.stem),
        "config": str(job.file),
        "dataset": job.given["dataset"],
        "ipc": job.given.get("ipc", 1),
        "networks": [name for name in job.networks if name],
        "rows": rows,
        "teachers": _teachers(job),
        "device": "; ".join(sorted({name for row in rows for name in row.get("devices", [])})),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if "plot" in job.given:
        facts["plot"] = {"x": job.given["plot"]["x"], **plot_points(rows)}
    cleaned: dict[str, Any] = without_machine_paths(facts)
    return cleaned


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _images_cell(row: Mapping[str, Any]) -> str:
    """Give the images that networks are trained on, after those that are stored where these are others.

    Example:
        >>> _images_cell({"images": 10}), _images_cell({"images": 40, "images_stored": 10})
        ('10', '10 -> 40')
    """
    trained_on, stored = row["images"], row.get("images_stored", row["images"])
    return _number(trained_on) if stored == trained_on else f"{_number(stored)} -> {_number(trained_on)}"


def _cells(row: dict[str, Any], networks: Sequence[str]) -> list[str]:
    measured = max(len(networks), 3)
    if row["state"] != "done":
        said = "to do" if row["state"] == "to do" else f"failed: {row['reason']}"
        return [row["label"], said, *["-"] * (measured + 7)]
    kinds = row["accuracy"].values()
    accuracy = [per_cent(row["networks"][name]["last"], count=True) for name in networks] or [
        per_cent(kind, count=True) for kind in kinds
    ]
    seconds, peak = row["seconds"], row["peak_memory_MiB"] or {}
    cells = [row["label"], *accuracy, *(_number(seconds[key]) for key in ("teachers", "distillation", "evaluation"))]
    cells.append(_number(row.get("iterations")))
    share = "-" if row["share"] is None else f"{100 * row['share']:.3g} %"
    labels = row.get("labels", "hard")  # all were, before records said so
    return [*cells, _number(peak.get("device", peak.get("process"))), labels, _images_cell(row), share]


def columns(networks: Sequence[str]) -> list[str]:
    """Name the columns: accuracies of one network, or the last iterates of several."""
    kinds = ["last", "chosen on held-out", "best on test (upper bound)"]
    rest = ["teachers, s", "distillation, s", "evaluation, s", "iterations", "peak, MiB", "labels", "images", "share"]
    return ["method", *(networks or kinds), *rest]


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Lay the content of ``compare.json`` out as lines of cells, the names of the columns first."""
    networks = results.get("networks", [])
    head = columns(networks)
    lines = [head, *(_cells(row, networks)[: len(head)] for row in results["rows"])]
    if _has_differences(results):
        cells = ["paired difference", *map(difference_cell, results["rows"])]
        lines = [[*line, cell] for line, cell in zip(lines, cells, strict=True)]
    return lines


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells as a Markdown table; the first one is its head.

    Example:
        >>> print(markdown_table([["set", "accuracy"], ["DC", "88.3"]]))
        | set | accuracy |
        | --- | --- |
        | DC | 88.3 |
    """
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def markdown(results: Mapping[str, Any]) -> str:
    """Write the content of ``compare.md``."""
    rows = markdown_table(table(results))
    said = {
        n: f"failed: {v['reason']}" if "reason" in v else f"{v['seconds']:.0f} s"
        for n, v in results["teachers"].items()
    }
    teachers = "".join(f"- teachers {name}: {what}\n" for name, what in said.items())
    below = "".join(f"- {note}\n" for note in notes(results))
    device = results["device"] or "nothing is done yet"
    return f"# {results['title']}\n\n{NO_TEACHER}\n\n{rows}\n\n{teachers}{below}- {device}\n"


def text(results: Mapping[str, Any]) -> str:
    """Lay the same out for a terminal; what a row failed of takes the rest of its line.

    Example:
        >>> row = {"label": "DC", "state": "failed", "reason": "no such config"}
        >>> print(text({"rows": [row]}).splitlines()[-1])
        DC      failed: no such config
    """
    lines = table(results)
    said = [row["state"] != "done" for row in results["rows"]]
    plain = [line for line, short in zip(lines, [False, *said], strict=True) if not short]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    shown = []
    for line, short in zip(lines, [False, *said], strict=True):
        cells = line[:2] if short else line
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        shown.append("  ".join(padded).rstrip())
    return "\n".join(shown)
