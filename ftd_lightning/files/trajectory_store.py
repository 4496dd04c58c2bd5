"""The trajectory store: recorded teachers, one file each, and a file that describes their training images."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors
from ftd_lightning.files.schema import STORE_METADATA, TEACHER_METADATA, check_finite, check_metadata, refuse
from ftd_lightning.files.transforms import load_transform
from ftd_lightning.models.description import same_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


KIND = "teacher_trajectory"
DATA_KIND = "trajectory_data"
PREFIX = "transform."  # of the names of the transform's tensors
# What each teacher of a store has for itself; the rest is shared.
OWN_KEYS = ("teacher", "seed", "accuracies", "epochs", "versions", "kind", "format")
# What earlier versions did not record, and what is derived: a record without such a key contradicts none with it.
OPTIONAL_KEYS = ("method", "batches_per_epoch", "parameters", "precision")
DATA_KEYS = ("dataset", "transform")


def teacher_file(folder: str | Path, teacher: int) -> Path:
    """Name the file of a teacher."""
    return Path(folder).expanduser() / f"teacher_{teacher:04d}.safetensors"


def epoch_name(epoch: int) -> str:
    """Name the tensor of an epoch in a teacher's file."""
    return f"epoch_{epoch:04d}"


def store_data_file(folder: str | Path) -> Path:
    """Name the file that describes the images, beside the teachers'."""
    return Path(folder).expanduser() / "data.safetensors"


def write_store_data(folder: str | Path, description: DataDescription) -> None:
    """Describe the teachers' training images, atomically, unless the file describes the same images already."""
    path = store_data_file(folder)
    shape, names = description.shape._asdict(), list(description.class_names)
    metadata = {**description.metadata(), "class_names": names, "shape": shape}
    if path.is_file() and not differences(TensorFile(path, kind=DATA_KIND).metadata, metadata):
        return
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in description.transform.tensors().items()}
    write_tensors(path, tensors, kind=DATA_KIND, metadata=metadata)


def load_store_data(path: Path) -> DataDescription:
    """Read the description of a store's images."""
    file = TensorFile(path, kind=DATA_KIND)
    metadata = file.metadata
    check_metadata(metadata, STORE_METADATA, path, required=("shape", "class_names", "transform", "dataset"))
    return DataDescription(
        shape=ImageShape.of(metadata["shape"]),
        class_names=metadata["class_names"],
        transform=load_transform(metadata["transform"], file.with_prefix(PREFIX), where=path),
        dataset=metadata["dataset"],
    )


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, whole: bool = False) -> list[str]:
    """Name the keys in which recorded metadata differ from the wanted ones; if ``whole``, unwanted keys are named, too.

    Values are compared as JSON holds them, so tuples equal lists. Networks are the same if their parameters are. A data
    set that version 0.1 recorded without a fingerprint is the one of the same name and settings with any fingerprint.
    """
    keys = [*wanted, *(key for key in recorded if whole and key not in wanted)]
    return [key for key in keys if key not in OWN_KEYS and _differ(key, recorded, wanted)]


