"""The synthetic set: what distillation learns and everything needed to use it, in one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from ftd_lightning.errors import InputError
from ftd_lightning.files import schema
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, write_tensors
from ftd_lightning.files.transforms import Standardization, check_transform, load_transform
from ftd_lightning.functional.kernels import target_probabilities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ftd_lightning.contracts import ImageTransform


KIND = "synthetic_set"
PARAMETERS = "set_parameters"  # the kind of a file of the parameters alone
PREFIX = "transform."  # of the names of the transform's tensors
CODES = "codes."  # of the names of a decoder's parameters
# Metadata that do not hold for a part of the images, nor for more.
OF_ALL_IMAGES = (
    *("scores", "network", "images_stored", "images_trained_on", "numbers_stored", "bytes_stored", "decoder"),
    *("label_kind", "target_scale", "kernel"),
)


def _open(path: str | Path) -> TensorFile:
    file = TensorFile(Path(path).expanduser(), kind=KIND)
    schema.check_metadata(file.metadata, schema.SET_METADATA, file.path, required=("class_names", "transform"))
    return file


def _joined(sets: Sequence[SyntheticSet], names: Sequence[str]) -> SyntheticSet:
    """Join the images of named classes, class by class, and what the sets have in common."""
    classes, rows, described = [], [], []
    for part in sets:
        place = torch.tensor([names.index(name) if name in names else len(names) for name in part.class_names])
        labels = part.training_labels()
        labels = labels if labels.ndim == 2 else one_hot(labels, len(place)).float()
        classes.append(place[labels.argmax(1)])
        rows.append(labels.new_zeros(len(labels), len(names) + 1).index_add(1, place, labels)[:, :-1])
        described.append({key: value for key, value in part.metadata.items() if key not in OF_ALL_IMAGES})
    of_images = torch.cat(classes)
    order = of_images.argsort(stable=True)[: int((of_images < len(names)).sum())]
    soft, averages = torch.cat(rows)[order], [part.ema_images for part in sets if part.ema_images is not None]
    rates = [part.learning_rate for part in sets]
    return SyntheticSet(
        torch.cat([part.images for part in sets])[order],
        of_images[order] if all(part.labels.ndim == 1 for part in sets) else soft / soft.sum(1, keepdim=True),
        sets[0].step_size if len(set(rates)) == 1 else None if None in rates else torch.tensor(rates).mean(),
        torch.cat(averages)[order] if len(averages) == len(sets) else None,
        list(names),
        sets[0].transform,
        {key: value for key, value in described[0].items() if all(other.get(key) == value for other in described)},
    )


def _own(header: dict[str, Any]) -> dict[str, Any]:
    """Drop what the fields of a set hold, and what only files have."""
    return {key: value for key, value in header.items() if key not in ("kind", "format", "class_names", "transform")}


@dataclass(repr=False)
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
        codes: a decoder's parameters, which the images were decoded from; empty without a decoder.
    """

    images: Tensor
    labels: Tensor
    step_size: Tensor | None = None
    ema_images: Tensor | None = None
    class_names: list[str] = field(default_factory=list)
    transform: ImageTransform = field(default_factory=lambda: Standardization([0.0], [1.0]))
    metadata: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step_size is not None:
            self.step_size = torch.as_tensor(self.step_size)

    def __repr__(self) -> str:
        """Describe the set in five lines, without its pixels; ``ftd info`` tells more of a file."""
        names, of = self.class_names, self.metadata.get("dataset")
        return (
            f"SyntheticSet of {len(self.images)} images, {' x '.join(map(str, self.images.shape[1:]))}"
            f"{'' if self.ema_images is None else ', and their moving average'}\n"
            f"  classes    {len(names)}: {', '.join(names[:10])}{', ...' if names[10:] else ''}\n"
            f"  labels     {self.label_description}\n"
            f"  step size  {self.learning_rate and f'{self.learning_rate:.4g}'}\n"
            f"  method     {self.metadata.get('method')}, on {of.get('name') if isinstance(of, dict) else of}"
        )

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

    def budget(self) -> dict[str, Any]:
        """Return what tables say of storage, as metadata do: numbers and bytes, of images or of what decodes to them.

        Labels are not counted. "decoder" is its class and options, or None.
        """
        stored, trained_on = self.image_counts
        numbers = self.metadata.get("numbers_stored", stored * self.images[0].numel())
        return {
            "images_stored": stored,
            "images_trained_on": trained_on,
            "numbers_stored": numbers,
            "bytes_stored": self.metadata.get("bytes_stored", numbers * self.images.element_size()),
            "decoder": self.metadata.get("decoder"),
        }

    def training_labels(self) -> Tensor:
        """Return labels for cross entropy: (N,) int64 classes, or (N, K) float32 probabilities, also for targets."""
        if schema.label_kind(self.labels, self.metadata) != "target":
            return self.labels
        return target_probabilities(self.labels, scale=self.metadata.get("target_scale", 1.0))

    def fingerprint(self) -> str:
        """Hash images, labels and step size."""
        return fingerprint(*(value for value in (self.images, self.labels, self.step_size) if value is not None))

    def take_classes(self, names: Sequence[str]) -> SyntheticSet:
        """Return the images of some classes, class by class, numbered in the order of ``names``; without scores.

        An image with soft labels belongs to its most probable class. Of these labels, the probabilities of the taken
        classes are kept, divided by their sum. An InputError names a class that the set does not have.
        """
        if missing := [name for name in names if name not in self.class_names]:
            raise InputError(f"take_classes: no class {missing[0]!r}: there are {', '.join(self.class_names)}")
        return _joined([self], names)

    @staticmethod
    def concatenate(sets: Sequence[SyntheticSet]) -> SyntheticSet:
        """Join sets of different classes, or of the same ones: all images, class by class.

        Classes are known by their names, and numbered in the order of the sets. If a set has soft labels, all become
        probabilities, 0 for classes of other sets. The step size is the mean of the sets', averaged images are kept,
        where all sets have them. Metadata that all sets share are kept, and "joined" describes each set. An InputError
        refuses sets without class names, of other image shapes, or with other transforms.

        Example:
            >>> cats = SyntheticSet(torch.rand(2, 1, 8, 8), torch.tensor([0, 0]), class_names=["cat"])
            >>> dogs = SyntheticSet(torch.rand(1, 1, 8, 8), torch.tensor([0]), class_names=["dog"])
            >>> pets = SyntheticSet.concatenate([cats, dogs])
            >>> pets.labels, pets.class_names, pets.take_classes(["dog"]).labels
            (tensor([0, 0, 1]), ['cat', 'dog'], tensor([0]))
        """
        for part in sets:
            if part.images.shape[1:] != sets[0].images.shape[1:] or not part.class_names:
                raise InputError("concatenate: the sets need class_names, and images of one shape")
            if part.transform.describe() != sets[0].transform.describe():
                raise InputError("concatenate: the sets' transforms differ; apply one of them to all pictures()")
        joined = _joined(sets, list(dict.fromkeys(name for part in sets for name in part.class_names)))
        joined.metadata["joined"] = [
            {"fingerprint": part.fingerprint(), "class_names": part.class_names, "method": part.metadata.get("method")}
            for part in sets
        ]
        return joined

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
        if bool(self.codes) != ("decoder" in self.metadata):
            schema.refuse(where, "codes", "and the metadata's decoder go together, and one of them is missing")
        for name, values in self.codes.items():
            schema.check_finite(values, f"{CODES}{name}", where)
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
        tensors |= {f"{CODES}{name}": tensor for name, tensor in self.codes.items()}
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
            codes=dict(file.with_prefix(CODES)),
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

    def pictures(self, *, ema: bool = False, channels: Sequence[int] | None = None) -> Tensor:
        """Undo the transform: (N, C, H, W) in [0, 1], clamped, of all channels, or those with these numbers, from 0."""
        pictures = self.transform.invert(self.chosen(ema=ema)).clamp(0, 1)
        return pictures if channels is None else pictures[:, list(channels)]
