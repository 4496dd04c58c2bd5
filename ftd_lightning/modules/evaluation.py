"""The evaluation phase: fresh networks trained on the synthetic set alone, measured on real images."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import BatchPlan
from ftd_lightning.core import ranks
from ftd_lightning.core.evaluation import EvaluationProtocol, PartsOnDevice, learned_lr, mean_and_std, set_lr
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.core.module import BaseModule, run_folder
from ftd_lightning.core.networks import Network, add_to_mean
from ftd_lightning.core.results import check_learning, choose_iterates, held_out_seen, stalls, write_results
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import versions
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import Compile
from ftd_lightning.functional.seeding import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping


class SyntheticEvaluation(BaseModule):
    """Trains fresh networks on whatever (images, labels) batches it gets, and measures them on real ones.

    The protocol behind the published numbers: 1000 epochs over the set (the trainer's ``max_epochs``), batch 256, SGD
    with momentum 0.9 and weight decay 5e-4, the learned step size as learning rate, x0.1 at half of the epochs, DSA.
    After ``fit``, ``test`` gives the result; ``ftd fit`` does both. The networks share the order of batches, not
    initialisation and augmentation. Under DDP each of W ranks trains every W-th network on all images, and W ranks
    produce the networks and the results of one process, bit for bit.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        networks: how many.
        lr: learning rate; None takes the step size of the set, or 0.01 where it has none.
        momentum: of SGD.
        weight_decay: of SGD.
        augment: DSA: an ``Augmentation``, its fields as a mapping, or a strategy; "" for none. The convention of its
            resampling (``align_corners``) is true in trajectory matching, false in DC, DSA, DM and CAFE.
        seed: of initialisation and augmentation.
        compile: compile forward and backward passes: True, False, or "auto" (on a GPU only).
        rho: train by SAM with a ball of this radius, each network for itself ("MTT + flat minimum", Sec. 4.3); only
            the gradients change, the schedule stays. 0: plain SGD.
        measure_every: measure held-out and test images after every so many epochs; among these iterates one is chosen.
            0: never. ``test`` measures the last iterate in any case.
        patience: train until accuracy on held-out images levels off: once their mean accuracy has not risen for so many
            measurements, the learning rate drops to a tenth, and the next time the fit ends; ``max_epochs`` is a limit
            then. 0, or without held-out images: drop at half of ``max_epochs``.

    Attributes:
        networks: an ``nn.ModuleList`` of those that this rank trains; of all, in a module loaded from a checkpoint.
        history: accuracies of all networks during training, on held-out and on test images.
        results: after ``test``, the contents of ``evaluation.json`` (and as a table ``evaluation.md``) beside the logs;
            "balanced_accuracy" is the mean of the classes' recalls, where classes of the test images are unequal.
    """

    networks: nn.ModuleList

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        networks: int = 5,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        augment: Augmentation | dict[str, Any] | str = Augmentation(),  # noqa: B008  frozen
        seed: int = 0,
        compile: Compile = "auto",  # noqa: A002
        rho: float = 0.0,
        measure_every: int = 100,
        patience: int = 0,
    ) -> None:
        check_bounds(SyntheticEvaluation, locals())
        if patience and not measure_every:
            raise InputError("patience counts measurements on held-out images: give measure_every, too")
        IndependentLosses(compile, torch.device("cpu"), rho=rho)  # refuses settings that make no sense
        super().__init__(network=network, network_options=network_options, augment=Augmentation.of(augment), seed=seed)
        self.save_arguments(locals(), augment=self.augment)
        self._sgd: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}
        self.results: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        # Numbers of this rank's networks, of which the first ``counted`` are asked for.
        self.own, self.counted = list[int](), 0
        self._states, self._unsynchronised = ranks.RankStates(), ExitStack()
        self._real: PartsOnDevice | None = None
        self._right: list[Tensor] = []  # of each batch, (n, N) bool
        self._classes: list[Tensor] = []  # (N,)
        self.trained_epochs = 0  # the trainer's own count is 0 where a checkpoint is tested

    def batch_plan(self) -> BatchPlan:
        """Give each process all images; see ``contracts.PlansBatches``."""
        return BatchPlan(0, 1, epoch=lambda epoch: epoch, validates=False)

    def build(self) -> None:
        """Build this rank's networks; without a trainer, those of all ranks."""
        count = self.hparams["networks"]
        rank, world_size = (self.global_rank, self.trainer.world_size) if self.attached else (0, 1)
        self.own = ranks.ranks_share(count, rank=rank, world_size=world_size)
        self.counted = sum(index < count for index in self.own)
        self.networks = nn.ModuleList(self.fresh.build(self.seed, "fresh", index) for index in self.own)
        self.train_loss = MeanMetric(nan_strategy="disable")  # of all ranks; a look for NaN would wait for the device

    def configure_model(self) -> None:
        """Build for the trainer's data, and take the learning rate of the set."""
        super().configure_model()
        if self.attached:
            training, lr = None if self.source is None else self.source.training_set(), self.hparams["lr"]
            self.lr = learned_lr(training) if lr is None else float(lr)
            if self._built and self.trainer.world_size > 1:
                self._states.remember(self)

    def on_fit_start(self) -> None:
        """Restore the networks that DDP has overwritten by the first rank's."""
        super().on_fit_start()
        self._states.restore(self)
        self._real = None if self.source is None else PartsOnDevice(self.source, self.device)
        if self.source is not None:
            self.source.part("test")  # without test images it is refused before it trains

    def on_validation_start(self) -> None:
        """Restore them where nothing is fitted: there too the first rank's weights are broadcast."""
        super().on_validation_start()
        self._states.restore(self)

    on_test_start = on_validation_start

    def on_train_start(self) -> None:
        """Keep DDP from averaging gradients of different networks."""
        self.warn_of_unordered_loader()
        ranks.refuse_split_loaders(self.trainer, or_else="use a DistillationDataModule")
        self.trainer.should_stop = self.trainer.should_stop or self.levelled_off  # a finished fit ends at once
        self._losses = IndependentLosses(self.hparams["compile"], self.device, rho=self.hparams["rho"])
        self._unsynchronised.close()  # left open by a fit that failed
        self._unsynchronised.enter_context(ranks.without_gradient_sync(self.trainer))

    def on_train_end(self) -> None:
        """Leave DDP as it was, and give the memory of the real images back."""
        self._unsynchronised.close()
        self._real = None

    @property
    def _held_out(self) -> bool:
        return self._real is not None and len(self._real("val").labels) > 0

    @property
    def _stalls(self) -> int:
        held_out = [sum(entry["held_out"]) for entry in self.history]
        return stalls(held_out, self.hparams["patience"]) if self.hparams["patience"] else 0

    @property
    def levelled_off(self) -> bool:
        """Whether accuracy on held-out images has stalled a second time, at the lower learning rate."""
        return self._stalls >= 2

    @property
    def protocol(self) -> EvaluationProtocol:
        """The protocol over as many epochs as the trainer's limits allow now: a resumed fit may have more."""
        trainer, epochs = self.trainer, 2 * self.current_epoch + 2  # without a limit the learning rate never drops
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs = trainer.max_epochs  # beside it, max_steps merely interrupts the fit
        elif trainer.max_steps >= 0:
            epochs = math.ceil(trainer.max_steps / trainer.num_training_batches)
        return EvaluationProtocol(epochs=max(1, epochs), lr=self.lr, augment=self.augment, **self._sgd)

    def configure_optimizers(self) -> torch.optim.SGD:
        """Make the protocol's optimizer; its learning rate is set epoch by epoch."""
        return EvaluationProtocol(lr=self.lr, **self._sgd).optimizer(self.networks)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the epoch."""
        measures = self.hparams["patience"] and self._held_out
        lr = self.lr * 0.1 ** min(self._stalls, 1) if measures else self.protocol.lr_at(self.current_epoch)
        set_lr(self.optimizers(use_pl_optimizer=False), lr)  # type: ignore[arg-type]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Sum the losses. Augmentation seeds do not depend on the rank: a network is trained alike wherever it runs."""
        losses = self._losses(
            list(self.networks),
            *batch,
            seeds=[derive_seed(self.seed, "dsa", index, self.current_epoch, batch_idx, 0) for index in self.own],
            augment=self.augment,
        )
        count = len(batch[1])
        add_to_mean(self.train_loss, losses.detach()[: self.counted].sum() * count, count * self.counted)
        if self.epoch_complete:  # once for each epoch, because to log takes the host long
            self.train_loss.update(torch.empty(0, device=self.device))  # else it warns of having had none
            self.log("evaluation/train_loss", self.train_loss, on_step=False, on_epoch=True)
        return losses.sum()

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to the logits of n networks (n, N, K)."""
        return torch.stack([network(images) for network in self.networks])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean logits of the networks (N, K)."""
        return self(batch[0]).mean(0)  # type: ignore[no-any-return]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on held-out training images, or on test images."""
        images, classes = batch
        self._right.append(self(images).argmax(2) == classes)
        self._classes.append(classes)

    test_step = validation_step

    def _measured(self) -> tuple[Tensor, Tensor | None]:
        """Return accuracy and, where classes are unequal, balanced accuracy of all ranks' networks, (n,) each."""
        right, classes = torch.cat(self._right, 1).float().cpu(), torch.cat(self._classes).cpu()
        self._right, self._classes = [], []
        labels, counts = classes.unique(return_counts=True)
        recalls = torch.stack([right[:, classes == label].mean(1) for label in labels])
        own = torch.stack([right.mean(1), recalls.mean(0)], 1).tolist()
        accuracy, balanced = torch.tensor(ranks.from_all_ranks(own, self.hparams["networks"])).unbind(1)
        return accuracy, balanced if len(counts.unique()) > 1 else None

    def _log_accuracies(self, part: str, values: Tensor) -> None:
        summary = mean_and_std(values)
        log = partial(self.log, sync_dist=True)  # equal on all ranks; Lightning warns where this is not said
        log(f"evaluation/{part}_accuracy_mean", summary["mean"], prog_bar=True)
        log(f"evaluation/{part}_accuracy_std", summary["std"])

    def on_validation_epoch_end(self) -> None:
        """Log their accuracy."""
        self._log_accuracies("val", self._measured()[0])
        if self.trainer.state.fn == "fit" and self.epoch_complete:
            self.trained_epochs = self.current_epoch + 1  # a checkpoint may be saved before the epoch's end counts it

    def on_train_epoch_end(self) -> None:
        """Count the epoch; measure held-out and test images where that is due, so that an iterate can be chosen."""
        if not self.epoch_complete:  # a fit that is stopped within an epoch; resumed, it ends the epoch again
            return
        self.trained_epochs, every = self.current_epoch + 1, self.hparams["measure_every"]
        due = every > 0 and self.trained_epochs % every == 0
        if not due or self._real is None or not self._held_out:
            return
        measured = self._real.accuracies(list(self.networks), self.hparams["networks"])
        self._log_accuracies("val", measured["val"])
        # A fit that resumes from here measures again.
        self.history = [entry for entry in self.history if entry["epoch"] < self.trained_epochs]
        held_out, test = (measured[part].tolist() for part in ("val", "test"))
        self.history.append({"epoch": self.trained_epochs, "held_out": held_out, "test": test})
        self.trainer.should_stop = self.trainer.should_stop or self.levelled_off

    def extra_state(self) -> dict[str, Any]:
        """Return the measurements so far."""
        return {"history": self.history, "trained_epochs": self.trained_epochs, "lr": self.lr}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the networks of all ranks."""
        super().on_save_checkpoint(checkpoint)
        self._states.save(self, checkpoint)

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Restore the networks of this rank or, without a trainer, of all ranks."""
        self.history, self.trained_epochs = list(state["history"]), state["trained_epochs"]
        if self.attached:
            self._states.load(self, checkpoint)
            return
        self.lr = state["lr"]
        checkpoint["state_dict"] = self._states.joined(checkpoint, "networks", self.hparams["networks"])

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of the last iterates and write ``evaluation.json`` beside the logs."""
        values, balanced = self._measured()
        self._log_accuracies("test", values)
        synthetic = None if self.source is None else self.source.training_set()
        metadata = {} if synthetic is None else synthetic.metadata
        chosen = choose_iterates(self.history, values)
        if chosen and self.data is not None and held_out_seen(metadata.get("dataset"), self.data.dataset):
            chosen["held_out_seen"] = "the set was distilled from images that are held out here"
        failed = check_learning(self.trainer, self.networks, self.device, self.hparams["networks"])
        self.results = {
            "accuracy": {metadata.get("method", "set"): mean_and_std(values)},
            **({} if balanced is None else {"balanced_accuracy": mean_and_std(balanced)}),
            **chosen,
            **({"failed": failed} if failed else {}),
            "each": values.tolist(),
            "measured_on": "test images; 'accuracy' is that of the networks as they were after the last epoch",
            "seeds": [derive_seed(self.seed, "fresh", index) for index in range(len(values))],
            "lr": self.lr,
            "epochs": self.trained_epochs,
            **({"levelled_off": self.levelled_off} if self.hparams["patience"] else {}),
            "settings": self.settings(),
            "set": metadata,
            "versions": versions(),
        }
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_results(run_folder(self.trainer), self.results)
