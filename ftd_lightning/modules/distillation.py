"""What all distillations share: a synthetic set that is learned, its initial images, its optimizer, its description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ftd_lightning.data.coresets import random_real_images
from ftd_lightning.data.files import versions
from ftd_lightning.data.images import Images
from ftd_lightning.data.iterations import IterationLoader
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.data.transform import Standardization
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.training.finite_steps import MAX_SKIPPED, FiniteSteps
from ftd_lightning.training.fresh_networks import plain_settings

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from ftd_lightning.training.fresh_networks import FreshNetworks

Init = Literal["real", "noise"]


class Distillation(LightningModule):
    """The base of all methods that learn synthetic images by gradient steps.

    Automatic optimization: one optimizer, one global step an iteration; the number of iterations is the trainer's
    ``max_steps``. A method says what its loss is (``training_step``, which returns it through :meth:`logged`), which
    batches it wants (``iteration_loader``), and what its set says of it (``method``, ``description``). Its
    hyper-parameters include ``ipc``, ``init``, ``seed``, ``augment`` and ``augment_mode``.

    A step whose loss or gradient is not finite is skipped (images and momentum stay as they are), counted in
    ``matching/skipped_steps``, and after ten in a row the run ends with a ``DivergenceError``. Neither makes the host
    wait for the device: there the count is read every tenth iteration.

    Attributes:
        images: (ipc * K, C, H, W) parameter, class by class.
        labels: (ipc * K,) int64.
        step_size: scalar: the learning rate that networks are to be trained with on the set.
        initial_images: a copy of where the images started.
        ema_images: their moving average, where a ``SyntheticEMA`` keeps one.
        fresh: builds networks of the architecture that the set is made for.
        scores: what ``EvaluateSynthetic`` measured of the present images.
    """

    images: nn.Parameter
    step_size: nn.Parameter | Tensor
    labels: Tensor
    fresh: FreshNetworks

    def __init__(self) -> None:
        super().__init__()
        self._real: Images | None = None
        self._finite = FiniteSteps()
        self._loss: Tensor | None = None
        self.ema_images: Tensor | None = None
        self.initial_images: Tensor | None = None
        self.scores: dict[str, dict[str, float | int]] = {}

    @property
    def method(self) -> str:
        """Short name of the method, as tables have it."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """Say what the set's metadata tells beyond settings: at least "dataset" and "network"."""
        raise NotImplementedError

    def iteration_loader(self) -> IterationLoader[Any]:
        """Make the training loader; the datamodule asks for it."""
        raise NotImplementedError

    def train_dataloader(self) -> IterationLoader[Any]:
        """Give the iterations to a trainer without a datamodule."""
        return self.iteration_loader()

    def make_images(self) -> None:
        """Make the initial synthetic set, from the argument ``real`` or the datamodule's training images.

        Raises:
            InputError: where there are neither, or too few of a class.
        """
        real = self._real or getattr(getattr(self.trainer, "datamodule", None), "train", None)
        if not isinstance(real, Images):  # another datamodule's "train" may be anything
            raise InputError("distillation starts from real images: give a DistillationDataModule or the argument real")
        ipc, seed = self.hparams["ipc"], self.hparams["seed"]
        start = random_real_images(real, ipc, seed)
        pictures = start.pictures
        if self.hparams["init"] == "noise":
            pictures = torch.randn(pictures.shape, generator=make_generator(seed, "initial noise"))
        self.images = nn.Parameter(pictures.clone())
        self.register_buffer("labels", start.labels.clone())
        self.initial_images = pictures.clone()

    def on_train_start(self) -> None:
        """Refuse what would make another optimization of it.

        Raises:
            InputError: for batches that are no iterations of this module, or gradients accumulated over several.
        """
        if not isinstance(self.trainer.train_dataloader, IterationLoader):
            raise InputError(
                "a distillation iterates over its own loader: let the datamodule's train_dataloader return "
                "trainer.lightning_module.iteration_loader(), or fit without a datamodule"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise InputError(
                "trainer.accumulate_grad_batches must be 1 in a distillation; TrajectoryMatching averages several "
                "segments with model.segments_per_step"
            )

    def logged(self, loss: Tensor) -> Tensor:
        """Log a loss and hand it on; the images change with it, so what was measured of them is forgotten."""
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
        return self.trainer.strategy.reduce(flag, reduce_op="min")  # type: ignore[return-value]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, unless the step is not finite."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._finite.after(self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the count of skipped steps; stop a run that only diverges."""
        self.log("matching/skipped_steps", self._finite.skipped.float(), prog_bar=True, batch_size=1)
        # To read a CPU's number costs nothing.
        if (self.device.type == "cpu" or self.global_step % MAX_SKIPPED == 0) and self.skipped_in_a_row >= MAX_SKIPPED:
            raise DivergenceError(
                f"loss or gradient not finite {self.skipped_in_a_row} iterations in a row, the last one "
                f"{self.global_step - 1}; the images on disk are those before; lower the learning rates"
            )

    @property
    def last_step_finite(self) -> Tensor:
        """Whether the last step moved the images: a bool scalar on the device."""
        return self._finite.finite

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._finite.skipped)

    @property
    def skipped_in_a_row(self) -> int:
        """Number of skipped steps since the last good one; waits for the device."""
        return int(self._finite.in_a_row)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of skipped steps."""
        checkpoint["skipped_steps"] = self._finite.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the count up again."""
        self._finite.load(checkpoint.get("skipped_steps", (0, 0)))

    def settings(self) -> dict[str, Any]:
        """Give the hyper-parameters that the set's metadata holds."""
        return plain_settings(self.hparams)

    def synthetic_set(self) -> SyntheticSet:
        """Give the present synthetic set, on the CPU, with all that describes it."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return SyntheticSet(
            images=self.images.detach().cpu().clone(),
            labels=self.labels.cpu().clone(),
            step_size=self.step_size.detach().cpu().clone(),
            ema_images=None if self.ema_images is None else self.ema_images.cpu().clone(),
            class_names=getattr(datamodule, "class_names", [str(label) for label in self.labels.unique().tolist()]),
            transform=getattr(datamodule, "transform", Standardization([0.0], [1.0])),
            metadata={
                "method": self.method,
                "augmentation": {"strategy": self.hparams["augment"], "mode": self.hparams["augment_mode"]},
                **self.description(),
                "settings": self.settings(),
                "iterations": self.global_step,
                "skipped_steps": self.skipped_steps,
                **({"scores": dict(self.scores)} if self.scores else {}),
                "versions": versions(),
            },
        )
