"""Published accuracies of one image per class, beside those that this library measured, and what differs.

Published numbers are those of FTD's Table 1 and, for what it does not list, of the sources that docs/methods.md names.
Ours come from records of ``ftd compare``: on all of CIFAR-10 with narrow networks, and on the digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftd_lightning.files.schema import per_cent

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = ("method", "published, CIFAR-10", "here, CIFAR-10, width 32", "here, digits", "what differs, besides size")


@dataclass(frozen=True)
class Method:
    """A method of the field.

    Args:
        row: its name in our comparisons.
        label: its name.
        accuracy: test accuracy in per cent on CIFAR-10 with one image per class; None where none was published.
        differs: what is different in ours, besides width, teachers and time.
    """

    row: str
    label: str
    accuracy: float | None
    differs: str


NOTHING = "nothing else"
METHODS = (
    Method("random", "random", 14.4, "as listed by AutoPalette; whitened images here"),
    Method("herding", "herding", 21.5, "as listed by AutoPalette; whitened images and a teacher of four epochs here"),
    Method("dd", "DD", None, "published for ipc 10, 36.8, on AlexCifarNet; a constant learning rate here"),
    Method(
        "kip",
        "KIP",
        49.9,
        "there a convolutional network's kernel, learned labels, and networks of width 1024 trained by squared error; "
        "here a fully connected one's, classes, and cross entropy",
    ),
    Method(
        "frepo",
        "FRePo",
        46.8,
        "there LAMB, flipped copies, and evaluation by Adam, squared error and averaged weights; here Adam, and "
        "evaluation by SGD and cross entropy",
    ),
    Method(
        "rat-bptt",
        "RaT-BPTT",
        53.2,
        "there evaluation by Adam, the best of several lengths on test images; here by SGD, the last epoch",
    ),
    Method("dc", "DC", 28.3, NOTHING),
    Method("dsa", "DSA", 28.8, NOTHING),
    Method("dm", "DM", 26.0, NOTHING),
    Method("cafe", "CAFE", 30.3, "loops are bounded here"),
    Method("cafe+dsa", "CAFE+DSA", 31.6, "loops are bounded here"),
    Method("pp", "PP", 46.4, "its rule as FTD describes it: its code is not published"),
    Method("mtt", "MTT", 46.2, NOTHING),
    Method("mtt+robust", "MTT + robust learning", 45.8, "sigma, which is not published, is relative here"),
    Method("ftd", "FTD", 46.8, NOTHING),
)


def published_rows(cifar10: Sequence[dict[str, Any]], digits: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lay published and measured accuracies out, a line for each method, after the line of ``COLUMNS``.

    Args:
        cifar10: records of comparisons on CIFAR-10; of several that have a method, the first counts.
        digits: records of comparisons on the digits.

    Example:
        >>> last = {"mean": 0.25, "std": 0.01, "n": 5}
        >>> record = {"rows": [{"name": "dm", "state": "done", "accuracy": {"last": last}}]}
        >>> [line for line in published_rows([record], []) if line[0] == "DM"]
        [('DM', '26.0', '25.0 ± 1.0 (5)', '-', 'nothing else')]
    """
    lines: list[tuple[str, ...]] = [COLUMNS]
    for method in METHODS:
        number = "-" if method.accuracy is None else f"{method.accuracy:.1f}"
        lines.append((method.label, number, _measured(method, cifar10), _measured(method, digits), method.differs))
    return lines


def _measured(method: Method, records: Sequence[dict[str, Any]]) -> str:
    rows = [row for record in records for row in record["rows"] if row["name"] == method.row and row["state"] == "done"]
    return per_cent(rows[0]["accuracy"]["last"], count=True) if rows else "-"
