"""Records say nothing of where files lay on a machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
