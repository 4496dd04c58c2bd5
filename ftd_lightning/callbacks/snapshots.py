"""Snapshots of teachers that are not done yet: one small file per epoch, beside the store's own files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd_lightning.data.files import write_tensors
from ftd_lightning.data.tensor_file import TensorFile
from ftd_lightning.data.trajectory_store import KIND as TEACHER
from ftd_lightning.data.trajectory_store import epoch_name, teacher_file
from ftd_lightning.functional.unroll import flatten_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

KIND = "snapshot"


class Trajectory(Sequence["Tensor"]):
    """The weights of a teacher after each epoch, (P,) each, read from disk one at a time.

    Epochs without a snapshot are those of the teacher's own file: it was recorded, and its fit then continued.

    Args:
        files: of the snapshots 0, 1, ...
        recorded: the teacher's file, which may be missing.

    Attributes:
        accuracies: measured after each epoch, in [0, 1] or None.
    """

    def __init__(self, files: Sequence[Path], recorded: Path) -> None:
        self.files = files
        self._recorded = TensorFile(recorded, kind=TEACHER) if recorded.exists() else None
        self.accuracies = [self._accuracy(epoch) for epoch in range(1, len(files))]

    def _accuracy(self, epoch: int) -> float | None:
        if self._recorded is not None and not self.files[epoch].exists():
            earlier: list[float | None] = self._recorded.metadata["accuracies"]
            return earlier[epoch - 1]
        accuracy: float | None = TensorFile(self.files[epoch], kind=KIND).metadata["accuracy"]
        return accuracy

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, epoch: Any) -> Any:
        if self._recorded is not None and not self.files[epoch].exists():
            return self._recorded[epoch_name(epoch)]
        return TensorFile(self.files[epoch], kind=KIND)[KIND]


class Snapshots:
    """Writes and reads the snapshots of a store, and hands out numbers for teachers.

    Args:
        store: folder of the store; snapshots lie in its folder ``.unfinished``.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.folder = store / ".unfinished"

    def _file(self, teacher: int, epoch: int) -> Path:
        return self.folder / f"teacher_{teacher:04d}_epoch_{epoch:04d}.safetensors"

    def _claim(self, teacher: int) -> Path:
        return self.folder / f"teacher_{teacher:04d}.claim"

    def claim(self) -> int:
        """Take the next number that no teacher has and no other process has claimed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            if not teacher_file(self.store, number).exists() and not self._file(number, 0).exists():
                with suppress(FileExistsError):
                    self._claim(number).touch(exist_ok=False)
                    # Another process may have finished this very teacher between the two looks.
                    if not teacher_file(self.store, number).exists():
                        return number
                    self._claim(number).unlink()
            number += 1

    def write(self, teacher: int, epoch: int, network: nn.Module, accuracy: float | None = None) -> None:
        """Write a network's weights after an epoch, 0 for its initialisation, with the accuracy measured then."""
        # flatten_parameters copies: a view of live weights would make all epochs equal on a CPU run.
        weights = {KIND: flatten_parameters(network)}
        # The accuracy travels with it, because Lightning saves the callbacks' state of the first rank alone.
        write_tensors(self._file(teacher, epoch), weights, kind=KIND, metadata={"accuracy": accuracy})

    def read(self, teacher: int, epochs: int) -> Trajectory:
        """Return the weights of a teacher after epochs 0 .. ``epochs``."""
        files = [self._file(teacher, epoch) for epoch in range(epochs + 1)]
        return Trajectory(files, teacher_file(self.store, teacher))

    def lacking(self, teacher: int, epochs: Iterable[int]) -> list[str]:
        """Name, relative to the store, the snapshots of some epochs of a teacher that are not there."""
        files = (self._file(teacher, epoch) for epoch in epochs)
        return [file.relative_to(self.store).as_posix() for file in files if not file.exists()]

    def clear(self, teacher: int) -> None:
        """Delete the snapshots of a teacher that is in the store, and its claim."""
        for file in self.folder.glob(f"teacher_{teacher:04d}[_.]*"):
            file.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Delete what other runs have left of teachers that are in the store; the folder too, if that empties it."""
        for file in self.store.glob("teacher_*.safetensors"):
            self.clear(int(file.stem.removeprefix("teacher_")))
        with suppress(OSError):
            self.folder.rmdir()
