"""A synthetic set while it is learned: its tensors, and the description that travels with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ftd_lightning.data.files import versions
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.data.transform import Standardization
from ftd_lightning.training.phase_module import PhaseModule
from ftd_lightning.training.step_guard import StepGuard

if TYPE_CHECKING:
    from ftd_lightning.functional.augment import Augmentation
    from ftd_lightning.training.inner_labels import InnerLabels


class LearnedSet(PhaseModule):
    """The set of a distillation as callbacks see it; see ``contracts.LearnsSet``.

    Attributes:
        images: (ipc * K, C, H, W) parameter, class by class.
        labels: (ipc * K,) int64, the classes that the images are made for.
        inner_labels: what students are trained with instead of classes; None where they are trained with those.
        step_size: scalar: the learning rate that networks are to be trained with on the set.
        ema_images: their moving average, where a ``SyntheticEMA`` keeps one.
        scores: accuracies that ``EvaluateSynthetic`` measured of the current images.
    """

    images: nn.Parameter
    step_size: nn.Parameter | Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner_labels: InnerLabels | None = None
        self._guard = StepGuard()
        self._loaded_iterations = 0
        self.ema_images: Tensor | None = None
        self._initial_weight: Tensor | None = None  # of the initial images in their average
        self._average_settings: dict[str, Any] = {}
        self.scores: dict[str, dict[str, float | int]] = {}

    @property
    def method(self) -> str:
        """Short name of the method, as in tables."""
        raise NotImplementedError

    def set_metadata(self) -> dict[str, Any]:
        """Return what the set's metadata contains beyond settings: here the data and the network."""
        dataset = {"name": "own images"} if self.data is None else self.data.dataset
        return {"dataset": dataset, "network": self.fresh.describe()}

    @property
    def iterations(self) -> int:
        """Number of iterations that the set has had."""
        return self.step if self.attached else self._loaded_iterations

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._guard.skipped)

    def set_labels(self) -> Tensor:
        """Return the labels of the set as it is: (N,) classes, or (N, K) probabilities."""
        return self.labels if self.inner_labels is None else self.inner_labels.of_set()

    def learned_images(self) -> dict[str, Tensor]:
        """Return the live images by kind; see ``contracts.LearnsSet``."""
        average = {} if self.ema_images is None else {"ema": self.ema_images}
        return {"raw": self.images, **average}

    def keep_average(self, average: Tensor, initial_weight: Tensor, settings: dict[str, Any]) -> None:
        """Take a tensor as the moving average of the images; see ``contracts.LearnsSet``."""
        self.ema_images, self._initial_weight, self._average_settings = average, initial_weight, settings

    def record_scores(self, scores: dict[str, dict[str, float | int]]) -> None:
        """Add measured accuracies to the current set's metadata."""
        self.scores |= scores

    def augmentation(self) -> Augmentation:
        """Return the augmentation that the set is trained with."""
        return self.augment

    def evaluation_network(self, *seed: int | str) -> nn.Module:
        """Build a fresh network of the architecture that the set is made for."""
        return self.fresh.build(*seed)

    def progress_label(self) -> str:
        """Name what is done."""
        return "distillation"

    def planned_epochs(self) -> int | None:
        """Return None: the trainer's limits end the fit."""
        return None

    def _average_metadata(self) -> dict[str, Any]:
        if self._initial_weight is None:
            return {}
        return {"ema": self._average_settings, "ema_initial_weight": float(self._initial_weight)}

    def synthetic_set(self) -> SyntheticSet:
        """Return the current synthetic set, on the CPU, with everything that describes it."""
        data, classes = self.data, [str(label) for label in self.labels.unique().tolist()]
        return SyntheticSet(
            images=self.images.detach().cpu().clone(),
            labels=self.set_labels().detach().cpu().clone(),
            step_size=self.step_size.detach().cpu().clone(),
            ema_images=None if self.ema_images is None else self.ema_images.cpu().clone(),
            class_names=classes if data is None else list(data.class_names),
            transform=Standardization([0.0], [1.0]) if data is None else data.transform,
            metadata={
                "method": self.method,
                "augmentation": self.augment.describe(),
                **self.set_metadata(),
                **({} if self.inner_labels is None else {"labels_made": self.inner_labels.made}),
                "settings": self.settings(),
                "iterations": self.iterations,
                "skipped_steps": self.skipped_steps,
                **({"gated_steps": int(self._guard.gated)} if self._guard.gates else {}),
                **self._average_metadata(),
                **({"scores": dict(self.scores)} if self.scores else {}),
                "versions": versions(),
            },
        )
