"""The loops of CAFE (Wang et al., CVPR 2022): when a round ends, and the training within it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.networks import Network, right_answers
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.distribution_matching import (
    alignment_loss,
    class_means,
    discrimination_loss,
    feature_levels,
    level_weights,
)
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.modules.class_matching import ClassBatches, train_on_set
from ftd_lightning.modules.distillation import Distillation, Init, common

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Loops:
    """When a round of CAFE ends, and the training between two of its iterations.

    Args:
        kind: "dynamic" decides by accuracies; "fixed": ``outer_max`` iterations per round, ``inner_max`` epochs between
            two.
        outer_max: most iterations of a round; the released script has no such bound.
        inner_max: most epochs of training between two iterations; unbounded there too.
        lambda_1: the spread of accuracies below which a round ends, a fraction; 0.04 in the released script.
        lambda_2: the spread above which the training ends, a fraction; 0.03 there.
        window: accuracies that each loop looks at.
    """

    kind: Literal["dynamic", "fixed"] = "dynamic"
    outer_max: int = 50
    inner_max: int = 50
    lambda_1: float = 0.04
    lambda_2: float = 0.03
    window: int = 10

    def __post_init__(self) -> None:
        if self.kind not in ("dynamic", "fixed"):
            raise InputError(f"loops: kind={self.kind!r} is unknown: choose from ['dynamic', 'fixed']")
        check_bounds(Loops, vars(self))

    @classmethod
    def of(cls, value: Loops | Mapping[str, Any] | None) -> Loops:
        """Build from the fields as a mapping; None takes the defaults."""
        if isinstance(value, Loops):
            return value
        try:
            return cls(**(value or {}))
        except TypeError as error:
            raise InputError(f"loops: {error}") from error


def spread(accuracies: Sequence[float], window: int) -> float:
    """Return max - min of the last accuracies, ``window`` of them; NaN for fewer.

    Convention: accuracies are the plain values of each check; the released script adds a tenth of the previous one.
    """
    latest = accuracies[-window:]
    return max(latest) - min(latest) if len(latest) == window else math.nan


PUBLISHED_MILESTONES = (1200, 1600, 1800)  # of 2001 rounds


class FeatureAlignment(Distillation):
    """Learns a synthetic set by feature alignment (CAFE: Wang et al., CVPR 2022), with ``augment`` CAFE+DSA.

    An iteration is one update of the images, on the current network. Its loss is the squared distance of real and
    synthetic class means at all depths, plus ``discrimination`` times the cross entropy of real embeddings that are
    classified by the synthetic class centres. (CAFE's cross entropy of the network's logits on real images does not
    depend on the synthetic ones.)

    A *round* is all iterations on one network, which begins random. Between two iterations of a round, the network's
    accuracy on ``query`` real training images of each class is measured. If the last ``window`` accuracies lie within
    ``lambda_1``, the round ends (outer loop); else the network is trained on the synthetic set, epoch by epoch, until
    as many accuracies after an epoch lie further apart than ``lambda_2`` (inner loop). A checkpoint holds the round.

    Convention: query images are not augmented; their accuracy is the mean over all ranks. Networks with BatchNorm see
    images of all classes in one batch, real as synthetic.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random images of each class), "noise" (as published), or a set or its file to continue.
        rounds: the fit ends after so many, if the trainer's ``max_steps`` does not end it; 2001 in the released script.
        loops: when a round and its training end: a ``Loops``, or its fields as a mapping.
        query: real images of a class for an accuracy; all, if there are fewer.
        level_weights: one for each depth, from the shallowest to the embedding; None: 0.1 and, for the last three, 1.
        discrimination: weight of the cross entropy, which is a sum over real images.
        batch_real: real images of a class an iteration.
        lr_images: learning rate of the pixels.
        lr_milestones: rounds, from 0, at which the pixels' learning rate is halved; None: 1200, 1600 and 1800.
        momentum: of the pixels.
        lr_network: learning rate of the network between iterations, and the step size that the set carries.
        augment: DSA of CAFE+DSA: a strategy, the fields of an ``Augmentation``, or one; "" for none, which is CAFE.
            Resampling has ``align_corners`` False by default, as in this line of work.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: of initial images, networks, real batches, query images, order of training and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.

    Attributes:
        round: number of the present network, from 0; -1 before there is one.
        round_steps: iterations that the present round has had.
        accuracies: query accuracies of the present round.
    """

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
        init: Init = "noise",
        rounds: int = 2001,
        loops: Loops | dict[str, Any] | None = None,
        query: int = 128,
        level_weights: list[float] | None = None,
        discrimination: float = 0.01,
        batch_real: int = 256,
        lr_images: float = 0.1,
        lr_milestones: list[int] | None = None,
        momentum: float = 0.5,
        lr_network: float = 0.01,
        augment: dict[str, Any] | str | Augmentation = "",
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        augment = Augmentation.of(augment, align_corners=False)
        super().__init__(**common(locals()), step_size=lr_network)
        self.loops = Loops.of(loops)
        self.save_arguments(locals(), loops=self.loops)
        self.round, self.round_steps = -1, 0
        self._network: list[nn.Module] = []  # in a list: no submodule, so not among DDP's parameters
        self.accuracies: list[float] = []

    @property
    def method(self) -> str:
        """The method's short name: "cafe+dsa" with augmentation, "cafe" without."""
        return "cafe+dsa" if self.augment else "cafe"

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.round >= int(self.hparams["rounds"])

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images and a checkpoint's network to the device."""
        self.batches = ClassBatches(self, self.hparams["batch_real"])
        if state is not None and state["loop_network"] is not None:
            self._network = [self.fresh_network("network", "resumed")]
            self._network[0].load_state_dict(state["loop_network"])

    def on_train_start(self) -> None:
        """End a run at once that had been done; see the base."""
        super().on_train_start()
        self.trainer.should_stop = self.trainer.should_stop or self.finished

    def on_train_batch_start(self, batch: dict[str, int], batch_idx: int) -> int | None:
        """Make the network ready: a new one, or the last one after some training, so that checkpoints lie before it."""
        iteration = batch["iteration"]
        if not self._network or self._leaves_round(iteration):
            # A finished run has no network, but the number of its next round: it may be extended by more rounds.
            self.round += bool(self._network) or self.round < 0
            self.round_steps = 0
            if self.finished:
                self.trainer.should_stop = True
                self._network = []
                # An extended run begins with this iteration.
                self.trainer.train_dataloader.iteration = iteration  # type: ignore[union-attr]
                return -1  # Lightning skips the rest of the epoch
            self._network, self.accuracies = [self.fresh_network("network", self.round)], []
        else:
            self._inner_loop(iteration)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = self.lr_of_round(self.round)
        return None

    def lr_of_round(self, number: int) -> float:
        """Give the learning rate of the pixels in a round, counted from 0."""
        milestones = self.hparams["lr_milestones"]
        halved = sum(number >= milestone for milestone in (PUBLISHED_MILESTONES if milestones is None else milestones))
        return float(self.hparams["lr_images"] * 0.5**halved)

    def _leaves_round(self, iteration: int) -> bool:
        loops = self.loops
        if loops.kind == "fixed":
            return self.round_steps >= loops.outer_max
        accuracy = self.query_accuracy(iteration)
        self.log("matching/query_accuracy", accuracy, prog_bar=True, batch_size=1)
        self.accuracies.append(accuracy)
        return len(self.accuracies) >= loops.outer_max or spread(self.accuracies, loops.window) < loops.lambda_1

    def _inner_loop(self, iteration: int) -> None:
        network, loops = self._network[0].requires_grad_(True).train(), self.loops
        epochs, accuracies = 0, list[float]()
        while epochs < loops.inner_max:
            train_on_set(self, network, self.hparams["lr_network"], 1, iteration, epochs)
            epochs += 1
            if loops.kind == "dynamic":
                accuracies.append(self.query_accuracy(iteration, epochs))
                if spread(accuracies, loops.window) > loops.lambda_2:
                    break
        self.log("matching/inner_epochs", float(epochs), batch_size=1)

    @torch.no_grad()
    def query_accuracy(self, *keys: int | str) -> float:
        """Measure the present network on real training images, drawn by keys, as the mean over classes, in [0, 1]."""
        network = self._network[0].eval()
        shares = []
        for label, images in enumerate(self.batches.real("query", *keys, count=self.hparams["query"])):
            shares.append(right_answers(network(images), self.labels.new_full((len(images),), label)).mean())
        network.train()
        # One number for all ranks, or their networks would part.
        return float(self.trainer.strategy.reduce(torch.stack(shares).mean(), reduce_op="mean"))

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Align features and discriminate classes on the current network."""
        self.round_steps += 1
        network = self._network[0].requires_grad_(False)
        alignment, discrimination = self.losses(network, batch["iteration"])
        self.log("matching/alignment", alignment.detach(), batch_size=1)
        self.log("matching/discrimination", discrimination.detach(), batch_size=1)
        self.log("matching/round", float(self.round), batch_size=1)
        return self.log_loss(alignment + self.hparams["discrimination"] * discrimination)

    def losses(self, network: nn.Module, iteration: int) -> tuple[Tensor, Tensor]:
        """Compute alignment and discrimination of an iteration, unweighted, differentiable in the images."""
        batches, classes = self.batches, range(self.num_classes)
        synthetic = torch.cat([batches.siamese(batches.synthetic(label), label, iteration) for label in classes])
        levels = feature_levels(network, synthetic)
        weights = self.hparams["level_weights"]
        weights = level_weights(len(levels)) if weights is None else weights
        if len(weights) != len(levels):
            raise InputError(f"{len(weights)} level_weights are given, but the network has {len(levels)} levels")
        ours = [class_means(level, counts=batches.counts) for level in levels]
        theirs, embeddings, labels = self._real_features(network, iteration)
        return alignment_loss(ours, theirs, weights=weights), discrimination_loss(embeddings, labels, ours[-1])

    @torch.no_grad()
    def _real_features(self, network: nn.Module, iteration: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the class means of each level, and the embeddings with their labels, of real images."""
        drawn = self.batches.real(iteration)
        batches = [self.batches.siamese(images, label, iteration) for label, images in enumerate(drawn)]
        groups = [batches] if batch_norms(network) else [[batch] for batch in batches]
        means, embeddings = [], []
        # One class at a time: of the shallow levels, which are large, only means stay in memory.
        for group in groups:
            levels = feature_levels(network, torch.cat(group))
            means.append([class_means(level, counts=[len(batch) for batch in group]) for level in levels])
            embeddings.append(levels[-1])
        labels = [self.labels.new_full((len(batch),), label) for label, batch in enumerate(batches)]
        return [torch.cat(parts) for parts in zip(*means, strict=True)], torch.cat(embeddings), torch.cat(labels)

    def describe(self) -> dict[str, Any]:
        """Describe the data and the network, and count the finished rounds."""
        return {**super().describe(), "rounds": max(self.round, 0)}

    def extra_state(self) -> dict[str, Any]:
        """Add the current network and the progress of its round."""
        network = self._network[0].state_dict() if self._network else None
        progress = {name: getattr(self, name) for name in ("round", "round_steps", "accuracies")}
        return {**super().extra_state(), **progress, "loop_network": network}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Continue to count rounds."""
        super().restore(state, checkpoint)
        self.round, self.round_steps = state["round"], state["round_steps"]
        self.accuracies = list(state["accuracies"])
