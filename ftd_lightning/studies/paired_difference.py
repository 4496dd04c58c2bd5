"""Differences of rows whose networks have the same seeds: what they have in common drops out of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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


def check_bases(where: str, rows: Mapping[str, Any], base: object) -> None:
    """Check what rows are compared with.

    Args:
        where: what errors call the comparison.
        rows: of its file.
        base: the row that all are compared with by default, or None.

    Raises:
        InputError: for a name that is no row, or a row that is compared with itself.
    """
    for name, row in {"": {"paired_with": base}, **rows}.items():
        given = row.get("paired_with") if isinstance(row, dict) else None
        if given is not None and given not in rows:
            raise InputError(f"{where}: paired_with: {given} is no row; there are {', '.join(map(str, rows))}")
        if given is not None and given == name:
            raise InputError(f"{where}: row {name}: is paired with itself")


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
