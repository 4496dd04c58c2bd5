"""``ftd_lightning.distill``: anybody's datasets distilled by one call, on the engine of ``ftd distill``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ftd_lightning.bounds import check_bounds
from ftd_lightning.data.in_memory import read_datasets, write_images_file
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.studies.distill import Source, plan_job, run_job
from ftd_lightning.studies.fits import TimeSlice

FIXED = {"transform", "dataset", "root", "download", "test_fraction", "synthetic", "trajectories", "teacher"}


def distill(
    train: Any,
    test: Any,
    *,
    ipc: int = 1,
    method: str = "ftd",
    minutes: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    **data_options: Any,
) -> SyntheticSet:
    """Distil a dataset into a few synthetic images per class, and measure them beside real ones.

    The images are written to ``out/data`` once, and child processes train teachers, distil and evaluate, as ``ftd
    distill`` does: ``out`` holds the same files, and the same call resumes where it stopped.

    Args:
        train: a torch ``Dataset`` of (image, label), torchvision's with or without ``ToTensor``; or a pair of tensors,
            images (N, C, H, W), uint8 or floats in [0, 1], and labels (N,).
        test: likewise; what fresh networks are measured on.
        ipc: images per class.
        method: "ftd" or "mtt".
        minutes: budget of the whole job; None: 30.
        out: folder to write to; None: a temporary one, so only the set is kept.
        seed: of everything that is drawn.
        data_options: ``val``, ``class_names``, ``image_size`` and other options of
            ``DistillationDataModule.from_datasets``, but ``transform``.

    Returns:
        The distilled set. Accuracies of random images, the set and all images are in ``out/results.json``.

    Raises:
        InputError: for images that are no pictures, a budget that is too small, or ``out`` of another call.

    Example:
        >>> from torchvision.datasets import CIFAR10
        >>> train, test = (CIFAR10("data", train=part, download=True) for part in (True, False))  # doctest: +SKIP
        >>> synthetic = distill(train, test, ipc=10, minutes=120, out="cifar10")  # doctest: +SKIP
    """
    check_bounds(distill, locals())
    for name in sorted(FIXED & data_options.keys()):
        raise InputError(f"distill: leave {name}= out; the images are pictures, and where they go is out's")
    reading = {name: data_options.pop(name, None) for name in ("val", "class_names", "image_size")}
    dataset = read_datasets(train, test, transform=None, **reading)
    # As YAML, which the command line reads.
    overrides = [part for name, value in data_options.items() for part in (f"--data.{name}", json.dumps(value))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if out is None else out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        file = write_images_file(dataset, folder / "data")
        source = Source("images", str(file.parent), "own images")
        command = {"ipc": ipc, "method": method, "minutes": minutes, "config": None, "seed": seed}
        job = plan_job(source, folder, command, overrides)
        run_job(job, folder, TimeSlice(None))
        return SyntheticSet.load(folder / "set.safetensors")