def _differ(key: str, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if key in OPTIONAL_KEYS and not (key in recorded and key in wanted):
        return False
    theirs, ours = (json.loads(json.dumps(values.get(key))) for values in (recorded, wanted))
    if key == "network":
        return not same_network(theirs, ours)
    both = (theirs, ours)
    named = key == "dataset" and all(isinstance(data, dict) and "name" in data for data in both)
    if named and not all("fingerprint" in data for data in both):
        theirs, ours = ({**data, "fingerprint": None} for data in both)
    return bool(theirs != ours)


def check_teacher(file: TensorFile) -> int:
    """Refuse a teacher's file whose metadata or layout is not that of a teacher; return its number of epochs."""
    check_metadata(file.metadata, TEACHER_METADATA, file.path, required=("network", "epochs"))
    epochs: int = file.metadata["epochs"]
    names = [epoch_name(epoch) for epoch in range(epochs + 1)] if epochs < len(file.names) else ["epochs"]
    if not file.names.issuperset(names):
        raise InputError(f"{file.path}: does not hold the epochs that it names; record this teacher again")
    first = file.layout(names[0])
    for name in names:
        dtype, shape = file.layout(name)
        if dtype not in ("F32", "F64") or len(shape) != 1 or (dtype, shape) != first:
            refuse(file.path, name, f"is {dtype} {shape}, the weights of every epoch are floats of one shape, (P,)")
    return epochs


class Segment(NamedTuple):
    """The weights of a teacher at the start of a segment and m epochs later: theta*_t and theta*_{t+m}, (P,) each."""

    start: Tensor
    target: Tensor


class TrajectoryStore:
    """Recorded teachers, read segment by segment; an InputError refuses teachers that do not belong together.

    Files are opened for a read and closed after it, so memory does not grow with the number of teachers. Weights are
    checked when they are first read.

    Convention: epoch 0 is the initialisation; a teacher of E epochs has E + 1 entries. Weights are in the order of
    ``network.parameters()``.

    Args:
        path: the folder. Each ``teacher_NNNN.safetensors`` in it holds ``epoch_0000`` .. ``epoch_EEEE``, (P,) each;
            ``data.safetensors`` describes the images that they were trained on.

    Attributes:
        path: the folder.
        files: the teachers' files, in order.
        lengths: number of epochs of each teacher, the initialisation not counted.
        epochs: those that all teachers have.
        num_parameters: P, the number of weights.
        metadata: what all teachers share: network, data set, transform, optimizer, rho, alpha, adaptive; and
            "parameters", the number of weights P.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.files = sorted(self.path.glob("teacher_*.safetensors"))
        if not self.files:
            raise InputError(
                f"{self.path}: no teachers here; record some first (ftd fit with FlatTeacher and a TrajectoryRecorder)"
            )
        self.lengths: list[int] = []
        self._checked: set[tuple[int, int]] = set()  # teachers and epochs whose weights were found to be whole
        self.metadata = self._open(self.files[0])
        self.num_parameters: int = self.metadata["parameters"]
        for file in self.files[1:]:
            if different := differences(self.metadata, self._open(file), whole=True):
                raise InputError(
                    f"{file}: differs from {self.files[0].name} in {', '.join(different)}; keep such teachers apart"
                )
        self.epochs = min(self.lengths)

    def _open(self, path: Path) -> dict[str, Any]:
        """Note the length of a teacher, and return what it should share with the others."""
        file = TensorFile(path, kind=KIND)
        self.lengths.append(check_teacher(file))
        shared = {key: value for key, value in file.metadata.items() if key not in OWN_KEYS}
        return {**shared, "parameters": file.layout(epoch_name(0))[1][0]}

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def data(self) -> DataDescription | None:
        """Description of the training images; None in stores of 0.1, and of fits whose data is not described."""
        path = store_data_file(self.path)
        if not path.exists():
            return None
        found = load_store_data(path)
        if differences(self.metadata, {"transform": found.transform.describe()}):
            raise InputError(f"{path}: has another transform than {self.files[0]}; delete this file")
        return found

    @property
    def describes_data(self) -> bool:
        """Whether the teachers' images are described; those of a datamodule of somebody's own may not be."""
        return self.metadata.get("transform") is not None

    @property
    def shape(self) -> ImageShape | None:
        """Channels, classes and size of the images; None where neither data nor a named network tell."""
        if self.data is not None:
            return self.data.shape
        network = self.metadata["network"]
        if not set(ImageShape._fields) <= network.keys():
            return None
        return ImageShape.of(network)

    def description(self) -> DataDescription | None:
        """Describe the data without their source; None where the store does not tell enough, as 0.1 of a whitening."""
        if self.data is not None:
            return replace(self.data, dataset=self.metadata["dataset"])
        recorded = self.metadata.get("transform") or {}
        if self.shape is None or recorded.get("kind") != "standardization":
            return None
        names = [str(label) for label in range(self.shape.num_classes)]
        transform = load_transform(recorded, {}, where=self.files[0])
        return DataDescription(self.shape, names, transform, self.metadata["dataset"])

    def set_metadata(self) -> dict[str, Any]:
        """Return a set's metadata about its teachers: "method", "dataset", "network" and "teachers"."""
        recorded, plain = self.metadata, "ftd" if self.metadata.get("rho", 0) > 0 else "mtt"
        return {
            "method": recorded.get("method", plain),
            "dataset": recorded["dataset"],
            "network": recorded["network"],
            "teachers": {"count": len(self), **{key: recorded.get(key) for key in ("rho", "alpha", "adaptive")}},
        }

    def teacher_metadata(self, teacher: int) -> dict[str, Any]:
        """Return all that one teacher's file records, its seed and accuracies included."""
        return self._file(teacher).metadata

    def _file(self, teacher: int) -> TensorFile:
        if not 0 <= teacher < len(self):
            raise InputError(f"{self.path}: teacher {teacher} is asked for, 0 to {len(self) - 1} are recorded")
        return TensorFile(self.files[teacher], kind=KIND)

    def weights(self, teacher: int, epoch: int | None = None) -> Tensor:
        """Read the weights of a teacher after an epoch, 0 being its initialisation, None its last one: (P,)."""
        file, last = self._file(teacher), self.lengths[teacher]
        epoch = last if epoch is None else epoch
        if not 0 <= epoch <= last:
            raise InputError(f"{file.path}: epoch {epoch} is asked for, 0 to {last} are recorded")
        is_new = (teacher, epoch) not in self._checked
        weights = file.read(epoch_name(epoch), verify=is_new)
        if is_new:
            check_finite(weights, epoch_name(epoch), file.path)
            self._checked.add((teacher, epoch))
        return weights

    def segment(self, teacher: int, start_epoch: int, expert_epochs: int) -> Segment:
        """Read the two ends of a teacher's segment, epochs t and t + m, and nothing else."""
        return Segment(self.weights(teacher, start_epoch), self.weights(teacher, start_epoch + expert_epochs))

    def trajectory(self, teacher: int) -> Tensor:
        """Read a whole teacher: (E + 1, P) for the E epochs that it has."""
        return torch.stack([self.weights(teacher, epoch) for epoch in range(self.lengths[teacher] + 1)])


def write_teacher(folder: str | Path, teacher: int, snapshots: Sequence[Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write one teacher's file, atomically, and return its path.

    Args:
        folder: of the store.
        teacher: its number.
        snapshots: weights at initialisation and after every epoch, (P,) each; those that are mapped take no memory.
        metadata: of the teacher, with at least its "network"; "epochs" and "teacher" are added.

    Raises:
        DivergenceError: if an epoch is not finite, or equal to the one before: such a trajectory matches nothing.
    """
    path, tensors, before = teacher_file(folder, teacher), {}, None
    recorded = {**metadata, "teacher": teacher, "epochs": len(snapshots) - 1}
    check_metadata(recorded, TEACHER_METADATA, f"{path}: not written", required=("network",))
    for epoch, weights in enumerate(snapshots):
        if not bool(torch.isfinite(weights).all()):
            raise DivergenceError(f"teacher {teacher} diverged, its weights are not finite; lower its lr")
        if before is not None and torch.equal(weights, before):
            raise DivergenceError(
                f"teacher {teacher}: epochs {epoch - 1} and {epoch} left the same weights; raise its lr"
            )
        tensors[epoch_name(epoch)] = before = weights
    write_tensors(path, tensors, kind=KIND, metadata=recorded)
    return path


def summary(folder: str | Path) -> str:
    """Sum up the teachers in a folder in words, with the mean of the accuracies after their last epochs."""
    store = TrajectoryStore(folder)
    last = [store.teacher_metadata(index).get("accuracies", [None])[-1] for index in range(len(store))]
    measured = [value for value in last if value is not None]
    mean = f", {100 * sum(measured) / len(measured):.1f} % mean accuracy after the last epoch" if measured else ""
    return f"{len(store)} teacher{'s' * (len(store) > 1)}{mean}"


def check_compatible(store: TrajectoryStore, wanted: Mapping[str, Any]) -> None:
    """Refuse teachers whose metadata, such as network, data set or transform, differ from the wanted values.

    Data that the teachers' store does not describe are not compared: a warning says so.
    """
    if not store.describes_data and not wanted.keys().isdisjoint(DATA_KEYS):
        rank_zero_warn(f"{store.path}: does not describe its teachers' images: they are not compared with these")
        wanted = {key: value for key, value in wanted.items() if key not in DATA_KEYS}
    for key in differences(store.metadata, wanted):
        change = "give the data that they saw" if key in DATA_KEYS else "change the setting"
        raise InputError(
            f"{store.path}: its teachers have {key} {store.metadata.get(key)}, but {wanted[key]} is asked for; "
            f"{change} or record other teachers"
        )
