"""The evaluation phase: fresh networks trained on the synthetic set alone, measured on real images."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torchmetrics import MeanMetric

from ftd_lightning.data.files import replacing, run_folder, versions
from ftd_lightning.data.images import Images
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import STRATEGY, Mode, parse_strategy
from ftd_lightning.functional.compiling import Compile
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.training.evaluation_protocol import (
    accuracies,
    choose_iterates,
    evaluation_optimizer,
    from_all_ranks,
    markdown_table,
    mean_and_std,
)
from ftd_lightning.training.fresh_networks import FreshNetworks, Network, plain_network, plain_settings, right_answers
from ftd_lightning.training.ranks import RankStates, own_share, refuse_split_loaders, without_gradient_sync
from ftd_lightning.training.side_by_side import SideBySide

DEFAULT_LR = 0.01  # of this line's code, for sets that bring no step size


class SyntheticEvaluation(LightningModule):
    """Trains fresh networks on whatever (images, labels) batches it gets, and measures them on real ones.

    The protocol behind the published numbers: 1000 epochs over the set (the trainer's ``max_epochs``), batch 256, SGD
    with momentum 0.9 and weight decay 5e-4, the learned step size as learning rate, x0.1 at half way, DSA on. After
    ``fit``, ``test`` gives the result; ``ftd fit`` does both. The networks share the order of batches; initialisation
    and augmentation are each one's own. Under DDP each of W ranks trains every W-th of them, on all images, and W ranks
    give the networks and the results of one process, bit for bit.

    Args:
        network: a name, an import path, a module, or a function that builds one.
        network_options: for a named network.
        networks: how many.
        lr: learning rate; None takes the step size that the set brings, or 0.01 where it brings none.
        momentum: of SGD.
        weight_decay: of SGD.
        augment: DSA strategy; "" for none.
        augment_mode: "single" or "multiple".
        seed: decides initialisation and augmentation.
        compile: torch.compile for forward and backward passes: True, False, or "auto": on a GPU only.
        rho: train by SAM with a ball of this radius, each network for itself ("MTT + flat minimum", Sec. 4.3); only
            the gradients change, the schedule stays. 0: plain SGD.
        align_corners: of the augmentation's resampling; true in trajectory matching, false in DC, DSA, DM and CAFE.

    Attributes:
        networks: an ``nn.ModuleList`` of those that this rank trains.
        history: accuracies of all networks during training, on held-out and on test images.
        results: after ``test``, what ``evaluation.json`` (and as a table ``evaluation.md``) beside the logs says.
    """

    independent_ranks = True  # the datamodule gives each rank all images

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        networks: int = 5,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        augment: str = STRATEGY,
        augment_mode: Mode = "single",
        seed: int = 0,
        compile: Compile = "auto",  # noqa: A002
        rho: float = 0.0,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if networks < 1:
            raise InputError(f"networks={networks} must be at least 1")
        parse_strategy(augment)
        SideBySide(compile, torch.device("cpu"), rho=rho)  # complains of settings that make no sense
        self.save_hyperparameters(ignore=plain_network(network))
        self._architecture = network
        self.networks: nn.ModuleList | None = None
        self.results: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.own: list[int] = []  # numbers of this rank's networks, of which the first ``counted`` are asked for
        self.counted = 0
        self._states, self._unsynchronised = RankStates(), ExitStack()
        self.trained_epochs = 0  # the trainer's own count is 0 where a checkpoint is tested

    def setup(self, stage: str) -> None:
        """Build this rank's networks."""
        if self.networks is None:
            datamodule = getattr(self.trainer, "datamodule", None)
            fresh = FreshNetworks(self._architecture, self.hparams["network_options"], datamodule)
            count, seed = self.hparams["networks"], self.hparams["seed"]
            self.own = own_share(count, rank=self.global_rank, world_size=self.trainer.world_size)
            self.counted = sum(index < count for index in self.own)
            self.networks = nn.ModuleList(fresh.build(seed, "fresh", index) for index in self.own)
            # A look for NaN would wait for the device in every step; other ranks have other networks.
            own_mean = partial(MeanMetric, nan_strategy="disable", sync_on_compute=False)
            self.accuracies = nn.ModuleList(own_mean() for _ in self.own)
            self.train_loss = MeanMetric(nan_strategy="disable")  # of all ranks
            self.lr = self._learning_rate(getattr(datamodule, "synthetic_set", None))
        if self.trainer.world_size > 1:
            self._states.keep(self)

    def on_fit_start(self) -> None:
        """Put the networks back that DDP has overwritten by the first rank's."""
        self._states.restore(self)
        self._losses = SideBySide(self.hparams["compile"], self.device, rho=self.hparams["rho"])

    def on_validation_start(self) -> None:
        """Put them back where nothing is fitted: there too the first rank's weights are broadcast."""
        self._states.restore(self)

    on_test_start = on_validation_start

    def on_train_start(self) -> None:
        """Keep DDP from averaging gradients of different networks."""
        refuse_split_loaders(self.trainer, or_else="give a DistillationDataModule")
        self._unsynchronised.close()  # left open by a fit that failed
        self._unsynchronised.enter_context(without_gradient_sync(self.trainer))

    def on_train_end(self) -> None:
        """Leave DDP as it was."""
        self._unsynchronised.close()

    def _learning_rate(self, synthetic: Any) -> float:
        if self.hparams["lr"] is not None:
            return float(self.hparams["lr"])
        step_size = getattr(synthetic, "step_size", None)
        if step_size is None:
            rank_zero_info(f"the training images bring no learned step size: using lr={DEFAULT_LR}")
        return DEFAULT_LR if step_size is None else float(step_size)

    def configure_optimizers(self) -> tuple[list[torch.optim.SGD], list[MultiStepLR]]:
        """Make the protocol's optimizer; its schedule goes by epochs."""
        assert self.networks is not None
        optimizer, schedule = evaluation_optimizer(
            self.networks,
            lr=self.lr,
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            epochs=int(self.trainer.max_epochs or 1),
        )
        return [optimizer], [schedule]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Sum the networks' losses."""
        assert self.networks is not None
        where = (self.current_epoch, batch_idx, 0)  # 0: no rank, for a network is the same on each
        losses = self._losses(
            list(self.networks),
            *batch,
            seeds=[derive_seed(self.hparams["seed"], "dsa", index, *where) for index in self.own],
            strategy=self.hparams["augment"],
            mode=self.hparams["augment_mode"],
            align_corners=self.hparams["align_corners"],
            one_graph=str(self.trainer.precision).startswith("16"),
        )
        self.train_loss.update(losses.detach()[: self.counted].expand(len(batch[1]), self.counted))
        self.log("evaluation/train_loss", self.train_loss, on_step=False, on_epoch=True)
        return losses.sum()

    def _measure(self, batch: tuple[Tensor, Tensor]) -> None:
        assert self.networks is not None
        for network, metric in zip(self.networks, self.accuracies, strict=True):
            metric.update(right_answers(network(batch[0]), batch[1]))  # type: ignore[operator]

    def _log_accuracies(self, part: str) -> Tensor:
        """Log mean and std and clear the metrics; gives the accuracies of all ranks' networks (n,)."""
        own = torch.stack([metric.compute() for metric in self.accuracies]).tolist()  # type: ignore[operator]
        for metric in self.accuracies:
            metric.reset()  # type: ignore[operator]
        values = torch.tensor(from_all_ranks(own, self.hparams["networks"]))
        summary = mean_and_std(values)
        self.log(f"evaluation/{part}_accuracy_mean", summary["mean"], prog_bar=True)
        self.log(f"evaluation/{part}_accuracy_std", summary["std"])
        return values

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on held-out training images."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log their accuracy, and remember it beside that on the test images, so that an iterate can be chosen."""
        values = self._log_accuracies("val")
        test = getattr(getattr(self.trainer, "datamodule", None), "test", None)
        if self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        self.trained_epochs = self.current_epoch + 1  # a checkpoint may be saved before the epoch's end counts it
        if not isinstance(test, Images):
            return
        assert self.networks is not None
        own = accuracies(self.networks, *(part.to(self.device) for part in test))
        on_test = from_all_ranks(own, self.hparams["networks"])
        self.history.append({"epoch": self.current_epoch + 1, "held_out": values.tolist(), "test": on_test})

    def on_train_epoch_end(self) -> None:
        """Count the epoch."""
        self.trained_epochs = self.current_epoch + 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was measured so far, and the networks of all ranks."""
        checkpoint["evaluation_history"], checkpoint["trained_epochs"] = self.history, self.trained_epochs
        self._states.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again, with the networks of this rank."""
        self.history = list(checkpoint.get("evaluation_history", []))
        self.trained_epochs = checkpoint.get("trained_epochs", 0)
        self._states.load(self, checkpoint)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure on test images."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of the last iterates and write ``evaluation.json`` beside the logs."""
        values = self._log_accuracies("test")
        synthetic = getattr(getattr(self.trainer, "datamodule", None), "synthetic_set", None)
        seed = self.hparams["seed"]
        metadata = getattr(synthetic, "metadata", {})
        self.results = {
            "accuracy": {metadata.get("method", "set"): mean_and_std(values)},
            **choose_iterates(self.history, values),
            "each": values.tolist(),
            "measured_on": "test images; 'accuracy' is that of the networks as they were after the last epoch",
            "seeds": [derive_seed(seed, "fresh", index) for index in range(len(values))],
            "lr": self.lr,
            "epochs": self.trained_epochs,
            "settings": plain_settings(self.hparams),
            "set": metadata,
            "versions": versions(),
        }
        if self.trainer.is_global_zero:
            with replacing(run_folder(self.trainer) / "evaluation.json") as part:
                part.write_text(json.dumps(self.results, indent=2) + "\n")
            with replacing(run_folder(self.trainer) / "evaluation.md") as part:
                part.write_text(markdown_table(self.results))
