"""The trajectory store: a folder with one safetensors file a teacher and one tensor an epoch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ftd_lightning.data.files import TensorFile, write_tensors
from ftd_lightning.errors import DivergenceError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

KIND = "teacher_trajectory"
# What every teacher of a store shares; the rest (seed, accuracies) is each one's own.
OWN_KEYS = ("teacher", "seed", "accuracies", "versions", "kind", "format")


class Segment(NamedTuple):
    """Where a teacher stood at the start of a segment and m epochs later: theta*_t and theta*_{t+m}, (P,) each."""

    start: Tensor
    target: Tensor


def _epoch_name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def teacher_file(folder: str | Path, teacher: int) -> Path:
    """Name the file of a teacher."""
    return Path(folder) / f"teacher_{teacher:04d}.safetensors"


class TrajectoryStore:
    """Recorded teachers, read segment by segment.

    Files are opened for a read and closed after it, so memory does not grow with the number of teachers.

    Convention: epoch 0 is the initialisation; a teacher of E epochs has E + 1 entries. Weights are in the order of
    ``network.parameters()``.

    Args:
        path: the folder. Each ``teacher_NNNN.safetensors`` in it holds ``epoch_0000`` .. ``epoch_EEEE``, (P,) each.

    Attributes:
        path: the folder.
        files: the teachers' files, in order.
        metadata: what all teachers share: network, data set, transform, optimizer, rho, alpha, adaptive, epochs.

    Raises:
        InputError: for a folder that is missing or empty, a truncated or foreign file, or teachers that do not belong
            together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = sorted(self.path.glob("teacher_*.safetensors"))
        if not self.files:
            raise InputError(
                f"{self.path}: no teachers here; record some first (ftd fit with FlatTeacher and a TrajectoryRecorder)"
            )
        self.metadata = self._shared(TensorFile(self.files[0], kind=KIND))
        for file in self.files[1:]:
            other = self._shared(TensorFile(file, kind=KIND))
            different = sorted(key for key in {*self.metadata, *other} if other.get(key) != self.metadata.get(key))
            if different:
                raise InputError(
                    f"{file}: differs from {self.files[0].name} in {', '.join(different)}; keep such teachers apart"
                )

    @staticmethod
    def _shared(file: TensorFile) -> dict[str, Any]:
        if _epoch_name(file.metadata.get("epochs", -1)) not in file.names:
            raise InputError(f"{file.path}: does not hold the epochs that it names; record this teacher again")
        shared = {key: value for key, value in file.metadata.items() if key not in OWN_KEYS}
        return {**shared, "parameters": file.numel(_epoch_name(0))}

    def __len__(self) -> int:
        return len(self.files)

    @property
    def epochs(self) -> int:
        """Epochs recorded of every teacher, the initialisation not counted."""
        return int(self.metadata["epochs"])

    @property
    def num_parameters(self) -> int:
        """P."""
        return int(self.metadata["parameters"])

    def teacher_metadata(self, teacher: int) -> dict[str, Any]:
        """Everything one teacher's file says, its seed and accuracies included."""
        return self._file(teacher).metadata

    def _file(self, teacher: int) -> TensorFile:
        if not 0 <= teacher < len(self):
            raise InputError(f"{self.path}: teacher {teacher} is asked for, 0 to {len(self) - 1} are recorded")
        return TensorFile(self.files[teacher], kind=KIND)

    def segment(self, teacher: int, start_epoch: int, expert_epochs: int) -> Segment:
        """Read the two ends of a segment and nothing else.

        Args:
            teacher: index, 0 <= teacher < len(store).
            start_epoch: t, >= 0.
            expert_epochs: m; t + m is at most ``epochs``.

        Raises:
            InputError: for what was not recorded, or a file that broke since the store was opened.
        """
        if start_epoch < 0 or expert_epochs < 1 or start_epoch + expert_epochs > self.epochs:
            raise InputError(
                f"{self.path}: epochs {start_epoch} to {start_epoch + expert_epochs} are asked for, 0 to {self.epochs} "
                "are recorded"
            )
        file = self._file(teacher)
        return Segment(file[_epoch_name(start_epoch)], file[_epoch_name(start_epoch + expert_epochs)])

    def trajectory(self, teacher: int) -> Tensor:
        """Read a whole teacher: (epochs + 1, P)."""
        file = self._file(teacher)
        return torch.stack([file[_epoch_name(epoch)] for epoch in range(self.epochs + 1)])


def write_teacher(folder: str | Path, teacher: int, snapshots: Sequence[Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write one teacher's file, atomically.

    Args:
        folder: of the store; made where it is missing.
        teacher: its number.
        snapshots: weights at initialisation and after every epoch, (P,) each.
        metadata: what the store says of it; "epochs" and "teacher" are added.

    Returns:
        The file.

    Raises:
        DivergenceError: if an epoch is not finite, or equal to the one before: such a trajectory matches nothing.
    """
    for epoch, (before, after) in enumerate(itertools.pairwise(snapshots)):
        if torch.equal(before, after):
            raise DivergenceError(
                f"teacher {teacher}: epochs {epoch} and {epoch + 1} left the same weights; raise its lr"
            )
    if not all(bool(torch.isfinite(s).all()) for s in snapshots):
        raise DivergenceError(f"teacher {teacher} diverged, its weights are not finite; lower its lr")
    path = teacher_file(folder, teacher)
    tensors = {_epoch_name(epoch): snapshot for epoch, snapshot in enumerate(snapshots)}
    write_tensors(path, tensors, kind=KIND, metadata={**metadata, "teacher": teacher, "epochs": len(snapshots) - 1})
    return path


def check_compatible(store: TrajectoryStore, wanted: Mapping[str, Any]) -> None:
    """Refuse teachers of another network, data set or transform than the distillation asks for.

    Args:
        store: the teachers.
        wanted: metadata keys and the values that they must have.

    Raises:
        InputError: naming the first difference.
    """
    for key, value in wanted.items():
        if store.metadata.get(key) != value:
            raise InputError(
                f"{store.path}: its teachers have {key} {store.metadata.get(key)}, but {value} is asked for; "
                "change the setting or record other teachers"
            )
