"""Teachers: networks trained by GSAM or SGD, many in one fit, whose weights are recorded."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import MeanMetric

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.trajectory_recorder import TrajectoryRecorder
from ftd_lightning.contracts import BatchPlan, TeacherProgress
from ftd_lightning.core.losses import CompiledPass, CompiledStep
from ftd_lightning.core.module import BaseModule, computes_bf16
from ftd_lightning.core.networks import Network, add_to_mean, refuse_dropout, right_answers
from ftd_lightning.core.ranks import RankStates, average_over_ranks, refuse_split_loaders
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import versions
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.optim import GSAM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

LONGEST = 1 << 20  # epochs; no teacher has as many

Parallel = Literal["teachers", "data"]
Precision = Literal["float32", "bf16", "auto"]


class FlatTeacher(BaseModule):
    """Trains many teachers in one fit, one after the other, each from its own seed.

    A Lightning epoch is one epoch of one teacher on each rank: epoch e of the fit on rank r of W is epoch
    ``e % epochs`` of teacher ``e // epochs * W + r``. The fit ends by itself after the last teacher.
    A ``TrajectoryRecorder`` records them; the module adds one where the trainer has none. Works with any datamodule of
    (images, labels) batches and any network whose weights are floating-point parameters.

    Under DDP every rank trains other teachers on all images, and W ranks produce the teachers of one process, bit for
    bit, where the order of batches comes from a ``DistillationDataModule``. With ``parallel="data"`` all ranks train
    one teacher, and each batch is split: every rank computes both gradients on its part without synchronisation, and
    the combined direction is averaged, as the authors of GSAM do.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network, e.g. ``{"width": 32, "depth": 2}``.
        teachers: how many; more can be added later, by a resumed run with a larger number.
        epochs: of each teacher.
        lr: of plain SGD.
        momentum: of SGD; the paper's is 0.
        weight_decay: of SGD; the paper's is 0.
        rho: radius of GSAM's ball; 0 is plain SGD, the teachers of MTT.
        alpha: of GSAM.
        adaptive: the ASAM ball. The paper's Eq. 12 is the plain one; its authors' published run uses the adaptive one.
        augment: DSA: an ``Augmentation``, its fields as a mapping, or a strategy; "" for none. One augmented batch
            serves both passes.
        seed: teacher k's initialisation, batches and augmentation follow from (seed, k).
        parallel: whether processes of a DDP run train different "teachers", or share the "data" of one teacher.
        compile: compile a pass over a batch: True, False, or "auto" (on a GPU only); "cuda_graphs": on a full batch the
            whole step, as one CUDA graph, which keeps no gradients (of one teacher on plain SGD, not with
            ``parallel="data"``). A resumed run may change it, and the last bits of its weights then differ.
        precision: of a Trainer of Lightning's default precision: "float32"; "bf16", which is its "bf16-mixed", where
            passes compute in bf16, and weights, both gradients and what GSAM makes of them stay float32; or "auto",
            bf16 where the device has instructions for it. The store records it, and a resumed run keeps it. bf16 rounds
            away most of a perturbation by the adaptive ball of a small rho.

    Attributes:
        network: the teacher being trained.
        independent_ranks: whether each process trains other teachers, on all images.

    Raises:
        InputError: when the fit starts, for a network with dropout: a student must be a function of its weights.
    """

    network: nn.Module

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        teachers: int = 100,
        epochs: int = 50,
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rho: float = 0.01,
        alpha: float = 1.0,
        adaptive: bool = False,
        augment: Augmentation | dict[str, Any] | str = Augmentation(),  # noqa: B008  frozen
        seed: int = 0,
        parallel: Parallel = "teachers",
        compile: Compile = "auto",  # noqa: A002
        precision: Precision = "float32",
    ) -> None:
        check_bounds(FlatTeacher, locals())
        if parallel not in get_args(Parallel):
            raise InputError(f"parallel={parallel!r} is unknown: choose from {list(get_args(Parallel))}")
        if precision not in get_args(Precision):
            raise InputError(f"precision={precision!r} is unknown: choose from {list(get_args(Precision))}")
        compiles(compile, torch.device("cpu"))  # refuses an unknown setting
        super().__init__(network=network, network_options=network_options, augment=Augmentation.of(augment), seed=seed)
        # A resumed fit may change the first two: the number of teachers may grow. The third becomes the trainer's.
        self.save_arguments(locals(), leave_out=("teachers", "compile", "precision"), augment=self.augment)
        self.automatic_optimization = False
        self.teachers = teachers
        self.independent_ranks = parallel == "teachers"
        self._compile: Compile = compile
        self._precision: Precision = precision
        self._states = RankStates()
        self._step: CompiledStep | None = None

    @property
    def _share(self) -> tuple[int, int]:
        """This rank and their number, where each trains other teachers; else 0 and 1."""
        return (self.global_rank, self.trainer.world_size) if self.attached and self.independent_ranks else (0, 1)

    def teacher_at(self, epoch: int) -> tuple[int, int]:
        """Return the teacher, from 0, that this rank trains in an epoch of the fit, and the epoch of that teacher."""
        rank, world_size = self._share
        number, teacher_epoch = divmod(epoch, int(self.hparams["epochs"]))
        return number * world_size + rank, teacher_epoch

    def data_epoch(self, epoch: int) -> int:
        """Return the number that seeds batches and augmentation in an epoch of the fit."""
        teacher, teacher_epoch = self.teacher_at(epoch)
        return teacher * LONGEST + teacher_epoch  # whatever ``epochs`` is: a longer teacher begins with the shorter one

    def batch_plan(self) -> BatchPlan:
        """Deal all images to each process, or each process its share; see ``contracts.PlansBatches``."""
        rank, world_size = (0, 1) if self.independent_ranks else (self.global_rank, self.trainer.world_size)
        return BatchPlan(rank, world_size, epoch=self.data_epoch)

    def teacher_progress(self) -> TeacherProgress:
        """Return the progress of the fit; see ``contracts.TrainsTeachers``."""
        teacher, epoch = self.teacher_at(self.current_epoch)
        records = teacher < self.teachers if self.independent_ranks else self.global_rank == 0
        return TeacherProgress(teacher, epoch, self.hparams["epochs"], self.teachers, records)

    def progress_label(self) -> str:
        """Name teacher and epoch."""
        teacher, epoch = self.teacher_at(self.current_epoch)
        return f"teacher {min(teacher, self.teachers - 1) + 1}/{self.teachers}, epoch {epoch + 1}"

    def planned_epochs(self) -> int:
        """Return the number of epochs that all teachers take."""
        return -(-self.teachers // self._share[1]) * int(self.hparams["epochs"])

    def build(self) -> None:
        """Build the network and its metrics."""
        self.network = self.fresh.build(self.seed, "teacher", 0)
        if self.data is not None:
            refuse_dropout(self.network, self.data.shape.zeros(2))
        # A look for NaN would wait for the device in every step. Independent ranks measure their teachers alone.
        mean = partial(MeanMetric, nan_strategy="disable", sync_on_compute=not self.independent_ranks)
        self.train_loss, self.train_accuracy, self.val_accuracy = mean(), mean(), mean()
        for metric in (self.train_loss, self.train_accuracy):
            metric.persistent(True)  # an epoch that is resumed in its middle is measured whole

    def setup(self, stage: str) -> None:
        """Make bf16 the trainer's precision where ``precision`` asks for it, as ``Trainer(precision=...)`` does."""
        strategy = self.trainer.strategy
        device = strategy.root_device
        bf16 = self._precision == "bf16" or (self._precision == "auto" and computes_bf16(device))
        if bf16 and self.trainer.precision == "32-true":
            strategy.precision_plugin = MixedPrecision("bf16-mixed", device.type)

    def configure_model(self) -> None:
        """Build the network for the trainer's data."""
        super().configure_model()
        if self._built and self.independent_ranks and self.trainer.world_size > 1:
            self._states.remember(self)

    def configure_callbacks(self) -> list[Callback]:
        """Add a recorder where the trainer has none; refuse settings before Lightning names its own optimization."""
        trainer = self.trainer
        if trainer.gradient_clip_val or trainer.accumulate_grad_batches != 1:
            raise InputError(
                "FlatTeacher takes one unclipped step per batch: leave out trainer.gradient_clip_val and "
                "trainer.accumulate_grad_batches"
            )
        return [*super().configure_callbacks(), *self.missing_callbacks(TrajectoryRecorder)]

    def configure_optimizers(self) -> GSAM:
        """Wrap plain SGD in GSAM."""
        sgd = partial(torch.optim.SGD, **{key: self.hparams[key] for key in ("lr", "momentum", "weight_decay")})
        ball = {key: self.hparams[key] for key in ("rho", "alpha", "adaptive")}
        reduce = None if self.independent_ranks else partial(average_over_ranks, self.trainer)
        return GSAM(list(self.network.parameters()), sgd, **ball, reduce=reduce)

    def on_fit_start(self) -> None:
        """Refuse settings and callbacks that take several teachers for one network; restore this rank's weights."""
        super().on_fit_start()
        several = self.planned_epochs() > self.hparams["epochs"]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging):
                raise InputError("StochasticWeightAveraging would average weights of different teachers: leave it out")
            if several and isinstance(callback, EarlyStopping) and callback.monitor.startswith("teacher/"):
                raise InputError(
                    f"EarlyStopping compares {callback.monitor} of a teacher with the best of earlier teachers, and "
                    "ends the whole fit: leave it out, or fit one teacher"
                )
        self._states.restore(self)

    def on_train_start(self) -> None:
        """End a finished fit at once; refuse loaders that split the images of independent ranks; compile."""
        self.warn_of_unordered_loader()
        batch = None if self.data is None else self.data.batch_size
        split = not self.independent_ranks and self.trainer.world_size > 1
        self._pass = CompiledPass(self.network, self._compile, self.device, None if split else batch)
        gsam, self._step = self.optimizers(use_pl_optimizer=False), None
        assert isinstance(gsam, GSAM)
        if batch and self._compile == "cuda_graphs" and self.independent_ranks and CompiledStep.takes(gsam):
            self._step = CompiledStep(self.network, gsam, self.device, batch)
        if self.independent_ranks:
            refuse_split_loaders(self.trainer, or_else="--model.parallel data, which splits the batches of one teacher")
        self.trainer.should_stop = self.trainer.should_stop or self.current_epoch >= self.planned_epochs()
        if not self.trainer.fast_dev_run and 0 <= (self.trainer.max_epochs or 0) < self.planned_epochs():  # type: ignore[attr-defined]
            rank_zero_warn(
                f"trainer.max_epochs={self.trainer.max_epochs} ends this fit before its {self.teachers} teachers of "
                f"{self.hparams['epochs']} epochs are done; -1 trains them all"
            )

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Restore the weights of this rank."""
        if self.attached and self.independent_ranks:
            self._states.load(self, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teachers of all ranks."""
        super().on_save_checkpoint(checkpoint)
        if self.independent_ranks:
            self._states.save(self, checkpoint)

    def on_train_epoch_start(self) -> None:
        """Begin a new teacher where the last one ended."""
        teacher, epoch = self.teacher_at(self.current_epoch)
        if epoch > 0:
            return
        self.network.load_state_dict(self.fresh.build(self.seed, "teacher", teacher).state_dict())
        self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]  # momentum, where there is any

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take one GSAM step on a batch of (images, labels)."""
        images, labels = batch
        optimizer = self.optimizers()
        gsam = optimizer.optimizer  # type: ignore[union-attr]
        assert isinstance(gsam, GSAM)
        if self.global_step == 0 and self.data is None:
            refuse_dropout(self.network, images)
        if self.augment:
            epoch, rank = self.data_epoch(self.current_epoch), 0 if self.independent_ranks else self.global_rank
            images = self.augment(images, self.generator("dsa", epoch, batch_idx, rank))
        first: dict[str, Tensor] = {}

        def closure() -> Tensor:
            if self._step is not None and len(labels) == self._step.full_batch:
                loss, logits = self._step(images, labels)
            else:
                loss, logits = self._pass(images, labels, perturbed=gsam.perturbed, backward=self.manual_backward)
            first.setdefault("logits", logits)
            first.setdefault("loss", loss)
            return loss

        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            optimizer.step(closure=closure)  # type: ignore[union-attr, call-arg]
        count = len(labels)
        add_to_mean(self.train_loss, first["loss"] * count, count)
        add_to_mean(self.train_accuracy, (first["logits"].argmax(1) == labels).sum(), count)
        if not self.epoch_complete:  # once for each epoch, because to log takes the host as long as a pass
            return
        for name, metric in (("train_loss", self.train_loss), ("train_accuracy", self.train_accuracy)):
            metric.update(torch.empty(0, device=self.device))  # else it warns of having had none
            self.log(f"teacher/{name}", metric, on_step=False, on_epoch=True)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, K) of the teacher being trained."""
        return self.network(images)  # type: ignore[no-any-return]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return logits (N, K)."""
        return self(batch[0])  # type: ignore[no-any-return]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure accuracy on held-out images."""
        add_to_mean(self.val_accuracy, right_answers(self.network(batch[0]), batch[1]).sum(), len(batch[1]))

    def on_validation_epoch_end(self) -> None:
        """Log it."""
        self.val_accuracy.update(torch.empty(0, device=self.device))
        self.log("teacher/val_accuracy", self.val_accuracy, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """End the fit after the last teacher."""
        if self.epoch_complete:
            self.trainer.should_stop = self.trainer.should_stop or self.current_epoch + 1 >= self.planned_epochs()

    def trajectory_metadata(self) -> dict[str, Any]:
        """Return the store's entries beside the weights; see ``TrajectoryStore.metadata``."""
        keys, data = ("rho", "alpha", "adaptive", "lr", "momentum", "weight_decay"), self.data
        return {
            **{key: self.hparams[key] for key in keys},
            **({"transform": None} if data is None else data.metadata()),
            "optimizer": "GSAM(SGD)" if self.hparams["rho"] > 0 else "SGD",
            "batch_size": None if data is None else data.batch_size,
            "augmentation": self.augment.describe(),
            "network": self.fresh.describe(),
            "seed": derive_seed(self.seed, "teacher", self.teacher_at(self.current_epoch)[0]),
            "versions": versions(),
        }
