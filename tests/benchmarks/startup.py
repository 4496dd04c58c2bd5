"""Start-up: what ``ftd fit --help`` takes beside a bare import of torch and Lightning, which it cannot be faster than.

Where the time goes is read from ``python -X importtime``, whose own cost makes every figure somewhat larger.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.measure import Result, Row, in_turns

OURS = ("-m", "ftd_lightning", "fit", "--help")
REFERENCE = ("-c", "import torch, lightning.pytorch")
PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "kornia", "jsonargparse", "ftd_lightning")
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")


def _call(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)


def _wall_seconds(words: Sequence[str]) -> float:
    began = time.perf_counter()
    _call(words)
    return time.perf_counter() - began


def import_seconds(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds of a program's imports by package, the largest share first.

    Returns:
        For each package: "own", what running its modules took without what they import, and "cumulative", what its
        import took with everything that it was the first to import.
    """
    own: dict[str, float] = defaultdict(float)
    cumulative: dict[str, float] = {}
    for self_us, total_us, _, name in LINE.findall(_call(["-X", "importtime", *words]).stderr):
        package = name.split(".")[0]
        own[package] += int(self_us) / 1e6
        # Modules of a package that others import come one by one: its own line is where it was imported whole.
        cumulative[package] = max(cumulative.get(package, 0.0), int(total_us) / 1e6)
    order = sorted(own, key=lambda package: own[package], reverse=True)
    return {package: {"own": own[package], "cumulative": cumulative[package]} for package in order}


def compare(repeats: int, *, ours: Sequence[str] = OURS, reference: Sequence[str] = REFERENCE) -> Result:
    """Time both in turns and look where ours spends its time."""
    works = {"ours": lambda: _wall_seconds(ours), "reference": lambda: _wall_seconds(reference)}
    in_turns(works, 1)  # fills the file cache and writes the byte code
    found = in_turns(works, repeats)
    rows = [Row("startup", f"{' '.join(ours[1:])}, bare import", "time", "s", found["ours"], found["reference"])]
    parts = import_seconds(ours)
    imports = sum(part["own"] for part in parts.values())
    named = ", ".join(
        f"{name} {parts[name]['own']:.2f} ({parts[name]['cumulative']:.2f})" for name in PACKAGES if name in parts
    )
    most = ", ".join(f"{name} {part['own']:.2f}" for name, part in parts.items() if name not in PACKAGES)
    remark = (
        f"startup: {imports:.1f} s of it are imports; own seconds of a package (and with what it is the first to "
        f"import): {named}; of the others {', '.join(most.split(', ')[:5])}"
    )
    return Result(rows, [remark], {"imports": parts, "import_seconds": imports})


def run(scale: str, repeats: int, **_: object) -> Result:
    """Measure."""
    return compare(1 if scale == "quick" else repeats)
