"""What a device can do at most: copies, convolutions, and the peak memory of a matching step over its inner steps.

    PYTHONPATH=tests python -m benchmarks.ceilings FILE [--quick]

Random numbers throughout, for zeros cost less power and can be faster. A copy counts the bytes read and those written;
a convolution counts 2 operations for each multiplication and addition.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import DEVICE, about, timed
from benchmarks.processes import in_process

REPEATS = 5
# MiB to copy; images, channels and pixels a side of a convolution of 3 x 3; calls that are timed as one;
# images per class, width and inner steps of matching.
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"copy": 8, "convolution": (4, 8, 16), "calls": 2, "matching": (1, 8, (2, 4))},
    "cpu": {"copy": 256, "convolution": (16, 128, 32), "calls": 2, "matching": (1, 32, (5, 15))},
    "cuda": {"copy": 2048, "convolution": (256, 128, 32), "calls": 20, "matching": (10, 128, (5, 30))},
}


def copy_rate(mebibytes: int, calls: int) -> float:
    """GB/s of copies from the device's memory to itself."""
    source = torch.rand(mebibytes * 2**18, device=DEVICE)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(calls):
            target.copy_(source)

    copies()
    return 2 * source.numel() * 4 * calls / median(timed(copies) for _ in range(REPEATS)) / 1e9


def convolution_rate(images: int, channels: int, side: int, calls: int, *, dtype: torch.dtype, tf32: bool) -> float:
    """TFLOP/s of a convolution's forward pass with as many channels out as in."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, True
    try:
        x = torch.randn(images, channels, side, side, device=DEVICE, dtype=dtype)
        weights = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=dtype)

        def convolve() -> None:
            for _ in range(calls):
                torch.nn.functional.conv2d(x, weights, padding=1)

        convolve()
        seconds = median(timed(convolve) for _ in range(REPEATS))
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    return 2 * images * side**2 * channels**2 * 9 * calls / seconds / 1e12


def matching_peaks(ipc: int, width: int, all_steps: Sequence[int]) -> list[dict[str, Any]]:
    """MiB of a matching step by the adjoint, each number of inner steps in a process of its own."""
    case = {"ipc": ipc, "width": width}
    return [
        {**case, "steps": steps, **in_process("matching:memory", method="ours", steps=steps, **case)}
        for steps in all_steps
    ]


def measure(scale: str) -> dict[str, Any]:
    """Measure all."""
    size = SIZES[scale]
    kinds = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False)}
    if DEVICE == "cuda":
        kinds["tf32"] = (torch.float32, True)
    return {
        **about(),
        "sizes": size,
        "copy_gb_per_s": copy_rate(size["copy"], size["calls"]),
        "convolution_tflop_per_s": {
            name: convolution_rate(*size["convolution"], size["calls"], dtype=dtype, tf32=tf32)
            for name, (dtype, tf32) in kinds.items()
        },
        "matching_mib": matching_peaks(*size["matching"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    options = parser.parse_args(arguments)
    text = json.dumps(measure("quick" if options.quick else DEVICE), indent=2)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
