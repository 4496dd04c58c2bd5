"""Records teachers' weights into a trajectory store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from ftd_lightning.data.files import TensorFile, run_folder, write_tensors
from ftd_lightning.data.trajectory_store import OWN_KEYS, TrajectoryStore, teacher_file, write_teacher
from ftd_lightning.errors import InputError
from ftd_lightning.functional.unroll import flatten_parameters
from ftd_lightning.modules.teacher import FlatTeacher

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SNAPSHOT = "snapshot"


class TrajectoryRecorder(Callback):
    """Writes one file a teacher: its weights at initialisation and after every epoch.

    Until a teacher is done its snapshots lie one by one in ``.unfinished/``, so that neither memory nor checkpoints
    grow with them and a resumed run finds those of before. The teacher's file appears whole, at the end of its last
    epoch. Of several processes each writes its own teachers, into one folder that all of them have to see.

    Args:
        path: folder of the store; None is ``trajectories`` beside the logs.
        keep_going: record beside teachers of the same settings that lie there already, as a resumed run does;
            teachers of other settings are always refused.
    """

    def __init__(self, path: str | None = None, keep_going: bool = True) -> None:
        self._path = None if path is None else Path(path)
        self.keep_going = keep_going

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that holds something else."""
        # The first rank's: loggers that count versions may have another name on each.
        self.path = Path(trainer.strategy.broadcast(str(self._path or run_folder(trainer) / "trajectories")))
        if not isinstance(pl_module, FlatTeacher):
            raise InputError(f"TrajectoryRecorder records a FlatTeacher, not a {type(pl_module).__name__}")
        if trainer.is_global_zero and any(self.path.glob("teacher_*.safetensors")):
            present = TrajectoryStore(self.path)
            planned = {"epochs": pl_module.hparams["epochs"], **self._shared(pl_module)}
            different = [key for key, value in planned.items() if present.metadata.get(key) != value]
            if different or not self.keep_going:
                reason = f"recorded with another {', '.join(different)}" if different else "there already"
                raise InputError(f"{self.path}: holds teachers {reason}; name another folder or delete this one")
            rank_zero_info(f"{self.path}: the {len(present)} teachers that are there are kept")

    @staticmethod
    def _shared(module: FlatTeacher) -> dict[str, Any]:
        return {key: value for key, value in module.trajectory_metadata().items() if key not in OWN_KEYS}

    def _file(self, teacher: int, epoch: int) -> Path:
        return self.path / ".unfinished" / f"teacher_{teacher:04d}_epoch_{epoch:04d}.safetensors"

    def _snapshot(self, module: FlatTeacher, epoch: int, accuracy: float | None = None) -> None:
        # flatten_parameters copies: a view of live weights would make all epochs equal on a CPU run.
        weights = {SNAPSHOT: flatten_parameters(module.network)}  # type: ignore[arg-type]
        # With its accuracy, so that nothing is left to remember: Lightning saves the first rank's callbacks alone.
        write_tensors(self._file(module.teacher, epoch), weights, kind=SNAPSHOT, metadata={"accuracy": accuracy})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the initialisation, which the module has drawn by now."""
        assert isinstance(pl_module, FlatTeacher)
        if batch_idx == 0 and pl_module.teacher_epoch == 0 and pl_module.records_teacher:
            self._snapshot(pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch, and the teacher with its last one."""
        assert isinstance(pl_module, FlatTeacher)
        # Not behind the question of who records: what is computed here may be a mean over ranks.
        metrics = trainer.callback_metrics
        if not pl_module.records_teacher:
            return
        # Metrics stay until they are measured again: those of another epoch, or teacher, are not this one's.
        every = trainer.check_val_every_n_epoch
        due = every is not None and (trainer.current_epoch + 1) % every == 0
        name = "val" if trainer.enable_validation else "train"
        value = metrics.get(f"teacher/{name}_accuracy") if due or name == "train" else None
        teacher, epochs = pl_module.teacher, pl_module.teacher_epoch + 1
        self._snapshot(pl_module, epochs, None if value is None else round(float(value), 6))
        if epochs < pl_module.hparams["epochs"]:
            return
        # A run resumed from a checkpoint before the end of this teacher trains it to the same bits again.
        if not teacher_file(self.path, teacher).exists():
            files = [TensorFile(self._file(teacher, epoch), kind=SNAPSHOT) for epoch in range(epochs + 1)]
            accuracies = [file.metadata["accuracy"] for file in files[1:]]
            metadata = {**pl_module.trajectory_metadata(), "accuracies": accuracies}
            write_teacher(self.path, teacher, [file[SNAPSHOT] for file in files], metadata)
        for epoch in range(epochs + 1):
            self._file(teacher, epoch).unlink(missing_ok=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the teachers of all ranks, and clear what other runs may have left of theirs."""
        assert isinstance(pl_module, FlatTeacher)
        trainer.strategy.barrier()
        if trainer.is_global_zero and trainer.current_epoch % pl_module.hparams["epochs"] == 0:
            shutil.rmtree(self.path / ".unfinished", ignore_errors=True)
