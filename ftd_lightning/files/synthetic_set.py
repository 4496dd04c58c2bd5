"""The synthetic set: what distillation learns and everything needed to use it, in one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import TensorDataset

from ftd_lightning.errors import InputError
from ftd_lightning.files import schema
from ftd_lightning.files.safetensors_io import TensorFile, write_tensors
from ftd_lightning.files.transforms import Standardization, check_transform, load_transform
from ftd_lightning.functional.kernels import target_probabilities

if TYPE_CHECKING:
    from torch import Tensor

    from ftd_lightning.contracts import ImageTransform


KIND = "synthetic_set"
PREFIX = "transform."  # of the names of the transform's tensors


def _open(path: str | Path) -> TensorFile:
    file = TensorFile(Path(path).expanduser(), kind=KIND)
    schema.check_metadata(file.metadata, schema.SET_METADATA, file.path, required=("class_names", "transform"))
    return file


def _own(header: dict[str, Any]) -> dict[str, Any]:
    """Drop what the fields of a set hold, and what only files have."""
    return {key: value for key, value in header.items() if key not in ("kind", "format", "class_names", "transform")}


@dataclass
class SyntheticSet:
    """Synthetic images, their labels and the step size they were learned with.

    Convention: images are what networks see, i.e. standardised or whitened; :meth:`pictures` undoes that.

    Attributes:
        images: (N, C, H, W) float32.
        labels: (N,) int64 classes, or (N, K) float32: probabilities, or the targets that a method learns, where
            ``metadata["label_kind"]`` is "target". ``metadata["labels_made"]`` says how soft ones were made: "learned"
            or "teacher".
        step_size: float32 > 0, the learned inner learning rate, a scalar or (n,), one per inner step; None where none
            was learned. A number becomes a tensor.
        ema_images: (N, C, H, W), their moving average; None where none was kept.
        class_names: K names, in label order.
        transform: maps pictures in [0, 1] to such images, and back.
        metadata: data set, augmentation, network, method, settings, versions; whatever JSON holds. "scores", where the
            set was evaluated, maps what was evaluated, e.g. "raw", to {"mean", "std", "n"}: the accuracy of n networks,
            as a fraction.
    """

    images: Tensor
    labels: Tensor
    step_size: Tensor | None = None
    ema_images: Tensor | None = None
    class_names: list[str] = field(default_factory=list)
    transform: ImageTransform = field(default_factory=lambda: Standardization([0.0], [1.0]))
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step_size is not None:
            self.step_size = torch.as_tensor(self.step_size)

    @property
    def learning_rate(self) -> float | None:
        """The step size as one number, the mean of several; None where none was learned."""
        return None if self.step_size is None else float(self.step_size.detach().float().mean())

    @property
    def label_description(self) -> str:
        """The kind of labels, for tables: "hard", "soft", "soft (learned)" or "soft (teacher)"."""
        made = self.metadata.get("labels_made")
        return "hard" if self.labels.ndim == 1 else f"soft ({made})" if made else "soft"

    @property
    def image_counts(self) -> tuple[int, int]:
        """Number of images that are stored, and that networks are trained on; decoding makes more of the latter."""
        count = len(self.images)
        return self.metadata.get("images_stored", count), self.metadata.get("images_trained_on", count)

    def training_labels(self) -> Tensor:
        """Return labels for cross entropy: (N,) int64 classes, or (N, K) float32 probabilities, also for targets."""
        if schema.label_kind(self.labels, self.metadata) != "target":
            return self.labels
        return target_probabilities(self.labels, scale=self.metadata.get("target_scale", 1.0))

    def check(self, where: object) -> None:
        """Refuse a set that is not as its attributes are described; the InputError names ``where`` and the field."""
        schema.check_metadata({**self.metadata, "class_names": self.class_names}, schema.SET_METADATA, where)
        schema.check_tensor(self.images, "images", where, (None,) * 4)
        if self.ema_images is not None:
            schema.check_tensor(self.ema_images, "ema_images", where, self.images.shape)
        kind = schema.label_kind(self.labels, self.metadata)
        schema.check_labels(self.labels, len(self.images), len(self.class_names) or None, kind, where)
        if self.step_size is not None:
            schema.check_step_size(self.step_size, where)
        check_transform(self.transform.describe(), self.transform.tensors(), where, self.images.shape[1:])

    def save(self, path: str | Path) -> None:
        """Write the set, atomically, floats as float32; an InputError refuses a set that is not as described."""
        given = {name: getattr(self, name) for name in ("images", "labels", "step_size", "ema_images")}
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
            if tensor is not None
        }
        replace(self, **tensors).check(f"{path}: not written")
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in self.transform.tensors().items()}
        metadata = {**self.metadata, "class_names": self.class_names, "transform": self.transform.describe()}
        write_tensors(Path(path).expanduser(), tensors, kind=KIND, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> SyntheticSet:
        """Read a set; an InputError says why it cannot be read."""
        file = _open(path)
        loaded = cls(
            images=file["images"],
            labels=file["labels"],
            step_size=file["step_size"] if "step_size" in file.names else None,
            ema_images=file["ema_images"] if "ema_images" in file.names else None,
            class_names=file.metadata["class_names"],
            transform=load_transform(file.metadata["transform"], file.with_prefix(PREFIX), where=file.path),
            metadata=_own(file.metadata),
        )
        loaded.check(file.path)
        return loaded

    @staticmethod
    def read_metadata(path: str | Path) -> dict[str, Any]:
        """Return the ``metadata`` of a set without reading any of its tensors."""
        return _own(_open(path).metadata)

    def dataset(self, *, ema: bool = False) -> TensorDataset:
        """Return (image, label) pairs for an ordinary DataLoader, of the last images or the averaged ones."""
        return TensorDataset(self.chosen(ema=ema), self.training_labels())

    def chosen(self, *, ema: bool) -> Tensor:
        """Return the averaged images or the last ones, (N, C, H, W)."""
        if not ema:
            return self.images
        if self.ema_images is None:
            raise InputError("this synthetic set has no EMA images: evaluate the raw ones")
        return self.ema_images

    def pictures(self, *, ema: bool = False) -> Tensor:
        """Undo the transform: (N, C, H, W) in [0, 1], clamped."""
        return self.transform.invert(self.chosen(ema=ema)).clamp(0, 1)
