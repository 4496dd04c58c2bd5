"""The comparison that ``ftd distill`` runs: written by a plan as plain configs, or made of published ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ftd_lightning.data.files import replacing
from ftd_lightning.shipped_configs import read_config
from ftd_lightning.studies.reproduction import averages_images

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ftd_lightning.studies.plan import Plan
    from ftd_lightning.studies.published import Published

NOTES = {
    "teacher": "Teachers of a plan of ftd distill: ftd fit --config {file}",
    "distill": "Distillation of a plan of ftd distill, after its teachers: ftd fit --config {file}",
    "evaluate": "Evaluation of a plan of ftd distill, after its distillation: ftd fit --config {file}",
}


class Source(NamedTuple):
    """Images to distil.

    Attributes:
        name: of the data set, in ``data.datasets.DATASETS``.
        root: folder of its files; None: where data sets lie by default.
        title: for people.
    """

    name: str
    root: str | None
    title: str


def _write(folder: Path, phase: str, content: Mapping[str, Any]) -> str:
    file = folder / f"{phase}.yaml"
    text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None)
    with replacing(file) as part:
        part.write_text(f"# {NOTES[phase].format(file=file)}\n{text}", encoding="utf-8")
    return str(file)


def _comparison(
    source: Source, out: Path, ipc: int, method: str, rows: Mapping[str, Mapping[str, Any]], **rest: Any
) -> dict[str, Any]:
    count = "1 image per class" if ipc == 1 else f"{ipc} images per class"
    random = {"label": f"random real images, {ipc} per class", "synthetic": "random", **rows["random"]}
    learned = {"label": f"{method.upper()}, {ipc} per class", **rows["method"]}
    real = {"label": "all real images", "synthetic": "real", **rows["real"]}
    return {
        "title": f"{source.title}, {count}",
        "dataset": source.name,
        "ipc": ipc,
        "run": str(out),
        "fits": str(out / "fits"),
        "rows": {"random": random, method: learned, "real": real},
        "paired_with": "random",
        **rest,
    }


def planned_configs(plan: Plan, source: Source, out: Path, *, ipc: int, method: str, seed: int) -> dict[str, Any]:
    """Write the configs of a plan into ``out/configs``; return the comparison of them.

    Args:
        plan: what is run.
        source: the images.
        out: the folder of the job.
        ipc: images per class.
        method: "ftd" or "mtt".
        seed: of everything that is drawn.
    """
    data: dict[str, Any] = {"dataset": source.name, **({"root": source.root} if source.root else {})}
    data |= {"image_size": plan.image_size, "val_fraction": plan.val_fraction, "batch_size": plan.batch_size}
    data |= {"seed": seed}
    part = {} if plan.max_per_class is None else {"max_per_class": plan.max_per_class}
    options, augment = {"width": plan.width, "depth": plan.depth}, {"strategy": plan.augment}

    def config(model: str, settings: dict[str, Any], images: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
        return {
            "seed_everything": seed % 2**32,
            "model": {"class_path": f"ftd_lightning.{model}", "init_args": {**settings, "seed": seed}},
            "data": {"class_path": "ftd_lightning.DistillationDataModule", "init_args": images},
            "trainer": trainer,
        }

    teacher = {"network_options": options, "teachers": plan.teachers, "epochs": plan.epochs, "lr": plan.lr}
    matching = {
        "trajectories": "runs/teacher/trajectories",
        "ipc": ipc,
        "syn_steps": plan.syn_steps,
        "expert_epochs": plan.expert_epochs,
        "max_start_epoch": plan.max_start_epoch,
        "syn_batch": plan.syn_batch,
        "lr_images": plan.lr_images,
        "lr_step_size": 1e-4 if plan.lr > 0.01 else 1e-5,
        "step_size_init": plan.lr,
        "augment": augment,
        "iterations_per_epoch": plan.iterations_per_epoch,
    }
    average = {"class_path": "ftd_lightning.callbacks.SyntheticEMA", "init_args": {"decay": plan.decay}}
    learning: dict[str, Any] = {"max_steps": plan.iterations, **({"callbacks": [average]} if method == "ftd" else {})}
    epochs = plan.evaluation_epochs
    evaluation = {"network_options": options, "networks": plan.networks, "augment": augment, "measure_every": epochs}
    folder = out / "configs"
    files = {
        "teacher": config(
            "FlatTeacher", {**teacher, "rho": plan.rho, "augment": augment}, {**data, **part}, {"max_epochs": -1}
        ),
        "distill": config("TrajectoryMatching", matching, {**data, **part}, learning),
        "evaluate": config(
            "SyntheticEvaluation",
            evaluation,
            {**data, "synthetic": "runs/distill/set.safetensors"},
            {"max_epochs": epochs},
        ),
    }
    written = {phase: _write(folder, phase, content) for phase, content in files.items()}
    on_real = ["--trainer.max_epochs", plan.real_epochs, "--model.measure_every", plan.real_epochs]
    real: dict[str, Any] = {"evaluate_arguments": on_real}
    if plan.real_per_class is not None:
        on_real += ["--data.max_per_class", plan.real_per_class]
        real["label"] = f"real images, {plan.real_per_class} per class"
    rows: dict[str, dict[str, Any]] = {
        "random": {},
        "method": {"distill": written["distill"], "teachers": method, "ema": method == "ftd"},
        "real": real,
    }
    return _comparison(
        source, out, ipc, method, rows, teachers={method: written["teacher"]}, evaluate=written["evaluate"]
    )


def published_configs(configs: Published, source: Source, out: Path, *, ipc: int, method: str) -> dict[str, Any]:
    """Make a comparison of published configs.

    Args:
        configs: those that belong together.
        source: the images.
        out: the folder of the job.
        ipc: images per class.
        method: its name.
    """
    zca = read_config(configs.distill)["data"]["init_args"].get("zca", False)
    real = ["--data.zca", zca]
    learned: dict[str, Any] = {
        "distill": str(configs.distill),
        "distill_arguments": list(configs.ipc),
        "ema": averages_images(configs.distill),
    }
    teachers = {"teachers": {method: str(configs.teacher)}} if configs.teacher else {}
    rows = {
        "random": {"evaluate_arguments": real},
        "method": {**learned, **({"teachers": method} if teachers else {})},
        "real": {"evaluate_arguments": [*real, "--trainer.max_epochs", 60, "--model.measure_every", 10]},
    }
    arguments = [*configs.arguments, *(["--data.root", source.root] if source.root else [])]
    evaluate = str(configs.evaluate)
    return _comparison(source, out, ipc, method, rows, evaluate=evaluate, arguments=arguments, **teachers)
