"""The buffer phase: teachers trained on real images towards a flat trajectory (Eq. 12-13)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from ftd_lightning.data.files import versions
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import STRATEGY, Mode, dsa, parse_strategy
from ftd_lightning.functional.compiling import compiled
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.optim import GSAM, frozen_running_statistics
from ftd_lightning.training.fresh_networks import FreshNetworks, Network, plain_network, right_answers
from ftd_lightning.training.ranks import RankStates, own_share, refuse_split_loaders

if TYPE_CHECKING:
    from torch import Tensor, nn

Parallel = Literal["teachers", "data"]


class FlatTeacher(LightningModule):
    """Trains many teachers in one fit, one after the other, each from its own seed.

    A Lightning epoch is one epoch of one teacher on each rank: epoch e of the fit on rank r of W is epoch
    ``e % epochs`` of teacher ``e // epochs * W + r``.
    A ``TrajectoryRecorder`` among the trainer's callbacks records them. Works with any datamodule of (images, labels)
    batches and any network whose weights are floating-point parameters.

    Under DDP every rank trains teachers of its own on all images, and W ranks give the teachers of one process, bit for
    bit, where the order of batches comes from a ``DistillationDataModule``. With ``parallel="data"`` all ranks train
    one teacher, and each batch is split: every rank computes both gradients on its part without synchronisation, and
    the combined direction is averaged, as the authors of GSAM do.

    Args:
        network: a name, an import path, a module, or a function that builds one.
        network_options: for a named network, e.g. ``{"width": 32, "depth": 2}``.
        teachers: how many; more can be added later, by a resumed run with a larger number.
        epochs: of each teacher.
        lr: of plain SGD.
        momentum: of SGD; the paper's is 0.
        weight_decay: of SGD; the paper's is 0.
        rho: radius of GSAM's ball; 0 is plain SGD, the teachers of MTT.
        alpha: of GSAM.
        adaptive: the ASAM ball. The paper's Eq. 12 is the plain one, its authors' published run takes the adaptive one.
        augment: DSA strategy; "" for none. One augmented batch serves both passes.
        augment_mode: "single" or "multiple".
        seed: teacher k's initialisation, batches and augmentation follow from (seed, k).
        parallel: what the processes of a DDP run share: "teachers", each its own; "data", the batches of one teacher.

        compile: compile the network's forward and backward pass: True, False, or "auto": on a GPU only. A resumed run
            may take another; the last bits of its weights then differ.

    Raises:
        InputError: for counts below 1, or another ``parallel``.
    """

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
        augment: str = STRATEGY,
        augment_mode: Mode = "single",
        seed: int = 0,
        parallel: Parallel = "teachers",
        compile: bool | Literal["auto"] = "auto",  # noqa: A002
    ) -> None:
        super().__init__()
        if teachers < 1 or epochs < 1:
            raise InputError(f"teachers={teachers} and epochs={epochs} must both be at least 1")
        if parallel not in get_args(Parallel):
            raise InputError(f"parallel={parallel!r} is unknown: choose from {list(get_args(Parallel))}")
        parse_strategy(augment)
        # Lightning lets a checkpoint's hyper-parameters overrule the command line; the number of teachers may grow.
        self.save_hyperparameters(ignore=["teachers", "compile", *plain_network(network)])
        self.automatic_optimization = False
        self.teachers = teachers
        self._compile: bool | Literal["auto"] = compile
        self._architecture = network
        self.network: nn.Module | None = None
        self._states = RankStates()

    @property
    def independent_ranks(self) -> bool:
        """Whether each process trains networks of its own, and its data are all images."""
        return bool(self.hparams["parallel"] == "teachers")

    @property
    def teacher(self) -> int:
        """Number of the teacher being trained in this process, from 0."""
        return self.data_epoch(self.current_epoch) // int(self.hparams["epochs"])

    @property
    def teacher_epoch(self) -> int:
        """Epoch of that teacher, from 0."""
        return int(self.current_epoch % self.hparams["epochs"])

    @property
    def records_teacher(self) -> bool:
        """Whether this process is to record its teacher: one that was asked for, and that no other process records."""
        return self.teacher < self.teachers if self.independent_ranks else self.global_rank == 0

    def data_epoch(self, epoch: int) -> int:
        """Give the epoch that decides on batches and augmentation: the fit's own, had one process trained them all.

        Args:
            epoch: of the fit, on this rank, from 0.
        """
        done, teacher_epoch = divmod(epoch, int(self.hparams["epochs"]))
        if self.independent_ranks and self._trainer is not None:
            done = done * self.trainer.world_size + self.global_rank
        return done * int(self.hparams["epochs"]) + teacher_epoch

    @property
    def _gsam(self) -> GSAM:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, GSAM)
        return optimizer

    def setup(self, stage: str) -> None:
        """Build the network and bound the fit to what the teachers take."""
        datamodule = getattr(self.trainer, "datamodule", None)
        self.fresh = FreshNetworks(self._architecture, self.hparams["network_options"], datamodule)
        if self.network is None:
            self.network = self.fresh.build(self.hparams["seed"], "teacher", 0)
            # Means of right answers: the metrics for classes want to know how many there are. A look for NaN would wait
            # for the device in every step.
            mean = partial(MeanMetric, nan_strategy="disable", sync_on_compute=not self.independent_ranks)
            self.train_loss, self.train_accuracy, self.val_accuracy = mean(), mean(), mean()
            if self.independent_ranks:
                self._states.keep(self)
        if stage == "fit":
            world_size = self.trainer.world_size if self.independent_ranks else 1
            rounds = len(own_share(self.teachers, rank=0, world_size=world_size))
            loop, total = self.trainer.fit_loop, rounds * self.hparams["epochs"]
            if loop.max_epochs is None or loop.max_epochs < 0 or loop.max_epochs > total:
                loop.max_epochs = total
            elif loop.max_epochs < total and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn(
                    f"trainer.max_epochs={loop.max_epochs} ends this fit before its {self.teachers} teachers of "
                    f"{self.hparams['epochs']} epochs are done; -1 trains them all"
                )

    def configure_optimizers(self) -> GSAM:
        """Wrap plain SGD in GSAM."""
        sgd = partial(
            torch.optim.SGD,
            lr=self.hparams["lr"],
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
        )
        return GSAM(
            self.network_parameters(),
            sgd,
            rho=self.hparams["rho"],
            alpha=self.hparams["alpha"],
            adaptive=self.hparams["adaptive"],
            reduce=None if self.independent_ranks else self._average_over_ranks,
        )

    def network_parameters(self) -> list[nn.Parameter]:
        """The weights that a trajectory records, in its order."""
        assert self.network is not None
        return list(self.network.parameters())

    def on_fit_start(self) -> None:
        """Refuse float16 autocast: its loss scaling knows nothing of the perturbation between the two passes."""
        if str(self.trainer.precision).startswith("16"):
            raise InputError(f"trainer.precision={self.trainer.precision} overflows in GSAM: use 32-true or bf16-mixed")
        self._states.restore(self)
        network = self.network
        assert network is not None

        # A function, for Lightning's own methods (self.log) are not to be compiled with it.
        def loss_and_logits(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = network(images)
            return cross_entropy(logits, labels), logits

        self._loss_and_logits = compiled(loss_and_logits, compile=self._compile, device=self.device)

    def on_train_start(self) -> None:
        """Refuse loaders that give a process a part of the images, where each has a teacher of its own."""
        if self.independent_ranks:
            refuse_split_loaders(self.trainer, or_else="--model.parallel data, which splits the batches of one teacher")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the teachers of all ranks."""
        if self.independent_ranks:
            self._states.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with that of this rank."""
        if self.independent_ranks:
            self._states.load(self, checkpoint)

    def on_train_epoch_start(self) -> None:
        """Begin a new teacher where the last one ended."""
        if self.teacher_epoch == 0:
            assert self.network is not None
            fresh = self.fresh.build(self.hparams["seed"], "teacher", self.teacher)
            self.network.load_state_dict(fresh.state_dict())
            self._gsam.state.clear()  # momentum, where there is any

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take one GSAM step on a batch of (images, labels)."""
        images, labels = batch
        part = 0 if self.independent_ranks else self.global_rank
        epoch = self.data_epoch(self.current_epoch)
        generator = make_generator(self.hparams["seed"], "dsa", epoch, batch_idx, part)
        images = dsa(images, generator, strategy=self.hparams["augment"], mode=self.hparams["augment_mode"])
        network, gsam = self.network, self._gsam
        assert network is not None
        first: dict[str, Tensor] = {}

        def closure() -> Tensor:
            with frozen_running_statistics(network) if gsam.perturbed else nullcontext():
                loss, logits = self._loss_and_logits(images, labels)
            self.manual_backward(loss)
            first.setdefault("logits", logits.detach())
            first.setdefault("loss", loss.detach())
            return loss

        # Only strategies that synchronise gradients have this.
        unsynchronised = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with unsynchronised():
            self.optimizers().step(closure=closure)  # type: ignore[union-attr, call-arg]
        self.train_loss.update(first["loss"].expand(len(labels)))
        self.train_accuracy.update(right_answers(first["logits"], labels))
        self.log("teacher/train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("teacher/train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)

    def _average_over_ranks(self, gradients: list[Tensor]) -> None:
        if self.trainer.world_size > 1:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            flat = self.trainer.strategy.reduce(flat, reduce_op="mean")  # type: ignore[assignment]
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure accuracy on held-out images."""
        assert self.network is not None
        self.val_accuracy.update(right_answers(self.network(batch[0]), batch[1]))
        self.log("teacher/val_accuracy", self.val_accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def trajectory_metadata(self) -> dict[str, Any]:
        """Say what the trajectory store keeps beside the weights; see ``TrajectoryStore.metadata``."""
        keys = ("rho", "alpha", "adaptive", "lr", "momentum", "weight_decay")
        datamodule = getattr(self.trainer, "datamodule", None)
        describe = getattr(datamodule, "describe", None)
        data = describe() if describe else {"dataset": type(datamodule).__name__, "transform": None}
        return {
            **{key: self.hparams[key] for key in keys},
            **data,
            "optimizer": "GSAM(SGD)" if self.hparams["rho"] > 0 else "SGD",
            "batch_size": getattr(datamodule, "batch_size", None)
            or getattr(datamodule, "hparams", {}).get("batch_size"),
            "augmentation": {"strategy": self.hparams["augment"], "mode": self.hparams["augment_mode"]},
            "network": self.fresh.describe(),
            "seed": derive_seed(self.hparams["seed"], "teacher", self.teacher),
            "versions": versions(),
        }
