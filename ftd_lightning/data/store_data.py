"""What a trajectory store keeps of the data behind its teachers, so that it can be used without their data source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.data.files import write_tensors
from ftd_lightning.data.schema import STORE_METADATA, check_metadata, refuse
from ftd_lightning.data.teacher_metadata import differences
from ftd_lightning.data.tensor_file import TensorFile
from ftd_lightning.data.transform import load_transform

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

KIND = "trajectory_data"
PREFIX = "transform."  # of the names of the transform's tensors


def store_data_file(folder: str | Path) -> Path:
    """Name the file, which lies beside the teachers'."""
    return Path(folder).expanduser() / "data.safetensors"


def write_store_data(folder: str | Path, description: DataDescription) -> None:
    """Write the file, atomically, unless it has been written for the same data already.

    Args:
        folder: of the store; made where it is missing.
        description: of the teachers' training images. Its batch size is left to the teachers' metadata.
    """
    path, metadata = store_data_file(folder), _metadata(description)
    if path.is_file() and not differences(TensorFile(path, kind=KIND).metadata, metadata):
        return
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in description.transform.tensors().items()}
    write_tensors(path, tensors, kind=KIND, metadata=metadata)


def read_store_data(folder: str | Path) -> DataDescription | None:
    """Read the file; None where there is none: version 0.1 wrote none, nor do fits whose data is not described.

    Raises:
        InputError: for a broken or foreign file.
    """
    path = store_data_file(folder)
    return load_store_data(path) if path.exists() else None


def load_store_data(path: Path) -> DataDescription:
    """Read such a file.

    Raises:
        InputError: for a missing, broken or foreign file.
    """
    file = TensorFile(path, kind=KIND)
    metadata = file.metadata
    check_metadata(metadata, STORE_METADATA, path, required=("shape", "class_names", "transform", "dataset"))
    if set(metadata["shape"]) != set(ImageShape._fields):
        refuse(
            path, "shape", f"is {metadata['shape']!r:.60}, {', '.join(ImageShape._fields)} are needed; make it again"
        )
    return DataDescription(
        shape=ImageShape(**metadata["shape"]),
        class_names=metadata["class_names"],
        transform=load_transform(metadata["transform"], file.with_prefix(PREFIX), where=path),
        dataset=metadata["dataset"],
    )


def _metadata(description: DataDescription) -> Mapping[str, Any]:
    return {
        **description.metadata(),
        "class_names": list(description.class_names),
        "shape": description.shape._asdict(),
    }
