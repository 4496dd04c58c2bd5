"""JSON files: written atomically in UTF-8, without NaN; read as far as they are whole."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from ftd_lightning.data.files import replacing

if TYPE_CHECKING:
    from pathlib import Path


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None.

    Example:
        >>> without_nan({"a": [1.0, float("nan")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as a JSON file."""
    text = json.dumps(without_nan(value), indent=indent, allow_nan=False)
    with replacing(path) as part:
        part.write_text(f"{text}\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping that this library keeps for its next run.

    Returns:
        The mapping; an empty one where the file is missing, damaged, or holds something else, so it is made again.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
