"""What modules, data sources and callbacks may ask of each other: typed Protocols of tensors and plain values.

A data source is whatever implements the methods of :class:`DataSource`; ``DistillationDataModule`` is one, and
``DistillationDataModule.from_datamodule`` makes one of any LightningDataModule. The reverse direction is a single
question: a data source asks the module that is being fitted whether it has its own batches
(:class:`BringsBatches`), and otherwise how to deal the images out (:class:`PlansBatches`).

Convention: *images* are what networks see, standardised or whitened, of no fixed range; *pictures* are uint8 or float32
in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor, nn

    from ftd_lightning.functional.augment import Augmentation

Part = Literal["train", "val", "test"]


class Images(NamedTuple):
    """Labelled images as networks see them.

    Attributes:
        images: (N, C, H, W) float32, transformed.
        labels: (N,) int64.
    """

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
        """Describe the map and what it was fitted on; equal descriptions mean equal maps."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are needed, beside the description, to build it again."""


class ImageShape(NamedTuple):
    """The arguments that a named network is built with.

    Attributes:
        in_channels: C.
        num_classes: K, length of the logits.
        image_size: height and width in pixels.
    """

    in_channels: int
    num_classes: int
    image_size: int

    def zeros(self, count: int) -> Tensor:
        """Make black images to try a network on, (count, C, H, W) float32."""
        return torch.zeros(count, self.in_channels, self.image_size, self.image_size)


@dataclass(frozen=True)
class DataDescription:
    """What a data source says of its training images.

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
        """Return what stores and sets record: ``{"dataset": ..., "transform": ...}``."""
        return {"dataset": self.dataset, "transform": self.transform.describe()}


class TrainingSet(Protocol):
    """A small set that stands in for the training images: a synthetic set, or a selection of real images.

    Attributes:
        images: (N, C, H, W) float32, normalized.
        labels: (N,) classes or (N, K) probabilities, one for each image.
        step_size: the learning rate it was learned with, a scalar; None where none was learned.
        metadata: plain values that describe it.
    """

    images: Tensor
    labels: Tensor
    step_size: Tensor | None
    metadata: dict[str, Any]


@runtime_checkable
class DataSource(Protocol):
    """What a module may ask of the datamodule that it is fitted with. All answers are valid after ``setup``."""

    def description(self) -> DataDescription:
        """Describe the training images."""

    def part(self, name: Part) -> Images:
        """Return the training images, those held out from them ("val", possibly none), or the test images."""

    def training_set(self) -> TrainingSet | None:
        """Return the set that takes the place of the training images; None where they are trained on themselves."""


@runtime_checkable
class Stateful(Protocol):
    """A loader whose position is part of a checkpoint; Lightning asks for the same two methods."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a position over; the next iteration starts there."""


@runtime_checkable
class BringsBatches(Protocol):
    """A module that has its own training batches, as a distillation does."""

    def iteration_loader(self) -> Iterable[Any]:
        """Return the training loader; it is sized and has ``state_dict`` and ``load_state_dict``."""


class BatchPlan(NamedTuple):
    """How a module wants the training images dealt out.

    Attributes:
        rank: this process's share, in {0 .. world_size - 1}.
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
    """A module that decides itself how images are dealt out to processes."""

    def batch_plan(self) -> BatchPlan:
        """Return the plan; valid once the module is attached to a trainer."""


class TeacherProgress(NamedTuple):
    """Where a fit of several teachers stands, on this rank.

    Attributes:
        teacher: number of the teacher that is being trained, from 0.
        epoch: of that teacher, from 0.
        epochs: of each teacher.
        teachers: how many were asked for, over all ranks.
        records: whether this process writes the teacher.
    """

    teacher: int
    epoch: int
    epochs: int
    teachers: int
    records: bool


@runtime_checkable
class TrainsTeachers(Protocol):
    """A module that trains several teachers in one fit, one after the other."""

    def teacher_progress(self) -> TeacherProgress:
        """Say where the fit stands."""

    def teacher_network(self) -> nn.Module:
        """Return the network whose parameters make the trajectory."""

    def trajectory_metadata(self) -> dict[str, Any]:
        """Return what the store records of the current teacher beside its weights and its data."""

    def data_description(self) -> DataDescription | None:
        """Describe the training data; None where the datamodule does not."""


class LearnedSet(Protocol):
    """A synthetic set as callbacks handle it; see ``data.synthetic_set.SyntheticSet``."""

    images: Tensor
    labels: Tensor
    step_size: Tensor | None
    ema_images: Tensor | None
    class_names: list[str]
    metadata: dict[str, Any]

    def training_labels(self) -> Tensor:
        """Return what networks are trained on by cross entropy: (N,) classes or (N, K) probabilities."""

    def save(self, path: str | Path) -> None:
        """Write the set atomically."""

    def pictures(self, *, ema: bool = False) -> Tensor:
        """Return the images with the transform undone, (N, C, H, W) in [0, 1]."""


@runtime_checkable
class LearnsSet(Protocol):
    """A module that learns a synthetic set: what callbacks ask of a distillation."""

    @property
    def iterations(self) -> int:
        """Number of iterations that the current set has had."""

    def synthetic_set(self) -> LearnedSet:
        """Return the current set, on the CPU, with everything that describes it."""

    def learned_images(self) -> dict[str, Tensor]:
        """Return the live images on the module's device: "raw", and "ema" where an average is kept."""

    def keep_average(self, average: Tensor, initial_weight: Tensor, settings: dict[str, Any]) -> None:
        """Take two tensors, updated in place by the caller.

        Args:
            average: the moving average of the images, in their shape.
            initial_weight: how much of the initial images it still holds, a scalar in [0, 1].
            settings: how it is made, plain values that the set records.
        """

    def step_was_applied(self) -> Tensor:
        """Say whether the last optimizer step moved the images: a bool scalar on the device."""

    def record_scores(self, scores: dict[str, dict[str, float | int]]) -> None:
        """Add measured accuracies to the metadata of the current set; forgotten with the next step."""

    def evaluation_network(self, *seed: int | str) -> nn.Module:
        """Build a fresh network of the set's architecture, on the CPU; equal seeds give equal weights."""

    def augmentation(self) -> Augmentation:
        """Return the augmentation that the set is trained with."""


@runtime_checkable
class ReportsProgress(Protocol):
    """A module that says what it is doing, for the progress bar."""

    def progress_label(self) -> str:
        """Return a few words, e.g. "teacher 3/100, epoch 12"."""

    def planned_epochs(self) -> int | None:
        """Return the trainer epoch after which the module ends the fit by itself; None where it does not."""


def data_source(datamodule: object) -> DataSource | None:
    """Return a datamodule that answers a module's questions as what it is; None for any other, or for none."""
    return datamodule if isinstance(datamodule, DataSource) else None
