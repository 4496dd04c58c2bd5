"""The distillation phase: synthetic images and step size learned by matching teacher segments (Eq. 4-5)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ftd_lightning.data.datamodule import random_real_images
from ftd_lightning.data.datasets import Images
from ftd_lightning.data.files import versions
from ftd_lightning.data.segments import SegmentBatch, SegmentLoader
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.data.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.data.transform import Standardization
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional.augment import STRATEGY, Mode, dsa, parse_strategy
from ftd_lightning.functional.matching import trajectory_matching_loss
from ftd_lightning.functional.robust import Residual, start_noise
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.unroll import Unroll, chunked_permutations
from ftd_lightning.modules.networks import Network, plain_network, plain_settings, student_networks

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

MAX_SKIPPED = 10
# Far below any step size that trains a network, far above float32's smallest number.
SMALLEST_STEP_SIZE = 1e-8
COUNTS = ("ipc", "syn_steps", "syn_batch", "iterations_per_epoch")


class TrajectoryMatching(LightningModule):
    """Learns a synthetic set whose training trajectory follows the teachers'.

    FTD and MTT differ in the teachers alone, so this serves both. Automatic optimization: one SGD with two parameter
    groups, one global step an iteration; the number of iterations is the trainer's ``max_steps``.

    The step size is kept positive by projection: after an update it is raised to 1e-8 where it fell below. It stays a
    plain parameter, so the paper's learning rate for it means what it means there; a log or softplus
    parametrisation would rescale it.

    A step whose loss or gradient is not finite is skipped (weights and momentum stay as they are), counted in
    ``matching/skipped_steps``, and after ten in a row the run ends with a ``DivergenceError``.

    Args:
        trajectories: folder of the trajectory store.
        network: the student; None takes the teachers'. One that differs from theirs is refused.
        network_options: for a named network.
        ipc: synthetic images per class.
        init: "real" starts from random real images of each class, "noise" from a standard normal.
        syn_steps: n, inner SGD steps.
        expert_epochs: m, teacher epochs that they match.
        max_start_epoch: segments start at an epoch in {0 .. max_start_epoch - 1}.
        syn_batch: synthetic images an inner step; None takes all of them.
        lr_images: learning rate of the pixels.
        lr_step_size: learning rate of the step size.
        step_size_init: inner learning rate at the start.
        momentum: of both.
        augment: DSA strategy of the inner steps; "" for none.
        augment_mode: "single" or "multiple".
        unroll: "adjoint" (memory of one step) or "graph".
        iterations_per_epoch: iterations that make a Lightning epoch: the rhythm of evaluation, pictures and files.
        seed: decides initial images, segments, mini-batches, augmentation and noise.
        real: images (N, C, H, W) and labels (N,) that the teachers saw, to start from; with a
            DistillationDataModule they are its training images, and this stays None.
        robust: kappa of robust learning (Eq. 9): noise of about kappa times the segment's length on the start weights,
            drawn anew every iteration. The paper does not give its sigma; see ``functional.robust``. None: no noise.
        robust_residual: compare the student's "displacement" (Eq. 9 as written) or its "endpoint".

    Attributes:
        images: (ipc * K, C, H, W) parameter, class by class.
        labels: (ipc * K,) int64.
        step_size: scalar parameter.
        initial_images: a copy of where the images started.
        ema_images: their moving average, where a ``SyntheticEMA`` keeps one.

    Raises:
        InputError: at ``setup``, for teachers that do not fit or segments that were not recorded.
    """

    images: nn.Parameter
    step_size: nn.Parameter
    labels: Tensor

    def __init__(
        self,
        trajectories: str,
        network: Network | None = None,
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
        init: Literal["real", "noise"] = "real",
        syn_steps: int = 30,
        expert_epochs: int = 2,
        max_start_epoch: int = 20,
        syn_batch: int | None = None,
        lr_images: float = 100.0,
        lr_step_size: float = 1e-5,
        step_size_init: float = 0.01,
        momentum: float = 0.5,
        augment: str = STRATEGY,
        augment_mode: Mode = "single",
        unroll: Unroll = "adjoint",
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        robust: float | None = None,
        robust_residual: Residual = "displacement",
    ) -> None:
        super().__init__()
        for name, value in zip(COUNTS, (ipc, syn_steps, syn_batch, iterations_per_epoch), strict=True):
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if step_size_init <= 0:
            raise InputError(f"step_size_init={step_size_init} must be positive")
        if robust is not None and not 0 <= robust < float("inf"):
            raise InputError(f"robust={robust} must be 0 or a positive number")
        parse_strategy(augment)
        self.save_hyperparameters(ignore=["real", *plain_network(network)])
        self._architecture = network
        self._real = None if real is None else Images(*real)
        self._augment = partial(dsa, strategy=augment, mode=augment_mode) if augment else None
        self.skipped_steps = self.skipped_in_a_row = 0
        self.ema_images: Tensor | None = None
        self.initial_images: Tensor | None = None
        self.scores: dict[str, dict[str, float | int]] = {}  # what EvaluateSynthetic measured of the present images

    def setup(self, stage: str) -> None:
        """Open the store, check that it fits, and make the initial synthetic set."""
        if self.initial_images is not None:
            return
        hparams, datamodule = self.hparams, getattr(self.trainer, "datamodule", None)
        self.store = TrajectoryStore(hparams["trajectories"])
        describe = getattr(datamodule, "describe", None)
        if describe:
            check_compatible(self.store, describe())
        self.fresh = student_networks(self.store, self._architecture, hparams["network_options"], datamodule)
        # In a list: no submodule, so neither in checkpoints nor among DDP's parameters.
        self._student = [self.fresh.build(0).requires_grad_(False).train()]
        self.segment_loader()  # complains of segments beyond the record before anything else is done
        start = self._initial_set(self._real or getattr(datamodule, "train", None))
        self.images = nn.Parameter(start.pictures.clone())
        self.step_size = nn.Parameter(torch.tensor(float(hparams["step_size_init"])))
        self.register_buffer("labels", start.labels.clone())
        self.initial_images = start.pictures.clone()

    def _initial_set(self, real: Images | None) -> Images:
        if real is None:
            raise InputError("distillation starts from real images: give a DistillationDataModule or the argument real")
        ipc, seed = self.hparams["ipc"], self.hparams["seed"]
        start = random_real_images(real, ipc, seed)
        if self.hparams["init"] == "real":
            return start
        noise = torch.randn(start.pictures.shape, generator=make_generator(seed, "initial noise"))
        return Images(noise, start.labels)

    def train_dataloader(self) -> SegmentLoader:
        """Give the segments to a trainer without a datamodule."""
        return self.segment_loader()

    def segment_loader(self) -> SegmentLoader:
        """Make the training loader; the datamodule asks for it."""
        return SegmentLoader(
            self.store,
            expert_epochs=self.hparams["expert_epochs"],
            max_start_epoch=self.hparams["max_start_epoch"],
            length=self.hparams["iterations_per_epoch"],
            seed=self.hparams["seed"],
            rank=self.global_rank,
        )

    def configure_optimizers(self) -> torch.optim.SGD:
        """Give images and step size a parameter group each."""
        groups = [
            {"params": [self.images], "lr": self.hparams["lr_images"]},
            {"params": [self.step_size], "lr": self.hparams["lr_step_size"]},
        ]
        return torch.optim.SGD(groups, momentum=self.hparams["momentum"])

    def on_fit_start(self) -> None:
        """Bring the student to the device; refuse half precision, in which close weight vectors cancel."""
        if str(self.trainer.precision).endswith("-true") and not str(self.trainer.precision).startswith(("32", "64")):
            raise InputError(
                f"trainer.precision={self.trainer.precision}: the loss is a difference of close weights; use 32-true"
            )
        self._student[0].to(self.device)

    def training_step(self, batch: SegmentBatch, batch_idx: int) -> Tensor:
        """Compute the matching loss of one segment."""
        iteration, step = batch["iteration"], self.global_step
        self.scores = {}  # those of the images before this step
        if iteration != step:
            raise RuntimeError(f"segment {iteration} came at step {step}: the run would not be reproducible")
        seed, rank = self.hparams["seed"], self.global_rank
        order, size = make_generator(seed, "batches", iteration, rank), self.hparams["syn_batch"]
        batches = chunked_permutations(len(self.images), self.hparams["syn_steps"], order, batch_size=size)
        loss = trajectory_matching_loss(
            self._student[0],
            batch["start"],
            batch["target"],
            self.images,
            self.labels,
            self.step_size,
            batches=batches,
            augment=self._augment,
            seed=derive_seed(seed, "dsa", iteration, rank),
            unroll=self.hparams["unroll"],
            noise=self._noise(batch),
            residual=self.hparams["robust_residual"],
        )
        self._loss_is_finite = bool(torch.isfinite(loss))
        self.log("matching/loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log("matching/start_epoch", float(batch["start_epoch"]), batch_size=1)
        return loss

    def _noise(self, batch: SegmentBatch) -> Tensor | None:
        kappa = self.hparams["robust"]
        generator = make_generator(self.hparams["seed"], "robust", batch["iteration"], self.global_rank)
        return start_noise(batch["start"], batch["target"], generator, kappa=kappa) if kappa else None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: to measure a set is to train networks on it, which ``EvaluateSynthetic`` does.

        Lightning warns of every datamodule with held-out images whose module lacks this.
        """

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop a step that is not finite, on all ranks together; log gradient norms."""
        norms = {name: getattr(self, name).grad.norm() for name in ("images", "step_size")}
        finite = self._loss_is_finite and all(bool(torch.isfinite(norm)) for norm in norms.values())
        if not self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            # Without gradients SGD moves neither parameters nor momentum, and the global step goes on.
            self.images.grad = self.step_size.grad = None
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.log_dict({f"gradient_norm/{name}": norm for name, norm in norms.items()}, batch_size=1)
        self.log("matching/skipped_steps", float(self.skipped_steps), prog_bar=True, batch_size=1)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, then project the step size to be positive."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.step_size.clamp_(min=SMALLEST_STEP_SIZE)

    def on_train_batch_end(self, outputs: Any, batch: SegmentBatch, batch_idx: int) -> None:
        """Log the step size; stop a run that only diverges."""
        self.log("matching/step_size", self.step_size.detach(), prog_bar=True, batch_size=1)
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise DivergenceError(
                f"loss or gradient not finite {MAX_SKIPPED} iterations in a row, the last one {batch['iteration']}; "
                "the images on disk are those before; lower lr_images or lr_step_size"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of skipped steps."""
        checkpoint["skipped_steps"] = (self.skipped_steps, self.skipped_in_a_row)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the count up again."""
        self.skipped_steps, self.skipped_in_a_row = checkpoint.get("skipped_steps", (0, 0))

    @property
    def method(self) -> str:
        """Name it by its teachers, "ftd" for flat ones and "mtt" for plain ones, with "+robust" where noise is on."""
        return ("ftd" if self.store.metadata["rho"] > 0 else "mtt") + ("+robust" if self.hparams["robust"] else "")

    def synthetic_set(self) -> SyntheticSet:
        """Give the present synthetic set, on the CPU, with all that describes it."""
        datamodule, teachers = getattr(self.trainer, "datamodule", None), self.store.metadata
        # Where the teachers lay is no property of the set, and would make equal sets unequal files.
        settings = plain_settings(self.hparams)
        settings.pop("trajectories")
        return SyntheticSet(
            images=self.images.detach().cpu().clone(),
            labels=self.labels.cpu().clone(),
            step_size=self.step_size.detach().cpu().clone(),
            ema_images=None if self.ema_images is None else self.ema_images.cpu().clone(),
            class_names=getattr(datamodule, "class_names", [str(label) for label in self.labels.unique().tolist()]),
            transform=getattr(datamodule, "transform", Standardization([0.0], [1.0])),
            metadata={
                "method": self.method,
                "dataset": teachers["dataset"],
                "network": teachers["network"],
                "augmentation": {"strategy": self.hparams["augment"], "mode": self.hparams["augment_mode"]},
                "teachers": {"count": len(self.store), **{k: teachers[k] for k in ("rho", "alpha", "adaptive")}},
                "settings": settings,
                "iterations": self.global_step,
                "skipped_steps": self.skipped_steps,
                **({"scores": dict(self.scores)} if self.scores else {}),
                "versions": versions(),
            },
        )
