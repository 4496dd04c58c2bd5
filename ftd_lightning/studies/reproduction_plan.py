"""What a reproduction consists of: a cell of the paper's tables as configs, settings, folders and fits."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftd_lightning.data import SyntheticSet, TrajectoryStore
from ftd_lightning.data.json_files import write_json
from ftd_lightning.data.store_data import store_data_file
from ftd_lightning.data.trajectory_store import teacher_file
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.studies.fit_steps import FitStep
from ftd_lightning.studies.resolved_configs import CONFIGS, PHASES, arguments_by_phase, identity, resolved, suffix

if TYPE_CHECKING:
    from collections.abc import Sequence


class Cell(NamedTuple):
    """A cell of the paper's tables, and how much of its published size is run; None is all of it.

    Attributes:
        dataset: a folder of configs.
        ipc: images per class.
        method: of ``configs/DATASET/distill_METHOD_ipcN.yaml``.
        teachers: how many.
        iterations: of the distillation.
        epochs: of the evaluations.
    """

    dataset: str = "cifar10"
    ipc: int = 10
    method: str = "ftd"
    teachers: int | None = None
    iterations: int | None = None
    epochs: int | None = None


@dataclass
class Reproduction:
    """What a command asks for, and where it lies."""

    cell: Cell
    arguments: dict[str, list[str]]
    configs: dict[str, Path]
    settings: dict[str, dict[str, Any]]  # resolved, a phase
    published: dict[str, int]  # teachers, iterations and epochs of the configs as they are
    teachers: int
    iterations: int
    epochs: int
    teacher_folder: Path
    folder: Path

    def teacher_step(self) -> FitStep:
        """The fit of the teachers; runs that want the same ones share it."""
        store = self.teacher_folder / "trajectories"

        def finished() -> bool:
            return all(teacher_file(store, index).is_file() for index in range(self.teachers))

        arguments = (*self.arguments["teacher"], "--model.teachers", str(self.teachers))
        title = f"{self.teachers} teachers"
        return FitStep(title, self.configs["teacher"], self.teacher_folder, arguments, finished, self.teachers)

    def distill_step(self) -> FitStep:
        """The distillation."""
        file = self.folder / "distill" / "set.safetensors"

        def finished() -> bool:
            return file.is_file() and SyntheticSet.load(file).metadata["iterations"] >= self.iterations

        arguments = (*self.arguments["distill"], "--model.trajectories", str(self.folder / "trajectories"))
        arguments += ("--trainer.max_steps", str(self.iterations))
        title = f"distillation, {self.iterations} iterations"
        return FitStep(title, self.configs["distill"], file.parent, arguments, finished, self.iterations)

    def evaluation_step(self, iterate: str, images: str) -> FitStep:
        """The evaluation of raw or averaged images, of the last iterate or the one chosen on held-out images."""
        file = self.folder / "distill" / {"last": "set.safetensors", "chosen": "best.safetensors"}[iterate]
        folder = self.folder / f"evaluate_{images}_{iterate}"
        arguments = (
            *self.arguments["evaluate"],
            "--data.synthetic",
            str(file),
            "--data.ema",
            str(images == "ema").lower(),
        )
        arguments += ("--trainer.max_epochs", str(self.epochs))
        title = f"evaluation of {images} images, {iterate}"
        done = (folder / "evaluation.json").is_file
        return FitStep(title, self.configs["evaluate"], folder, arguments, done, self.epochs)

    def evaluations(self) -> dict[tuple[str, str], FitStep]:
        """Evaluations of what the distillation made, by (images, iterate); two of the same images are one."""
        last, best = (self.folder / "distill" / f"{name}.safetensors" for name in ("set", "best"))
        synthetic = SyntheticSet.load(last)
        same = best.is_file() and (SyntheticSet.load(best).metadata["iterations"] == synthetic.metadata["iterations"])
        steps = {}
        for images in ("raw", "ema") if synthetic.ema_images is not None else ("raw",):
            steps[images, "last"] = self.evaluation_step("last", images)
            if best.is_file():
                steps[images, "chosen"] = steps[images, "last"] if same else self.evaluation_step("chosen", images)
        return steps

    def link_teachers(self) -> None:
        """Give the distillation a store of just the teachers that it wants: the shared one may hold more.

        Raises:
            InputError: for teachers that another command recorded with other settings.
        """
        store, settings = TrajectoryStore(self.teacher_folder / "trajectories"), self.settings["teacher"]["model"]
        wanted = settings["init_args"]
        keys = ("rho", "alpha", "adaptive", "lr", "momentum", "weight_decay")
        pairs: dict[str, tuple[Any, Any]] = {"epochs": (store.epochs, wanted["epochs"])}
        pairs |= {key: (store.metadata.get(key), wanted[key]) for key in keys}
        pairs["seed"] = (store.teacher_metadata(0).get("seed"), derive_seed(wanted["seed"], "teacher", 0))
        network = store.metadata.get("network", {})
        pairs["network_options"] = (network.get("options"), wanted.get("network_options") or {})
        for key, (recorded, asked) in pairs.items():
            if recorded != asked:
                raise InputError(
                    f"{store.path}: its teachers have {key} {recorded}, {asked} is asked for; move them away"
                )
        own = self.folder / "trajectories"
        own.mkdir(parents=True, exist_ok=True)
        for file in (*store.files[: self.teachers], store_data_file(store.path)):
            link = own / file.name
            if file.is_file() and not link.is_symlink():
                link.symlink_to(os.path.relpath(file, own))

    def check_settings(self) -> None:
        """Remember the settings of a run's folder; refuse to go on there with others.

        Raises:
            InputError: for a folder that was begun with other settings: a config has changed since.
        """
        file = self.folder / "settings.json"
        now = {f"{phase}.{key}": v for phase in PHASES for key, v in identity(self.settings[phase]).items()}
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
        changed = sorted(key for key in {*now} & {*before} if now[key] != before[key])
        if changed:
            raise InputError(f"{self.folder}: was begun with another {', '.join(changed)}; move it away to begin anew")
        write_json(file, now, indent=1)


def plan(cell: Cell, overrides: Sequence[str] = ()) -> Reproduction:
    """Find configs, settings and folders for a command.

    Args:
        cell: what to reproduce.
        overrides: options for the fits.

    Raises:
        InputError: for configs that do not exist, or numbers below 1.
    """
    counts = {"teachers": cell.teachers, "iterations": cell.iterations, "epochs": cell.epochs}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    arguments, folder = arguments_by_phase(overrides), CONFIGS / cell.dataset
    configs = {"distill": folder / f"distill_{cell.method}_ipc{cell.ipc}.yaml"}
    distill = resolved(configs["distill"])
    trajectories = distill["model"]["init_args"].get("trajectories")
    if trajectories is None:
        raise InputError(f"{configs['distill']}: its method has no teachers; ftd reproduce is for those that do")
    store = Path(trajectories)  # runs/DATASET/TEACHER/trajectories
    configs |= {"teacher": folder / f"{store.parent.name}.yaml", "evaluate": folder / "evaluate.yaml"}
    plain = {phase: distill if phase == "distill" else resolved(configs[phase]) for phase in PHASES}
    full = {phase: resolved(configs[phase], arguments[phase]) if arguments[phase] else plain[phase] for phase in PHASES}

    def sizes(settings: dict[str, dict[str, Any]]) -> tuple[int, int, int]:
        teachers = settings["teacher"]["model"]["init_args"]["teachers"]
        return teachers, settings["distill"]["trainer"]["max_steps"], settings["evaluate"]["trainer"]["max_epochs"]

    def changes(phase: str) -> dict[str, Any]:
        old, new = identity(plain[phase]), identity(full[phase])
        return {key: value for key, value in new.items() if old.get(key) != value}

    published = dict(zip(counts, sizes(plain), strict=True))
    asked = dict(zip(counts, sizes(full), strict=True)) | {key: v for key, v in counts.items() if v is not None}
    name = f"reproduce_{cell.method}_ipc{cell.ipc}_{asked['teachers']}teachers"
    if asked["iterations"] != published["iterations"]:
        name += f"_{asked['iterations']}iterations"
    if asked["epochs"] != published["epochs"]:
        name += f"_evaluated{asked['epochs']}epochs"
    name += suffix({f"{phase}.{key}": value for phase in PHASES for key, value in changes(phase).items()})
    root, teacher = store.parent.parent, store.parent.name + suffix(changes("teacher"))
    return Reproduction(cell, arguments, configs, full, published, **asked, teacher_folder=root / teacher,
                        folder=root / name)  # fmt: skip
