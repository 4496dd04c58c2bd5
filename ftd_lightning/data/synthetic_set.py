"""The synthetic set: what distillation learns and everything needed to use it, in one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import TensorDataset

from ftd_lightning.data.files import TensorFile, write_tensors
from ftd_lightning.data.transform import Standardization, load_transform
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ftd_lightning.contracts import ImageTransform

KIND = "synthetic_set"
PREFIX = "transform."  # of the names of the transform's tensors


def _own(header: dict[str, Any]) -> dict[str, Any]:
    """Drop what fields of a set hold, and what only files have."""
    return {key: value for key, value in header.items() if key not in ("kind", "format", "class_names", "transform")}


def _identity() -> ImageTransform:
    return Standardization([0.0], [1.0])


@dataclass
class SyntheticSet:
    """Synthetic images, their labels and the step size they were learned with.

    Convention: images are what networks see, i.e. standardised or whitened; :meth:`pictures` undoes that.

    Attributes:
        images: (N, C, H, W) float32.
        labels: (N,) int64 classes, or (N, K) float32 probabilities.
        step_size: scalar float32 > 0, the learned inner learning rate; None where none was learned.
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
    transform: ImageTransform = field(default_factory=_identity)
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the set, atomically.

        Raises:
            InputError: if any value is not finite: such a set is never written over a good one.
        """
        tensors = {"images": self.images, "labels": self.labels}
        if self.step_size is not None:
            tensors["step_size"] = self.step_size
        if self.ema_images is not None:
            tensors["ema_images"] = self.ema_images
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{path}: not written, {name} holds values that are not finite; lower the pixels' lr")
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in self.transform.tensors().items()}
        metadata = {**self.metadata, "class_names": self.class_names, "transform": self.transform.describe()}
        write_tensors(Path(path), tensors, kind=KIND, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> SyntheticSet:
        """Read a set.

        Raises:
            InputError: for a file that is missing, truncated, or not a synthetic set.

        Example:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/set.safetensors"
            >>> SyntheticSet(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])).save(path)
            >>> SyntheticSet.load(path).images.shape
            torch.Size([2, 1, 4, 4])
        """
        file = TensorFile(Path(path), kind=KIND)
        return cls(
            images=file["images"],
            labels=file["labels"],
            step_size=file["step_size"] if "step_size" in file.names else None,
            ema_images=file["ema_images"] if "ema_images" in file.names else None,
            class_names=file.metadata["class_names"],
            transform=load_transform(file.metadata["transform"], file.with_prefix(PREFIX)),
            metadata=_own(file.metadata),
        )

    @staticmethod
    def read_metadata(path: str | Path) -> dict[str, Any]:
        """Return the ``metadata`` of a set without reading any of its tensors.

        Raises:
            InputError: as for :meth:`load`.
        """
        return _own(TensorFile(Path(path), kind=KIND).metadata)

    def dataset(self, *, ema: bool = False) -> TensorDataset:
        """Return (image, label) pairs for an ordinary DataLoader.

        Args:
            ema: take the averaged images instead of the last ones.

        Raises:
            InputError: if averaged images are asked for and none were kept.
        """
        return TensorDataset(self.chosen(ema=ema), self.labels)

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
