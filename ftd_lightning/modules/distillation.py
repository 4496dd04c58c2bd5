"""What all distillations share: a synthetic set that is learned, its initial images, its optimizer, its description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ftd_lightning.callbacks.set_writer import SyntheticSetWriter
from ftd_lightning.contracts import Images
from ftd_lightning.data.coresets import random_real_images
from ftd_lightning.data.datamodule import NoLoaders
from ftd_lightning.data.files import versions
from ftd_lightning.data.iterations import IterationLoader
from ftd_lightning.data.schema import check_images, check_labels
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.data.transform import Standardization
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.training.finite_steps import MAX_SKIPPED, FiniteSteps
from ftd_lightning.training.phase_module import PhaseModule
from ftd_lightning.training.plain_arguments import plain_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from ftd_lightning.functional.augment import Augmentation

Init = Literal["real", "noise"]


class Distillation(PhaseModule):
    """The base of all methods that learn synthetic images by gradient steps.

    Automatic optimization: one optimizer, one global step per iteration; the number of iterations is the trainer's
    ``max_steps``. A method defines its loss (``training_step``, which returns it through :meth:`logged`), its batches
    (``iteration_loader``), and what its set says of it (``method``, ``set_metadata``). Its hyper-parameters include
    ``ipc``, ``init`` and ``seed``. A ``SyntheticSetWriter`` writes the set; the module adds one where the trainer has
    none.

    A step whose loss or gradient is not finite is skipped (images and momentum stay as they are), counted in
    ``matching/skipped_steps``, and after ten in a row the run ends with a ``DivergenceError``. Neither makes the host
    wait for the device: there the count is read every tenth iteration.

    Attributes:
        images: (ipc * K, C, H, W) parameter, class by class.
        labels: (ipc * K,) int64.
        step_size: scalar: the learning rate that networks are to be trained with on the set.
        initial_images: a copy of the images at the start; None in a module loaded from a checkpoint.
        ema_images: their moving average, where a ``SyntheticEMA`` keeps one.
        scores: accuracies that ``EvaluateSynthetic`` measured of the current images.
    """

    images: nn.Parameter
    step_size: nn.Parameter | Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._real: Images | None = None  # see keep_real
        self._finite = FiniteSteps()
        self._loss: Tensor | None = None
        self._loaded_shape: torch.Size | None = None  # of the images of a checkpoint, where no data is at hand
        self._loaded_iterations = 0
        self.ema_images: Tensor | None = None
        self._initial_weight: Tensor | None = None  # of the initial images in their average
        self.initial_images: Tensor | None = None
        self.scores: dict[str, dict[str, float | int]] = {}

    @property
    def method(self) -> str:
        """Short name of the method, as in tables."""
        raise NotImplementedError

    def set_metadata(self) -> dict[str, Any]:
        """Return what the set's metadata contains beyond settings: at least "dataset" and "network"."""
        raise NotImplementedError

    def iteration_loader(self) -> IterationLoader[Any]:
        """Make the training loader, starting at the current iteration; the datamodule asks for it."""
        raise NotImplementedError

    def train_dataloader(self) -> IterationLoader[Any]:
        """Return the iterations to a trainer without a datamodule."""
        return self.iteration_loader()

    def val_dataloader(self) -> NoLoaders:
        """Return nothing: see :meth:`validation_step`."""
        return NoLoaders()

    def configure_callbacks(self) -> list[Callback]:
        """Add a writer of the set where the trainer has none."""
        return self.missing_callbacks(SyntheticSetWriter)

    def keep_real(self, real: tuple[Tensor, Tensor] | None) -> None:
        """Keep the argument ``real``, images (N, C, H, W) of floats and classes (N,) int64.

        Raises:
            InputError: for other shapes or types, values that are not finite, or another number of labels than images.
        """
        if real is None:
            return
        if len(real) != 2 or not all(isinstance(part, Tensor) for part in real):
            raise InputError("real: is not a pair of tensors, images and labels")
        self._real = Images(*real)
        check_images(self._real.images.float(), "images", "real")
        check_labels(self._real.labels, len(self._real.images), None, "class", "real")

    def make_images(self) -> None:
        """Make the initial synthetic set, from the argument ``real`` or the data source's training images.

        Raises:
            InputError: where there are neither, or too few of a class.
        """
        if self._loaded_shape is not None:  # the checkpoint's images follow
            self.images = nn.Parameter(torch.zeros(self._loaded_shape))
            self.register_buffer("labels", torch.zeros(len(self.images), dtype=torch.long))
            return
        ipc, seed = self.hparams["ipc"], self.hparams["seed"]
        start = random_real_images(self.real_images(), ipc, seed)
        images = start.images
        if self.hparams["init"] == "noise":
            images = torch.randn(images.shape, generator=make_generator(seed, "initial noise"))
        self.images = nn.Parameter(images.clone())
        self.register_buffer("labels", start.labels.clone())
        self.initial_images = images.clone()

    def real_images(self) -> Images:
        """Return the argument ``real``, or the data source's training images.

        Raises:
            InputError: where there are neither.
        """
        if self._real is not None:
            return self._real
        if self.source is None:
            raise InputError(
                "distillation starts from real images: fit with a DistillationDataModule (from_datasets and "
                "from_datamodule make one of yours), or give the argument real"
            )
        return self.source.part("train")

    def on_train_start(self) -> None:
        """Refuse batches that are not this module's iterations.

        Raises:
            InputError: for another loader.
        """
        if not isinstance(self.trainer.train_dataloader, IterationLoader):
            raise InputError(
                "a distillation iterates over its own loader, but the datamodule brings another: wrap it with "
                "DistillationDataModule.from_datamodule, or fit without a datamodule"
            )

    def logged(self, loss: Tensor) -> Tensor:
        """Log a loss and return it; the images change with it, so scores of the old ones are forgotten."""
        self.scores = {}
        self._loss = loss.detach()
        self.log("matching/loss", self._loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: to measure a set is to train networks on it, which ``EvaluateSynthetic`` does.

        Lightning warns of every datamodule with held-out images whose module lacks this.
        """

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Judge the step, on all ranks together; log gradient norms."""
        learned = {"images": self.images, "step_size": self.step_size}
        norms = {name: value.grad.norm() for name, value in learned.items() if value.grad is not None}
        assert self._loss is not None
        self._finite.before(optimizer, [self._loss, *norms.values()], reduce=self._minimum_over_ranks)
        self.log_dict({f"gradient_norm/{name}": norm for name, norm in norms.items()}, batch_size=1)

    def _minimum_over_ranks(self, flag: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return flag

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, unless the step is not finite."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._finite.after(self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the count of skipped steps; stop a run that only diverges."""
        self.log("matching/skipped_steps", self._finite.skipped.float(), prog_bar=True, batch_size=1)
        # Reading a number on the CPU costs nothing.
        if (self.device.type == "cpu" or self.step % MAX_SKIPPED == 0) and self.skipped_in_a_row >= MAX_SKIPPED:
            raise DivergenceError(
                f"loss or gradient not finite {self.skipped_in_a_row} iterations in a row, the last one "
                f"{self.step - 1}; the images on disk are those before; lower the learning rates"
            )

    def step_was_applied(self) -> Tensor:
        """Say whether the last step moved the images: a bool scalar on the device."""
        return self._finite.finite

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._finite.skipped)

    @property
    def skipped_in_a_row(self) -> int:
        """Number of skipped steps since the last good one; waits for the device."""
        return int(self._finite.in_a_row)

    def extra_state(self) -> dict[str, Any]:
        """Keep the counts that the set records."""
        return {"skipped_steps": self._finite.state(), "iterations": self.step}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Continue to count."""
        self._finite.load(state["skipped_steps"])
        self._loaded_iterations = int(state["iterations"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load; without a trainer the images take their shape from the checkpoint."""
        if not self.attached:
            self._loaded_shape = checkpoint["state_dict"]["images"].shape
        super().on_load_checkpoint(checkpoint)

    def learned_images(self) -> dict[str, Tensor]:
        """Return the live images by kind; see ``contracts.LearnsSet``."""
        average = {} if self.ema_images is None else {"ema": self.ema_images}
        return {"raw": self.images, **average}

    def keep_average(self, average: Tensor, initial_weight: Tensor) -> None:
        """Take a tensor as the moving average of the images; see ``contracts.LearnsSet``."""
        self.ema_images, self._initial_weight = average, initial_weight

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

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters that the set's metadata contains."""
        return {**plain_settings(self.hparams), "augment": self.augment.plain()}

    def synthetic_set(self) -> SyntheticSet:
        """Return the current synthetic set, on the CPU, with everything that describes it."""
        data, classes = self.data, [str(label) for label in self.labels.unique().tolist()]
        return SyntheticSet(
            images=self.images.detach().cpu().clone(),
            labels=self.labels.cpu().clone(),
            step_size=self.step_size.detach().cpu().clone(),
            ema_images=None if self.ema_images is None else self.ema_images.cpu().clone(),
            class_names=classes if data is None else list(data.class_names),
            transform=Standardization([0.0], [1.0]) if data is None else data.transform,
            metadata={
                "method": self.method,
                "augmentation": self.augment.describe(),
                **self.set_metadata(),
                "settings": self.settings(),
                "iterations": self.step if self.attached else self._loaded_iterations,
                "skipped_steps": self.skipped_steps,
                **({} if self._initial_weight is None else {"ema_initial_weight": float(self._initial_weight)}),
                **({"scores": dict(self.scores)} if self.scores else {}),
                "versions": versions(),
            },
        )
