"""The distillation phase: synthetic images and step size learned by matching teacher segments (Eq. 4-5)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ftd_lightning.data.images import Images
from ftd_lightning.data.segments import SegmentBatch, SegmentLoader
from ftd_lightning.data.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import STRATEGY, Mode, dsa, parse_strategy
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.inner_step import compile_seconds
from ftd_lightning.functional.matching import trajectory_matching_loss
from ftd_lightning.functional.pruning import Rule, keep_mask
from ftd_lightning.functional.robust import Residual, start_noise
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.unroll import Unroll, chunked_permutations
from ftd_lightning.training.distillation import Distillation, Init
from ftd_lightning.training.fresh_networks import Network, plain_network, student_networks

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

# Far below any step size that trains a network, far above float32's smallest number.
SMALLEST_STEP_SIZE = 1e-8
COUNTS = ("ipc", "syn_steps", "syn_batch", "iterations_per_epoch", "segments_per_step")


class TrajectoryMatching(Distillation):
    """Learns a synthetic set whose training trajectory follows the teachers'.

    FTD and MTT differ in the teachers alone, so this serves both. One SGD with two parameter groups, one global step
    an iteration; the number of iterations is the trainer's ``max_steps``. What it does with steps that are not finite,
    and its attributes, are in ``Distillation``.

    Under DDP every rank matches segments of its own and the gradient is averaged: W ranks with s segments a step learn
    what one process with W * s learns.

    The step size is kept positive by projection: after an update it is raised to 1e-8 where it fell below. It stays a
    plain parameter, so the paper's learning rate for it means what it means there; a log or softplus
    parametrisation would rescale it.

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
        segments_per_step: teacher segments an iteration on each rank, whose losses are averaged.
        compile: compile both inner step functions: "auto" on CUDA only, where a fit is long enough to repay it. Eager,
            with a line that says so, where compilation is not to be had.
        cuda_graphs: replay the compiled steps as CUDA graphs; for small ipc, where launching kernels takes the time.
        prune: share of the parameters that the matching loss leaves out ("drop_largest"), or the similarity below which
            it does ("similarity_below"): parameter pruning, our reading of PP; see ``functional.pruning``. None: none.
        prune_rule: which of the two.
        robust_residual: compare the student's "displacement" (Eq. 9 as written) or its "endpoint".

    Raises:
        InputError: at ``setup``, for teachers that do not fit or segments that were not recorded.
    """

    step_size: nn.Parameter

    def __init__(
        self,
        trajectories: str,
        network: Network | None = None,
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
        init: Init = "real",
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
        segments_per_step: int = 1,
        compile: Compile = "auto",  # noqa: A002
        cuda_graphs: bool = False,
        prune: float | None = None,
        prune_rule: Rule = "drop_largest",
    ) -> None:
        super().__init__()
        counts = (ipc, syn_steps, syn_batch, iterations_per_epoch, segments_per_step)
        for name, value in zip(COUNTS, counts, strict=True):
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if step_size_init <= 0:
            raise InputError(f"step_size_init={step_size_init} must be positive")
        if robust is not None and not 0 <= robust < float("inf"):
            raise InputError(f"robust={robust} must be 0 or a positive number")
        if prune is not None and not 0 <= prune < 1:
            raise InputError(f"prune={prune} must lie in [0, 1)")
        compiles(compile, torch.device("cpu"))  # complains of an unknown setting
        parse_strategy(augment)
        self.save_hyperparameters(ignore=["real", *plain_network(network)])
        self._architecture = network
        self._real = None if real is None else Images(*real)
        self._compile_seconds = 0.0
        self._augment = partial(dsa, strategy=augment, mode=augment_mode) if augment else None

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
        self.iteration_loader()  # complains of segments beyond the record before anything else is done
        self.make_images()
        self.step_size = nn.Parameter(torch.tensor(float(hparams["step_size_init"])))

    def iteration_loader(self) -> SegmentLoader:
        """Make the loader of teacher segments."""
        return SegmentLoader(
            self.store,
            expert_epochs=self.hparams["expert_epochs"],
            max_start_epoch=self.hparams["max_start_epoch"],
            length=self.hparams["iterations_per_epoch"],
            seed=self.hparams["seed"],
            rank=self.global_rank,
            segments=self.hparams["segments_per_step"],
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

    def training_step(self, batch: list[SegmentBatch], batch_idx: int) -> Tensor:
        """Average the matching losses of this rank's segments."""
        # In full precision whatever the trainer's: the backward run is not under its autocast, and would differentiate
        # another function.
        with torch.autocast(self.device.type, enabled=False):
            loss = torch.stack([self._match(segment) for segment in batch]).mean()
        start_epoch = torch.tensor(sum(s["start_epoch"] for s in batch) / len(batch))
        self.log("matching/start_epoch", start_epoch.to(self.device, non_blocking=True), batch_size=1)
        return self.logged(loss)

    def _match(self, segment: SegmentBatch) -> Tensor:
        """Compute the matching loss of one segment."""
        iteration, slot = segment["iteration"], segment["slot"]
        if iteration != self.global_step:
            raise RuntimeError(f"segment {iteration} came at step {self.global_step}: not to be reproduced")
        seed, size = self.hparams["seed"], self.hparams["syn_batch"]
        order = make_generator(seed, "batches", iteration, slot)
        return trajectory_matching_loss(
            self._student[0],
            segment["start"],
            segment["target"],
            self.images,
            self.labels,
            self.step_size,
            batches=chunked_permutations(len(self.images), self.hparams["syn_steps"], order, batch_size=size),
            augment=self._augment,
            seed=derive_seed(seed, "dsa", iteration, slot),
            unroll=self.hparams["unroll"],
            noise=self._noise(segment),
            residual=self.hparams["robust_residual"],
            keep=self._keep if self.hparams["prune"] else None,
            compile=self.hparams["compile"],
            cuda_graphs=self.hparams["cuda_graphs"],
        )

    def _keep(self, student: Tensor, target: Tensor) -> Tensor:
        size, rule = self.hparams["prune"], self.hparams["prune_rule"]
        return keep_mask(student, target, rule=rule, rate=size, epsilon=size)

    def _noise(self, segment: SegmentBatch) -> Tensor | None:
        kappa = self.hparams["robust"]
        generator = make_generator(self.hparams["seed"], "robust", segment["iteration"], segment["slot"])
        return start_noise(segment["start"], segment["target"], generator, kappa=kappa) if kappa else None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, then project the step size to be positive."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.step_size.clamp_(min=SMALLEST_STEP_SIZE)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step size, and say how long compilation took, where anything was compiled."""
        seconds = compile_seconds(self._student[0])
        if seconds > self._compile_seconds:
            self._compile_seconds = seconds
            rank_zero_info(f"compiling the inner step took {seconds:.1f} s, which are no part of its speed")
        self.log("matching/step_size", self.step_size.detach(), prog_bar=True, batch_size=1)
        super().on_train_batch_end(outputs, batch, batch_idx)

    @property
    def method(self) -> str:
        """Name it by its teachers, "ftd" for flat ones and "mtt" for plain ones, and by "+robust" and "+pp"."""
        options = [name for name, key in (("robust", "robust"), ("pp", "prune")) if self.hparams[key]]
        return "+".join(["ftd" if self.store.metadata["rho"] > 0 else "mtt", *options])

    def settings(self) -> dict[str, Any]:
        """Leave out where the teachers lay: no property of the set, it would make equal sets unequal files."""
        settings = super().settings()
        settings.pop("trajectories")
        settings["segments_per_step"] *= self.trainer.world_size  # that of one process which learns the same
        return settings

    def description(self) -> dict[str, Any]:
        """Describe the teachers."""
        teachers = self.store.metadata
        return {
            "dataset": teachers["dataset"],
            "network": teachers["network"],
            "teachers": {"count": len(self.store), **{k: teachers[k] for k in ("rho", "alpha", "adaptive")}},
        }
