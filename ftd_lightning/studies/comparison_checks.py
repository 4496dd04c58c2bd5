"""What the YAML file of a comparison may hold: all that can be known of it without reading a config."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ftd_lightning.data.coresets import BASELINES
from ftd_lightning.errors import InputError
from ftd_lightning.studies.paired_difference import check_bases

KEYS = {
    *("title", "cost", "dataset", "ipc", "run", "fits", "threads", "arguments"),
    *("teachers", "evaluate", "networks", "rows", "plot", "paired_with", "distill_minutes"),
}
ROW_KEYS = {
    *("label", "synthetic", "labels", "distill", "set", "teachers", "ema", "x", "reference"),
    *("distill_arguments", "distill_minutes", "iterate", "evaluate", "evaluate_arguments", "paired_with"),
}
SOURCES = ("synthetic", "distill", "set")
TEACHER_KEYS = {"config", "arguments", "store"}
BY_FEATURES = ("herding", "k-center")
ITERATES = ("last", "chosen")  # on held-out images, while it was distilled
MAPPINGS = ("rows", "networks", "teachers")


def _known(where: str, given: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{where}: names no settings")
    unknown = sorted(str(key) for key in {*given} - keys)
    if unknown:
        raise InputError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(sorted(keys))}")
    return given


def _check_minutes(where: str, given: dict[str, Any]) -> None:
    minutes = given.get("distill_minutes")
    if minutes is None:
        return
    number = not isinstance(minutes, bool) and isinstance(minutes, int | float)
    if not number or not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"{where}: distill_minutes={minutes!r} is no number of minutes above 0")


def _check_row(where: str, given: dict[str, Any], teachers: dict[str, Any]) -> None:
    sources = [key for key in SOURCES if key in given]
    if len(sources) != 1:
        raise InputError(f"{where}: names {' and '.join(sources) or 'no set'}; give one of {', '.join(SOURCES)}")
    if given.get("synthetic", "real") not in BASELINES:
        raise InputError(f"{where}: synthetic is one of {', '.join(BASELINES)}; give a file as set")
    if "set" in given and not Path(given["set"]).is_file():
        raise InputError(f"{where}: its set {given['set']} is not there")
    if given.get("iterate", "last") not in ITERATES or ("iterate" in given and "distill" not in given):
        raise InputError(f"{where}: iterate is one of {', '.join(ITERATES)}, of a row that distils")
    if "distill_minutes" in given and "distill" not in given:
        raise InputError(f"{where}: distill_minutes belongs to a row that distils")
    _check_minutes(where, given)
    name = given.get("teachers")
    if name is not None and name not in teachers:
        raise InputError(f"{where}: unknown teachers {name}; there are {', '.join(teachers) or 'none'}")
    if given.get("synthetic") in BY_FEATURES and name is None:
        raise InputError(f"{where}: {given['synthetic']} goes by the features of a teacher; give its teachers")
    if "labels" in given and (given["labels"] != "teacher" or given.get("synthetic") != "random" or name is None):
        raise InputError(f"{where}: labels: teacher is for a row of random images (synthetic: random) with teachers")
    if "labels" in given and given.get("ema"):
        raise InputError(f"{where}: random images have no average, leave out ema")
    x = given.get("x", 0)
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        hint = " (YAML reads 5e-3 as a word; write 5.0e-3)" if isinstance(x, str) else ""
        raise InputError(f"{where}: x={x!r} is no number{hint}")


def check(file: str, given: Any) -> None:
    """Check what was read of a comparison's file.

    Args:
        file: its name, for errors.
        given: what YAML read.

    Raises:
        InputError: for a key, a row or teachers that are not known, or values of another kind.
    """
    _known(file, given, KEYS)
    missing = [key for key in ("dataset", "run", "evaluate", "rows") if not given.get(key)]
    if missing:
        raise InputError(f"{file}: lacks {', '.join(missing)}")
    for key in MAPPINGS:
        if not isinstance(given.get(key) or {}, dict) or given.get(key) == []:
            raise InputError(f"{file}: {key} is no mapping of names")
    _check_minutes(file, given)
    if "plot" in given and (not isinstance(given["plot"], dict) or "x" not in given["plot"]):
        raise InputError(f"{file}: plot names no x, which is the name of its axis: plot: {{x: rho}}")
    teachers = given.get("teachers") or {}
    for name, entry in teachers.items():
        entry = _known(
            f"{file}: teachers {name}", entry if isinstance(entry, dict) else {"config": entry}, TEACHER_KEYS
        )
        if ("config" in entry) == ("store" in entry):
            raise InputError(f"{file}: teachers {name}: give either config or store")
    for name, entry in given["rows"].items():
        where = f"{file}: row {name}"
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise InputError(f"{where}: names a file too: letters, digits and _ . + - only")
        _check_row(where, _known(where, entry, ROW_KEYS), teachers)
    check_bases(file, given["rows"], given.get("paired_with"))
