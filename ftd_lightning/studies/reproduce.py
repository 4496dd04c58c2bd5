"""``ftd reproduce``: one cell of the published tables, as a comparison of its last, chosen and averaged images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftd_lightning.command_line import parse_command
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError
from ftd_lightning.modules.class_matching import PUBLISHED_LOOPS
from ftd_lightning.shipped_configs import SHIPPED, find_config, read_config, shipped_names
from ftd_lightning.studies.compare import run_comparison
from ftd_lightning.studies.comparison import Comparison, Row, Teachers
from ftd_lightning.studies.fits import Settings, resolved, split_by_phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ftd_lightning.functional.selection import Ipc


class Published(NamedTuple):
    """Shipped configs that belong together: of the distillation, its evaluation, and its teachers, if it has any."""

    distill: Settings
    evaluate: Settings
    teacher: Settings | None

    @property
    def averages_images(self) -> bool:
        """Whether the distillation keeps a moving average of the images."""
        callbacks = read_config(Path(str(self.distill.config))).get("trainer", {}).get("callbacks") or []
        return any(str(callback.get("class_path", "")).endswith("SyntheticEMA") for callback in callbacks)


def published(dataset: str, ipc: Ipc, method: str) -> Published:
    """Find the shipped configs of a method on a data set, or in a folder of shipped configs (cifar10-part)."""
    shipped = shipped_names()
    folder = "imagenet" if dataset in SUBSETS else dataset
    folders = sorted({name.partition("/")[0] for name in shipped})
    if folder not in folders:
        raise InputError(f"{dataset}: no settings ship for it; there are {', '.join(folders)}")
    wanted = [f"{folder}/distill_{method}_ipc{ipc}", f"{folder}/distill_{method}"]
    # On CIFAR-100, methods without teachers have the settings of CIFAR-10.
    wanted += [f"cifar10/distill_{method}"] if folder == "cifar100" else []
    name = next((name for name in wanted if name in shipped), None)
    if name is None:
        there = ", ".join(name for name in shipped if name.startswith(f"{folder}/distill_"))
        raise InputError(f"{wanted[0]}: no such config; there are {there}")
    distill = SHIPPED / f"{name}.yaml"
    other = dataset in DATASETS and dataset != read_config(distill)["data"]["init_args"]["dataset"]
    return belonging(distill, ipc, {"dataset": dataset} if other else {})


def belonging(distill: Path, ipc: Ipc, data: Mapping[str, Any] | None = None) -> Published:
    """Find the teachers and the evaluation of a distillation's config; all get ``data``, the DataModule's arguments."""
    model = read_config(distill).get("model", {})
    own = model.get("init_args") if isinstance(model, dict) else None
    if not own:
        raise InputError(f"{distill}: names no method; a config of a distillation is needed")

    def found(name: str | Path) -> Settings:
        return Settings(str(find_config(name, near=distill.parent)), data=dict(data or {}))

    settings, teacher = found(distill.resolve()), None
    if (trajectories := own.get("trajectories")) is not None:
        name = Path(trajectories).parent  # runs/DATASET/TEACHER
        teacher = found(name.relative_to("runs") if name.is_relative_to("runs") else name)
    if ipc != own.get("ipc"):
        settings = settings.having(model={"ipc": ipc})
        if model["class_path"].endswith("GradientMatching") and isinstance(ipc, int) and ipc in PUBLISHED_LOOPS:
            # As many networks, with as many updates of the images on each as published for the ipc.
            networks = read_config(distill)["trainer"]["max_steps"] // PUBLISHED_LOOPS[own["ipc"]][0]
            settings = settings.having(trainer={"max_steps": networks * PUBLISHED_LOOPS[ipc][0]})
    return Published(settings, found("evaluate"), teacher)


def _epochs_read(configs: Published, overrides: Sequence[str]) -> int | None:
    """Return how many epochs of its teachers a distillation reads; None where they have no more.

    Batches follow from (seed, teacher, epoch) at a constant rate, so these are the published teachers as far as they
    go.
    """
    phases = split_by_phase(overrides)
    if any(option.startswith("--model.epochs") for option in phases["teacher"]):
        return None
    pairs = ((configs.distill, phases["distill"]), (configs.teacher, phases["teacher"]))
    found = [resolved(Path(str(of.config)), [*of.options(), *given]) for of, given in pairs if of is not None]
    if None in found:  # the fit reports why
        return None
    reads, teacher = ((settings or {})["model"]["init_args"] for settings in found)
    last = int(reads["max_start_epoch"] - 1 + reads["expert_epochs"])
    return last if last < teacher["epochs"] else None


def _holds_images_out(distill: Settings, overrides: Sequence[str]) -> bool:
    """Tell whether there are images to choose an iterate by, or the distillation will report what is wrong."""
    options = [*distill.options(), *split_by_phase(overrides)["distill"]]
    settings = resolved(Path(str(distill.config)), options)
    return settings is None or settings["data"]["init_args"].get("val_fraction") != 0


def plan(
    dataset: str,
    ipc: int,
    method: str,
    *,
    teachers: int | None = None,
    iterations: int | None = None,
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    overrides: Sequence[str] = (),
) -> Comparison:
    """Make the comparison of a cell; see :func:`reproduce`."""
    distill, evaluate, teacher = configs = published(dataset, ipc, method)
    if teacher is None:
        raise InputError(f"{distill.config}: its method has no teachers; ftd reproduce is for those that do")
    length = _epochs_read(configs, overrides) if teacher_epochs is None else teacher_epochs or None
    sizes = {"teachers": teachers, "epochs": length}
    taught = Teachers(**vars(teacher.having(model={key: size for key, size in sizes.items() if size is not None})))
    distill = distill if iterations is None else distill.having(trainer={"max_steps": iterations})
    evaluate = evaluate if epochs is None else evaluate.having(trainer={"max_epochs": epochs})
    rows, chooses = {}, _holds_images_out(distill, overrides)
    for suffix, ema, images in (("", False, "raw"), ("-ema", True, "averaged"))[: 1 + configs.averages_images]:
        options: dict[str, Any] = {"distill": distill, "teachers": method, "ema": ema}
        label = f"{method.upper()}, {images} images"
        rows[f"{method}{suffix}"] = Row(label, **options)
        if chooses:
            rows[f"{method}{suffix}-chosen"] = Row(f"{label} chosen on held-out", iterate="chosen", **options)
    asked = [teachers, iterations, epochs, teacher_epochs, *overrides]
    changed = any(value is not None for value in asked)
    name = hashlib.blake2b(json.dumps(asked).encode(), digest_size=3).hexdigest() if changed else "published"
    file = Path(str(distill.config)).parent / "reproduce.yaml"
    named = read_config(Path(str(evaluate.config)))["data"]["init_args"]["dataset"]
    return Comparison(
        title=f"{dataset}, {ipc} image{'s' * (ipc > 1)} per class, {method.upper()}",
        dataset=evaluate.data.get("dataset", named),
        ipc=ipc,
        run=f"runs/{dataset}/reproduce_{method}_ipc{ipc}_{name}",
        fits=f"runs/{dataset}/fits",
        teachers={method: taught},
        evaluate=evaluate,
        rows=rows,
        file=file,
        overrides=split_by_phase(overrides),
    )


def reproduce(
    *,
    dataset: str = "cifar10",
    ipc: int = 10,
    method: str = "ftd",
    teachers: int | None = None,
    iterations: int | None = None,
    epochs: int | None = None,
    teacher_epochs: int | None = None,
    stop_after: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train teachers, distil and evaluate with the published settings of a data set.

    Writes compare.json and compare.md into runs/DATASET/reproduce_METHOD_ipcN_..., and resumes where it stopped.
    Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or --evaluate. in front
    (--teacher.model.epochs 10) go to the fits of that phase.

    Args:
        dataset: a data set's name, or a folder of shipped configs (cifar10-part).
        ipc: images per class.
        method: ftd, mtt, or another with teachers.
        teachers: how many; by default as the config says.
        iterations: of the distillation; by default as the config says.
        epochs: of the evaluations; by default as the config says.
        teacher_epochs: of each teacher; by default as many as the distillation reads, 0 for as many as published.
        stop_after: minutes; the same command continues.
        overrides: further options, for the fits.
    """
    sizes: dict[str, Any] = {"teachers": teachers, "iterations": iterations, "epochs": epochs}
    job = plan(dataset, ipc, method, **sizes, teacher_epochs=teacher_epochs, overrides=overrides)
    run_comparison(job, list(job.rows), stop_after)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd reproduce``."""
    reproduce(**parse_command(reproduce, "reproduce", arguments))
