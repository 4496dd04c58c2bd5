"""Questions of modules, data sources and callbacks to each other, as Protocols of tensors and plain values.

A data source is any object with the methods of :class:`DataSource`; ``DistillationDataModule`` is one, and
``DistillationDataModule.from_datamodule`` makes one of any LightningDataModule.

Convention: *images* are what networks see, standardised or whitened, of no fixed range; *pictures* are uint8 or float32
in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch

from ftd_lightning.sizes import ImageSize, as_size, sides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from ftd_lightning.functional.augment import Augmentation

Part = Literal["train", "val", "test"]


class Images(NamedTuple):
    """Labelled images as networks see them: (N, C, H, W) float32, transformed, and (N,) int64."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Images:
        """Select some of them by index, (n,) int64."""
        return Images(self.images[index], self.labels[index])


class ImageTransform(Protocol):
    """An invertible map from pictures to images that a file can carry."""

    def apply(self, pictures: Tensor) -> Tensor:
        """Map pictures in [0, 1] to images, both (N, C, H, W) float32."""

    def invert(self, images: Tensor) -> Tensor:
        """Map images to pictures; values may lie outside [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """Describe the map and the images that it was fitted on; equal descriptions mean equal maps."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that build it again, together with the description."""


class ImageShape(NamedTuple):
    """Arguments of a named network: channels C, classes K, and the size of images in pixels."""

    in_channels: int
    num_classes: int
    image_size: ImageSize

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ImageShape:
        """Take the arguments by name, as files hold them."""
        return cls(values["in_channels"], values["num_classes"], as_size(values["image_size"]))

    def zeros(self, count: int) -> Tensor:
        """Make black images to try a network on, (count, C, H, W) float32."""
        return torch.zeros(count, self.in_channels, *sides(self.image_size))


@dataclass(frozen=True)
class DataDescription:
    """Description of training images.

    Attributes:
        shape: channels, classes and size.
        class_names: K names, in label order.
        transform: from pictures to images.
        dataset: names or fingerprints the training images, as JSON holds it; equal values mean equal pictures.
        batch_size: images per training batch on each rank; None where it is not known.
    """

    shape: ImageShape
    class_names: list[str]
    transform: ImageTransform
    dataset: dict[str, Any]
    batch_size: int | None = None

    def metadata(self) -> dict[str, Any]:
        """Return the entries of stores and sets: ``{"dataset": ..., "transform": ...}``."""
        return {"dataset": self.dataset, "transform": self.transform.describe()}


class TrainingSet(Protocol):
    """A small set in the place of the training images; ``SyntheticSet`` is one, which documents its members."""

    images: Tensor
    labels: Tensor
    step_size: Tensor | None
    ema_images: Tensor | None
    class_names: list[str]
    metadata: dict[str, Any]

    def training_labels(self) -> Tensor:
        """Return labels for cross entropy: (N,) classes or (N, K) probabilities."""

    def save(self, path: str | Path) -> None:
        """Write the set atomically."""

    def pictures(self, *, ema: bool = False, channels: Sequence[int] | None = None) -> Tensor:
        """Return the images with the transform undone, (N, C, H, W) in [0, 1]; of some channels, or all."""


@runtime_checkable
class DataSource(Protocol):
    """A datamodule that answers the questions of modules. All answers are valid after ``setup``."""

    def description(self) -> DataDescription:
        """Describe the training images."""

    def part(self, name: Part) -> Images:
        """Return the training images, those held out from them ("val", possibly none), or the test images."""

    def training_set(self) -> TrainingSet | None:
        """Return the set in the place of the training images; None where there is none."""


def data_source(datamodule: object) -> DataSource | None:
    """Return a datamodule that is a data source, with this type; None for any other, or for none."""
    return datamodule if isinstance(datamodule, DataSource) else None


class BatchPlan(NamedTuple):
    """How images are dealt out to processes.

    Attributes:
        rank: this process's share.
        world_size: number of shares; 1 gives every process all images.
        epoch: maps the trainer's epoch to the one that decides the order.
        validates: whether Lightning validates on the held-out images while the module is fitted.
    """

    rank: int
    world_size: int
    epoch: Callable[[int], int]
    validates: bool = True


@runtime_checkable
class PlansBatches(Protocol):
    """A module that decides how its data source deals out images to processes."""

    def batch_plan(self) -> BatchPlan:
        """Return the plan; valid once the module is attached to a trainer."""


class TeacherProgress(NamedTuple):
    """Progress of a fit of several teachers, on this rank.

    Attributes:
        teacher: number of the present teacher, from 0.
        epoch: of that teacher, from 0.
        epochs: of each teacher.
        teachers: requested number, over all ranks.
        records: whether this process writes the teacher.
    """

    teacher: int
    epoch: int
    epochs: int
    teachers: int
    records: bool


@runtime_checkable
class TrainsTeachers(Protocol):
    """A module that trains several teachers in one fit, one after the other, each as its submodule "network"."""

    data: DataDescription | None

    def teacher_progress(self) -> TeacherProgress:
        """Return the progress of the fit."""

    def trajectory_metadata(self) -> dict[str, Any]:
        """Return the store's entries for the current teacher beside its weights and its data."""


@runtime_checkable
class LearnsSet(Protocol):
    """A module that learns a synthetic set from ``initial_images``; ``augment`` is the augmentation of its training."""

    augment: Augmentation
    initial_images: Tensor | None

    def train_dataloader(self) -> Iterable[Any]:
        """Return the module's own batches, which it is fitted on with any datamodule; sized, and with a state."""

    @property
    def iterations(self) -> int:
        """Number of iterations that the current set has had."""

    def synthetic_set(self) -> TrainingSet:
        """Return the current set, on the CPU, with everything that describes it."""

    def learned_images(self) -> dict[str, Tensor]:
        """Return the live images on the module's device: "raw", and "ema" where an average is kept."""

    def averaged(self) -> dict[str, Tensor]:
        """Return the live tensors whose moving average gives averaged images: the images, or a decoder's parameters."""

    def keep_average(self, average: Mapping[str, Tensor], initial_weight: Tensor, settings: dict[str, Any]) -> None:
        """Take the moving average and the initial values' share in it, which the caller updates in place."""

    def step_was_applied(self) -> Tensor:
        """Return whether the last optimizer step moved the images, a bool scalar on the device."""

    def record_scores(self, scores: dict[str, dict[str, float | int]]) -> None:
        """Add measured accuracies to the metadata of the current set; forgotten with the next step."""

    def evaluation_network(self, *seed: int | str) -> nn.Module:
        """Build a fresh network of the set's architecture, on the CPU; equal seeds give equal weights."""
