"""Peak memory and time of one matching step over the number of inner steps, adjoint beside full graph.

    python tests/benchmarks/unroll_memory.py [--ipc 1] [--width 128] [--repeats 3]

Every measurement is a process of its own, so that no peak hides in another's memory. "Peak" is all the process held at
most (resident set on the CPU, allocated on CUDA), "added" what the step put on top of what was there before. Times are
the fastest of the repeats; both methods are measured in turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from ftd_lightning.functional import (
    chunked_permutations,
    dsa,
    flatten_parameters,
    make_generator,
    trajectory_matching_loss,
)
from ftd_lightning.models import ConvNet

STEPS = (5, 15, 30, 60)
METHODS = ("adjoint", "graph")


def measure(method: str, steps: int, ipc: int, width: int) -> dict[str, float]:
    """Run one matching step, forward and backward, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = ConvNet(3, 10, 32, width=width).to(device)
    start = flatten_parameters(network)
    target = start + 0.01 * torch.randn_like(start)
    images = torch.randn(10 * ipc, 3, 32, 32, device=device, requires_grad=True)
    labels = torch.arange(10, device=device).repeat_interleave(ipc)
    step_size = torch.tensor(0.01, device=device, requires_grad=True)
    match = partial(
        trajectory_matching_loss, network, start, target, images, labels, step_size, augment=dsa, unroll=method
    )
    # What libraries allocate once is no part of the step.
    match(batches=chunked_permutations(10 * ipc, 1, make_generator(0))).backward()
    before = _held(device)
    began = time.perf_counter()
    match(batches=chunked_permutations(10 * ipc, steps, make_generator(0))).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began, "peak": _peak(device), "added": _peak(device) - before}


def _held(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure everything, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/unroll_memory.json"))
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.ipc, options.width)))
        return
    results: dict[str, dict[int, dict[str, float]]] = {method: {} for method in METHODS}
    size = ["--ipc", str(options.ipc), "--width", str(options.width)]
    for steps in STEPS:
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(options.repeats):
            for method in METHODS:
                command = [sys.executable, __file__, *size, "--one", method, str(steps)]
                runs[method].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        for method, measured in runs.items():
            results[method][steps] = {key: min(run[key] for run in measured) for key in measured[0]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"ConvNet width {options.width}, {10 * options.ipc} images of 32 px, DSA; torch {torch.__version__}, {device}"
    )
    print("        adjoint: peak, added MiB   graph: peak, added MiB   adjoint s   graph s   time ratio")
    for steps in STEPS:
        ours, theirs = (results[method][steps] for method in METHODS)
        memory = f"{ours['peak']:15.0f} {ours['added']:11.0f} {theirs['peak']:14.0f} {theirs['added']:11.0f}"
        times = f"{ours['seconds']:10.2f} {theirs['seconds']:9.2f} {ours['seconds'] / theirs['seconds']:12.2f}"
        print(f"{steps:5d} {memory} {times}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"ipc": options.ipc, "width": options.width, "device": device, "torch": torch.__version__}
    options.output.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
