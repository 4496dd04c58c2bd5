"""The shipped configs that belong together: the published settings of a method on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError
from ftd_lightning.modules.gradient_matching import PUBLISHED_LOOPS
from ftd_lightning.shipped_configs import SHIPPED, find_config, read_config, shipped_names

if TYPE_CHECKING:
    from collections.abc import Iterable

IMAGENET = "imagenet"  # the folder that the subsets share


class Published(NamedTuple):
    """Configs of a distillation and of what it needs.

    Attributes:
        distill: file of the distillation.
        evaluate: file of the evaluation.
        teacher: file of the teachers; None for a method without.
        arguments: of all three, for what the files leave to the command line.
        ipc: arguments of the distillation alone.
    """

    distill: Path
    evaluate: Path
    teacher: Path | None
    arguments: tuple[str, ...]
    ipc: tuple[str, ...]


def _first(names: Iterable[str]) -> Path | None:
    known = set(shipped_names())
    return next((SHIPPED / f"{name}.yaml" for name in names if name in known), None)


def published(dataset: str, ipc: int, method: str) -> Published:
    """Find the shipped configs of a method on a data set.

    Args:
        dataset: a data set's name, or a folder of shipped configs (cifar10-part).
        ipc: images per class.
        method: as in ``distill_METHOD`` or ``distill_METHOD_ipcN``.

    Raises:
        InputError: if there are none, naming those that there are.

    Example:
        >>> published("imagewoof", 10, "ftd").arguments
        ('--data.dataset', 'imagewoof')
    """
    folders = {name.partition("/")[0] for name in shipped_names()}
    folder = IMAGENET if dataset in SUBSETS else dataset
    if folder not in folders:
        raise InputError(f"{dataset}: no settings ship for it; there are {', '.join(sorted(folders))}")
    whole = f"{folder}/distill_{method}_ipc{ipc}"
    distill = _first([whole, f"{folder}/distill_{method}"])
    if distill is None and folder == "cifar100":  # rivals have the settings of CIFAR-10 there
        distill = _first([f"cifar10/distill_{method}"])
    if distill is None:
        there = ", ".join(name for name in shipped_names() if name.startswith(f"{folder}/distill_"))
        raise InputError(f"{whole}: no such config; there are {there}")
    named = read_config(distill)["data"]["init_args"]["dataset"]
    other = dataset in DATASETS and dataset != named
    return belonging(distill, ipc, ["--data.dataset", dataset] if other else [])


def belonging(distill: Path, ipc: int | None = None, arguments: Iterable[str] = ()) -> Published:
    """Find what belongs to a distillation's config: its teachers by their folder, and the evaluation beside it.

    Args:
        distill: its file.
        ipc: images per class; None: as the config says.
        arguments: for all of them.

    Raises:
        InputError: for a config without a method, or one whose teachers' config is not there.
    """
    model = read_config(distill).get("model", {})
    settings = model.get("init_args", {}) if isinstance(model, dict) else {}
    if not settings:
        raise InputError(f"{distill}: names no method; a config of a distillation is needed")
    teacher = None
    if (trajectories := settings.get("trajectories")) is not None:
        name = Path(trajectories).parent  # runs/DATASET/TEACHER, where the teachers of that config go
        teacher = find_config(name.relative_to("runs") if name.is_relative_to("runs") else name, near=distill.parent)
    own: list[str] = []
    if ipc is not None and ipc != settings.get("ipc"):
        own = ["--model.ipc", str(ipc)]
        if model["class_path"].endswith("GradientMatching") and ipc in PUBLISHED_LOOPS:
            # As many networks, with as many updates of the images on each as published for the ipc.
            networks = read_config(distill)["trainer"]["max_steps"] // PUBLISHED_LOOPS[settings["ipc"]][0]
            own += ["--trainer.max_steps", str(networks * PUBLISHED_LOOPS[ipc][0])]
    return Published(distill, find_config("evaluate", near=distill.parent), teacher, tuple(arguments), tuple(own))
