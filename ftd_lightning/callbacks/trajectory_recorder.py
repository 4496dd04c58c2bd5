"""Records teachers: one file for each, with its weights at initialisation and after every epoch."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from ftd_lightning.contracts import DataSource, LearnsSet, PlansBatches, TrainsTeachers, data_source
from ftd_lightning.core.module import run_folder
from ftd_lightning.core.resume import fix_loop_progress
from ftd_lightning.errors import InputError
from ftd_lightning.files import trajectory_store as stores
from ftd_lightning.files.safetensors_io import TensorFile, versions, write_tensors
from ftd_lightning.functional.unroll import flatten_parameters
from ftd_lightning.models.description import describe_network

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from ftd_lightning.contracts import DataDescription, TeacherProgress

FEWEST = 32  # images; 1 in 100 batches of 16 photographs of one class, unshuffled, deviates more than TOLERANCE
SAMPLED = 1000  # described images whose pixels are measured
TOLERANCE = 0.6  # pixels in [0, 1] have a standard deviation of at most 0.5, standardised ones of about 1
WIDEST = 10  # times the standard deviation; augmentation, such as inversion, may double it; [0, 255] is another range


def check_first_batch(batch: Any, described: DataSource) -> None:
    """Refuse a training batch of another shape or range of pixels than described; warn of another mean or deviation.

    This tells images in [0, 1], or in [0, 255], from standardised ones. A batch without a tensor (N, C, H, W) passes.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    images = next((part.detach() for part in parts if isinstance(part, Tensor) and part.ndim == 4), None)
    if images is None:
        return
    shape, found = tuple(described.description().shape.zeros(0).shape[1:]), tuple(images.shape[1:])
    refused, differs = shape != found, f"of shape {shape}, but the first training batch has {found}"
    if not refused:
        known = described.part("train").images
        known = known[:: -(-len(known) // SAMPLED)]
        (mean, std), (wanted, spread) = ((float(x.float().mean()), float(x.float().std())) for x in (images, known))
        refused = not TOLERANCE * spread < std < WIDEST * spread
        if len(images) < FEWEST or not (refused or std > spread / TOLERANCE or abs(mean - wanted) > TOLERANCE * spread):
            return
        differs = (
            f"whose pixels have mean {wanted:.2f} and standard deviation {spread:.2f}, but the first training batch "
            f"has {mean:.2f} and {std:.2f}"
        )
    problem = f"TrajectoryRecorder: data= describes images {differs}"
    if refused:
        raise InputError(f"{problem}: give data= that describes the loader's images, or only a name for them")
    rank_zero_warn(f"{problem}: if this is not its augmentation, give data= that describes the loader's images")


SNAPSHOT = "snapshot"  # the kind of a snapshot's file, and the name of its tensor


class Snapshots:
    """Snapshots of unfinished teachers, a small file per epoch in ``.unfinished`` of a store, and their numbers."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.folder = store / ".unfinished"

    def _file(self, teacher: int, epoch: int) -> Path:
        return self.folder / f"teacher_{teacher:04d}_epoch_{epoch:04d}.safetensors"

    def claim(self) -> int:
        """Take the next number that no teacher has and no other process has claimed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            claim = self.folder / f"teacher_{number:04d}.claim"
            if not stores.teacher_file(self.store, number).exists() and not self._file(number, 0).exists():
                with suppress(FileExistsError):
                    claim.touch(exist_ok=False)
                    return number
            number += 1

    def write(self, teacher: int, epoch: int, network: nn.Module, accuracy: float | None = None) -> None:
        """Write a network's weights after an epoch, 0 for its initialisation, with the accuracy measured then."""
        # flatten_parameters copies: a view of live weights would make all epochs equal on a CPU run. The accuracy is
        # not part of a checkpoint, because Lightning saves the callbacks' state of the first rank only.
        weights = {SNAPSHOT: flatten_parameters(network)}
        write_tensors(self._file(teacher, epoch), weights, kind=SNAPSHOT, metadata={"accuracy": accuracy})

    def read(self, teacher: int, epochs: int) -> tuple[list[Tensor], list[float | None]]:
        """Map the weights of a teacher after epochs 0 .. ``epochs``, (P,) each; give the accuracies from epoch 1 on."""
        weights, accuracies = [], []
        for epoch in range(epochs + 1):
            if (path := self._file(teacher, epoch)).exists():
                file, name = TensorFile(path, kind=SNAPSHOT), SNAPSHOT
                accuracies.append(file.metadata["accuracy"])
            else:  # the teacher was recorded, and its fit then continued
                file = TensorFile(stores.teacher_file(self.store, teacher), kind=stores.KIND)
                name = stores.epoch_name(epoch)
                accuracies.append(file.metadata["accuracies"][epoch - 1] if epoch else None)
            weights.append(file[name])
        return weights, accuracies[1:]

    def clear(self, teacher: int) -> None:
        """Delete the snapshots of a teacher that is in the store, and its claim."""
        for file in self.folder.glob(f"teacher_{teacher:04d}[_.]*"):
            file.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Delete leftovers of other runs for teachers that are in the store, and the folder once it is empty."""
        for file in self.store.glob("teacher_*.safetensors"):
            self.clear(int(file.stem.removeprefix("teacher_")))
        with suppress(OSError):
            self.folder.rmdir()


FOREIGN = "mtm"  # the method of teachers that another module than FlatTeacher trained


class TrajectoryRecorder(Callback):
    """Writes one file per teacher: its weights at initialisation and after every epoch.

    With a ``FlatTeacher`` every teacher of the fit is recorded, under its number. Any other LightningModule is one
    teacher per fit, under the next free number of the folder. Modules of this library that train no teachers are left
    alone. All processes write into one folder.

    Snapshots of unfinished teachers lie in ``.unfinished/``, so that neither memory nor checkpoints grow with them. The
    teacher's file appears whole at the end of its last epoch, or when an EarlyStopping ends it. An epoch that a limit
    of the trainer cuts short is not recorded; epochs that are short on purpose (``limit_train_batches``) are, with
    ``batches_per_epoch`` in the metadata. A fit whose teachers are all recorded already is refused.

    Args:
        path: folder of the store; None is ``trajectories`` beside the logs.
        keep_going: record beside teachers of the same settings, as a resumed run does; teachers of other settings are
            always refused.
        data: the teachers' training data, where the trainer's datamodule does not describe them: a name, or a
            ``DistillationDataModule``, with whose images the first training batch is compared. Teachers of data that is
            neither named nor fingerprinted join no store.
        network: name of the submodule to record, as in ``get_submodule``: "net" or "model.backbone"; None: "network",
            or all parameters of a module without one.
        monitor: name of the metric to record as accuracy, in [0, 1], after every epoch that measured it, logged in a
            step or at the end of validation (``on_train_epoch_end`` of a module is too late); None: ``FlatTeacher``'s.
    """

    def __init__(
        self,
        path: str | None = None,
        keep_going: bool = True,
        data: str | DataSource | None = None,
        network: str | None = None,
        monitor: str | None = None,
    ) -> None:
        if not isinstance(data, str | None) and data_source(data) is None:
            raise InputError(
                f"TrajectoryRecorder: data= is a {type(data).__name__}: give a name, or wrap it with "
                "DistillationDataModule.from_datamodule"
            )
        self._path = None if path is None else Path(path).expanduser()
        self.keep_going = keep_going
        self.data = data
        self.network = network
        self.monitor = monitor
        self._token = uuid.uuid4().hex  # names this recorder's unnamed data; part of checkpoints
        self._claimed: int | None = None
        self._first_epoch = 0  # the trainer's epoch in which the claimed teacher begins
        self._open: tuple[int, int] | None = None  # an unfinished teacher, and the epochs it has had
        self._resumed = False
        self._measured: Tensor | None = None  # the last accuracy
        self._unchecked: DataSource | None = None  # describes batches, the first of which has not been compared yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; this run's checkpoint is loaded later."""
        self._resumed, self._claimed, self._open = False, None, None
        # The first rank's: loggers that count versions may have another name on each.
        self.path = Path(trainer.strategy.broadcast(str(self._path or run_folder(trainer) / "trajectories")))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that holds other teachers, or all teachers of this fit."""
        self._active = isinstance(pl_module, TrainsTeachers) or not isinstance(pl_module, (LearnsSet, PlansBatches))
        self._active = self._active and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self._active:
            return
        self._token = trainer.strategy.broadcast(self._token)
        self._snapshots = Snapshots(self.path)
        described = data_source(trainer.datamodule) is not None  # type: ignore[attr-defined]
        self._unchecked = None if described else data_source(self.data)
        if self._unchecked is not None:
            self._unchecked.part("train")  # sets it up: before that, nothing is known of a whitening
        halves = {weight.dtype for weight in self._network(pl_module).parameters()} - {torch.float32, torch.float64}
        if halves and not isinstance(pl_module, TrainsTeachers):  # FlatTeacher refuses trainer.precision itself
            raise InputError(f"TrajectoryRecorder: {halves.pop()} weights hide small steps: use bf16-mixed or 32-true")
        if any(self.path.glob("teacher_*.safetensors")):  # on every rank, so that none waits for one that refuses
            self._refuse_other_teachers(stores.TrajectoryStore(self.path), self._metadata(trainer, pl_module))
            if isinstance(pl_module, TrainsTeachers) and not trainer.should_stop:
                self._refuse_recorded(pl_module)

    def _recorded(self, teacher: int) -> dict[str, Any]:
        file = stores.teacher_file(self.path, teacher)
        return TensorFile(file, kind=stores.KIND).metadata if file.exists() else {"epochs": -1}

    def _complete(self, plan: TeacherProgress) -> int:
        """Count the teachers of the fit that are recorded with all their epochs."""
        return sum(self._recorded(teacher)["epochs"] >= plan.epochs for teacher in range(plan.teachers))

    def _refuse_other_teachers(self, present: stores.TrajectoryStore, planned: dict[str, Any]) -> None:
        different = stores.differences(present.metadata, planned)
        if "unnamed" in planned["dataset"] and "dataset" in different:
            raise InputError(
                f"{self.path}: holds teachers already, and data without name and fingerprint joins no store: "
                "name another folder, give TrajectoryRecorder(data=...), or fit with a DistillationDataModule"
            )
        if different or not self.keep_going:
            reason = f"recorded with another {', '.join(different)}" if different else "already"
            raise InputError(f"{self.path}: holds teachers {reason}; name another folder or delete this one")
        rank_zero_info(f"{self.path}: teachers recorded earlier are kept: {len(present)}")

    def _refuse_recorded(self, module: TrainsTeachers) -> None:
        """Refuse teachers of another seed, which would be kept instead of the new ones, and a fit of nothing new."""
        plan = module.teacher_progress()
        if self._recorded(plan.teacher).get("seed") not in (None, module.trajectory_metadata()["seed"]):
            file = stores.teacher_file(self.path, plan.teacher)
            raise InputError(f"{file}: recorded with another seed; name another folder or delete this one")
        if not self._resumed and self._complete(plan) == plan.teachers:
            raise InputError(
                f"{self.path}: holds all {plan.teachers} teachers of {plan.epochs} epochs already; resume with "
                "ckpt_path and a larger number, or name another folder"
            )

    def _description(self, trainer: Trainer, module: LightningModule) -> DataDescription | None:
        described = module.data if isinstance(module, TrainsTeachers) else None
        source = data_source(trainer.datamodule) or data_source(self.data)  # type: ignore[attr-defined]
        return described or (None if source is None else source.description())

    def _metadata(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return the metadata of the current teacher."""
        if (description := self._description(trainer, module)) is not None:
            data = description.metadata()
        else:
            named = {"name": self.data} if isinstance(self.data, str) else {"unnamed": self._token}
            data = {"dataset": named, "transform": None}
        data["precision"] = str(trainer.precision)
        if isinstance(module, TrainsTeachers):
            return {**module.trajectory_metadata(), **data}
        return {
            "method": FOREIGN,
            "network": describe_network(self._network(module)),
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "optimizer": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers),
            "versions": versions(),
            **data,
        }

    def _network(self, module: LightningModule) -> nn.Module:
        children = dict(module.named_children())
        if self.network is None:
            return children.get("network", module)
        try:
            return module.get_submodule(self.network)
        except AttributeError:
            raise InputError(
                f"TrajectoryRecorder: network={self.network!r} is no submodule of {type(module).__name__}, which has "
                f"{', '.join(children)}"
            ) from None

    def _teacher(self, trainer: Trainer, module: LightningModule) -> tuple[int, int, int | None, bool]:
        """Return number and epoch of the current teacher, its planned length, and whether this process writes it."""
        if isinstance(module, TrainsTeachers):
            number, epoch, epochs, _, records = module.teacher_progress()
            return number, epoch, epochs, records
        if not trainer.is_global_zero:
            return 0, 0, None, False
        if self._claimed is None:
            self._claimed, self._first_epoch = self._snapshots.claim(), trainer.current_epoch
        return self._claimed, trainer.current_epoch - self._first_epoch, None, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the first batch with its description; record the initialisation, drawn by now."""
        if self._active and self._unchecked is not None:
            described, self._unchecked = self._unchecked, None
            check_first_batch(batch, described)
        if not self._active or batch_idx:
            return
        teacher, epoch, _, records = self._teacher(trainer, pl_module)
        if epoch == 0 and records:
            self._snapshots.write(teacher, 0, self._network(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch, and the teacher after its last one."""
        if not self._active:
            return
        metrics = trainer.callback_metrics  # on every rank, because metrics may be means over ranks
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        teacher, epoch, epochs, records = self._teacher(trainer, pl_module)
        if not records:
            return
        # Metrics stay until they are measured again: a value of another epoch, or teacher, is not this one's.
        name = self.monitor or f"teacher/{'val' if trainer.enable_validation else 'train'}_accuracy"
        value, before = metrics.get(name), self._measured
        self._measured = value
        accuracy = None if value is None or value is before else round(float(value), 6)
        if accuracy is not None and not 0 <= accuracy <= 1:
            raise InputError(f"TrajectoryRecorder: monitor={name!r} is {accuracy:g}, an accuracy in [0, 1] is needed")
        self._snapshots.write(teacher, epoch + 1, self._network(pl_module), accuracy)
        self._open = (teacher, epoch + 1)
        if epoch + 1 == epochs:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the open teacher, and clear its snapshots."""
        assert self._open is not None
        (teacher, epochs), self._open = self._open, None
        # A run resumed from a checkpoint before the end of this teacher trains it to the same bits again.
        if epochs > self._recorded(teacher)["epochs"]:
            weights, accuracies = self._snapshots.read(teacher, epochs)
            metadata = {**self._metadata(trainer, module), "accuracies": accuracies}
            if self.monitor and accuracies.count(None) == epochs:
                logged = ", ".join(sorted(trainer.callback_metrics))
                rank_zero_warn(f"TrajectoryRecorder: monitor={self.monitor!r} was not logged; logged are {logged}")
            if trainer.limit_train_batches not in (None, 1.0):
                metadata["batches_per_epoch"] = int(trainer.num_training_batches)
            if (description := self._description(trainer, module)) is not None:
                stores.write_store_data(self.path, description)
            stores.write_teacher(self.path, teacher, weights, metadata)
        self._snapshots.clear(teacher)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a teacher that ends with the fit; wait for all ranks; report the recorded teachers."""
        if not self._active:
            return
        # Lightning does not tell who asked to stop; a time limit leaves this at 0.
        stopped = any(callback.stopped_epoch > 0 for callback in trainer.early_stopping_callbacks)
        if self._open is not None and (stopped or not isinstance(pl_module, TrainsTeachers)):
            self._finish(trainer, pl_module)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._snapshots.tidy()
        if isinstance(pl_module, TrainsTeachers):
            plan = pl_module.teacher_progress()
            if (complete := self._complete(plan)) < plan.teachers:
                rank_zero_warn(
                    f"{self.path}: {complete} of {plan.teachers} teachers of {plan.epochs} epochs are recorded: "
                    "the fit ended early; resume it with ckpt_path for the rest"
                )
        if trainer.is_global_zero and any(self.path.glob("teacher_*.safetensors")):
            rank_zero_info(f"wrote {self.path}: {stores.summary(self.path)}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the teacher of a foreign module that was killed after its last epoch, where no training ends."""
        if self._active and self._open is not None and not isinstance(pl_module, TrainsTeachers):
            self._finish(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a foreign module's fit resume exactly too."""
        fix_loop_progress(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Keep which teacher is being recorded."""
        state = {"claimed": self._claimed, "first_epoch": self._first_epoch}
        return {**state, "open": self._open, "token": self._token}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the same teacher."""
        self._claimed, self._first_epoch = state_dict["claimed"], state_dict["first_epoch"]
        self._open, self._token, self._resumed = state_dict["open"], state_dict["token"], True
