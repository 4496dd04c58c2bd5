"""DM, DC and DSA: images that match real ones class by class; and the parts of class-wise matching."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ftd_lightning.core.networks import Network
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import STRATEGY, Augmentation
from ftd_lightning.functional.distribution_matching import distribution_distance, embed
from ftd_lightning.functional.gradient_matching import batch_norms, gradient_distance, loss_gradients
from ftd_lightning.functional.seeding import to_device
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.modules.distillation import Distillation, Init, common

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TRAIN_BATCH = 256  # synthetic images per step of the network's own training, in all of these methods


class ClassBatches:
    """Synthetic and real images of each class; under DDP every rank draws other real ones."""

    def __init__(self, module: Distillation, batch_real: int) -> None:
        self.module, self.batch_real, self.counts = module, batch_real, module.images_of_class
        self._ends = list(accumulate(self.counts))
        labels, self._pool = module.real_images().labels, module.real_on_device().images
        self._of_class = [(labels == label).nonzero().squeeze(1) for label in range(module.num_classes)]

    def synthetic(self, label: int) -> Tensor:
        """Return the synthetic images of a class, (n, C, H, W)."""
        last = self._ends[label]
        return self.module.images[last - self.counts[label] : last]

    def real(self, *keys: int | str, count: int | None = None, on_all_ranks: bool = False) -> Iterator[Tensor]:
        """Draw ``count`` (or ``batch_real``) real images of each class without replacement; all, if it has fewer.

        Equal keys give equal images. Yields (n, C, H, W) class by class, on the device, in the trainer's precision.
        """
        module, drawn = self.module, []
        rank = 0 if on_all_ranks else module.global_rank
        for label, members in enumerate(self._of_class):
            order = torch.randperm(len(members), generator=module.generator("real", label, *keys, rank))
            drawn.append(members[order[: count or self.batch_real]])
        index = to_device(torch.cat(drawn), self._pool.device)  # in one copy
        for part in index.split([len(of_class) for of_class in drawn]):
            yield to_device(self._pool[part], module.device, module.images.dtype)

    def siamese(self, images: Tensor, label: int, *keys: int | str) -> Tensor:
        """Augment images of a class; equal keys augment real and synthetic ones alike."""
        module = self.module
        return module.augment(images, module.generator("siamese", label, *keys, module.global_rank), siamese=True)

    def pairs(self, iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield synthetic and real images of each class, augmented alike."""
        for label, real in enumerate(self.real(iteration)):
            yield self.siamese(self.synthetic(label), label, iteration), self.siamese(real, label, iteration)


def summed(images: Tensor, losses: Iterable[Tensor]) -> Tensor:
    """Add losses up, differentiating each in the images before the next is made: only one graph is alive at a time.

    The step is taken on the sum. Stepping class by class would let momentum move every class at every step.
    """
    value, gradient = images.new_zeros(()), torch.zeros_like(images)
    for loss in losses:
        if loss.requires_grad:  # else the network lets no gradient through, which the step guard reports
            gradient += torch.autograd.grad(loss, images, allow_unused=True, materialize_grads=True)[0]
        value += loss.detach()
        del loss  # or its graph would live on while the next one is made
    linear = (images * gradient).sum()
    return value + (linear - linear.detach())  # the sum, with that gradient


def train_on_set(module: Distillation, network: nn.Module, lr: float, epochs: int, *keys: int | str) -> None:
    """Train a network on a module's present set by plain SGD, in place; each image augmented for itself.

    The keys decide the order and the augmentation.
    """
    images, optimizer = module.images.detach(), torch.optim.SGD(network.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=module.generator("order", *keys, epoch))
        for step, index in enumerate(to_device(order, module.device).split(TRAIN_BATCH)):
            batch = module.augment(images[index], module.generator("inner", *keys, epoch, step))
            optimizer.zero_grad()
            cross_entropy(network(batch), module.labels[index]).backward()
            optimizer.step()


class DistributionMatching(Distillation):
    """Learns a synthetic set by distribution matching (DM).

    In every iteration a new random network, never trained, embeds real and synthetic images of each class, which one
    siamese augmentation has changed alike; the squared distances of the mean embeddings are summed over classes. A
    network with BatchNorm sees all classes in one batch.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random images of each class, as published), "noise", or a set or its file to continue.
        batch_real: real images per class and iteration.
        lr_images: learning rate of the pixels, or of a decoder's parameters; of pixels 1 as published (10 for CIFAR-10
            at 100 images per class and more).
        momentum: of SGD; None learns by Adam.
        lr_network: the step size that the set carries for its evaluation; nothing is trained with it here.
        augment: DSA, siamese: a strategy, the fields of an ``Augmentation``, or one; "" for none. Resampling has
            ``align_corners`` False by default, as in this line of work.
        iterations_per_epoch: iterations that make a Lightning epoch; 20,000 iterations as published.
        seed: of initial images, networks, real batches and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        decoder: learn parameters that images are decoded from, in place of pixels; see ``decoders.Decoder``.
    """

    method = "dm"

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
        init: Init = "real",
        batch_real: int = 256,
        lr_images: float = 1.0,
        momentum: float | None = 0.5,
        lr_network: float = 0.01,
        augment: dict[str, Any] | str | Augmentation = STRATEGY,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        decoder: Decoder | dict[str, Any] | None = None,
    ) -> None:
        augment = Augmentation.of(augment, align_corners=False)
        super().__init__(**common(locals()), step_size=lr_network)
        self.save_arguments(locals())

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images to the device, where they fit."""
        self.batches = ClassBatches(self, self.hparams["batch_real"])

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Compare mean embeddings of each class on one new network."""
        iteration = batch["iteration"]
        network = self.fresh_network("network", iteration).requires_grad_(False)
        return self.log_loss(summed(self.images, self._distances(network, iteration)))

    def _distances(self, network: nn.Module, iteration: int) -> Iterator[Tensor]:
        """Yield distances of classes; with BatchNorm one for all: statistics of a single class would hide its mean."""
        pairs = self.batches.pairs(iteration)
        for group in [list(pairs)] if batch_norms(network) else ([pair] for pair in pairs):
            sides = zip(*group, strict=True)
            synthetic, real = (embed(network, torch.cat(side)).split([len(x) for x in side]) for side in sides)
            yield torch.stack([distribution_distance(*pair) for pair in zip(synthetic, real, strict=True)]).sum()


# By images per class: updates of the images on one network, and epochs that it is trained for between two of them.
PUBLISHED_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
STATISTICS_IMAGES = 16  # real images of each class that BatchNorm's statistics are taken of


class GradientMatching(Distillation):
    """Learns a synthetic set by gradient matching: DC (Zhao, Mopuri and Bilen, ICLR 2021) and DSA (ICML 2021).

    An iteration is one update of the images: for each class the gradients of the mean cross entropy on its synthetic
    and on real images are compared, row by row of the weights; the distances are summed over classes. Every
    ``outer_loops`` iterations a new random network is drawn; between two iterations on the same one it is trained on
    the current synthetic set. DSA differs from DC in its augmentation: one draw for real and synthetic images of a
    class where gradients are matched, one for each image where the network is trained.

    A checkpoint holds the current network. Running statistics of BatchNorm are updated by 16 real images of each class
    before every iteration and hold for both gradients, because a batch of one class has unusual statistics.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random images of each class, as in DSA), "noise" (as in DC), or a set or its file to continue.
        outer_loops: T, iterations on one network. None: as published for this ipc (1, 10, 20, 30, 40 or 50).
        inner_epochs: K, epochs over the synthetic set between two of them. None: as published.
        batch_real: real images per class and iteration.
        lr_images: learning rate of the pixels, or of a decoder's parameters.
        momentum: of SGD; None learns by Adam.
        lr_network: learning rate of the network between iterations, and the step size that the set carries.
        augment: DSA: a strategy, the fields of an ``Augmentation``, or one; "" for none, which is DC. Resampling has
            ``align_corners`` False by default, as in this line of work.
        iterations_per_epoch: iterations that make a Lightning epoch; as published there are 1001 T iterations.
        seed: of initial images, networks, real batches, order of training and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        decoder: learn parameters that images are decoded from, in place of pixels; see ``decoders.Decoder``.

    Raises:
        InputError: for an ipc without published loops that names none.
    """

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
        init: Init = "real",
        outer_loops: int | None = None,
        inner_epochs: int | None = None,
        batch_real: int = 256,
        lr_images: float = 0.1,
        momentum: float | None = 0.5,
        lr_network: float = 0.01,
        augment: dict[str, Any] | str | Augmentation = STRATEGY,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        decoder: Decoder | dict[str, Any] | None = None,
    ) -> None:
        augment = Augmentation.of(augment, align_corners=False)
        super().__init__(**common(locals()), step_size=lr_network)
        self.save_arguments(locals())
        ipc = self.ipc
        published = None if isinstance(ipc, list) else PUBLISHED_LOOPS.get(ipc)
        if published is None and not (outer_loops and inner_epochs):
            missing = "inner_epochs" if outer_loops else "outer_loops"
            raise InputError(f"ipc={ipc} has no published loops (those are {list(PUBLISHED_LOOPS)}): give {missing}")
        published = published or (1, 1)
        self.outer_loops, self.inner_epochs = outer_loops or published[0], inner_epochs or published[1]
        self._network: list[nn.Module] = []  # in a list: no submodule, so not among DDP's parameters

    @property
    def method(self) -> str:
        """The method's short name: "dsa" with augmentation, "dc" without."""
        return "dsa" if self.augment else "dc"

    def settings(self) -> dict[str, Any]:
        """Name the loops that were run, also where they were left to the table."""
        return {**super().settings(), "outer_loops": self.outer_loops, "inner_epochs": self.inner_epochs}

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images and a checkpoint's network to the device."""
        self.batches = ClassBatches(self, self.hparams["batch_real"])
        if state is not None and state["loop_network"] is not None:
            self._network = [self.fresh_network("network", "resumed")]
            self._network[0].load_state_dict(state["loop_network"])

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Compare gradients, class by class, on a new network or on the last one after some training."""
        iteration = batch["iteration"]
        loop, outer = divmod(iteration, self.outer_loops)
        # Trained here, not after the last update: a loop's last network needs no training.
        if outer == 0:
            self._network = [self.fresh_network("network", loop)]
        else:
            network = self._network[0].train()
            train_on_set(self, network, self.hparams["lr_network"], self.inner_epochs, iteration)
        self._fix_statistics(self._network[0], iteration)
        return self.log_loss(summed(self.images, self._distances(self._network[0], iteration)))

    @torch.no_grad()
    def _fix_statistics(self, network: nn.Module, iteration: int) -> None:
        norms = batch_norms(network)
        if not norms:
            return
        drawn = self.batches.real("statistics", iteration, count=STATISTICS_IMAGES, on_all_ranks=True)
        network(torch.cat(list(drawn)))
        for norm in norms:
            norm.eval()

    def _distances(self, network: nn.Module, iteration: int) -> Iterator[Tensor]:
        for label, (synthetic, real) in enumerate(self.batches.pairs(iteration)):
            target = loss_gradients(network, real, self.labels.new_full((len(real),), label))
            labels = self.labels.new_full((len(synthetic),), label)
            yield gradient_distance(loss_gradients(network, synthetic, labels, keep_graph=True), target)

    def extra_state(self) -> dict[str, Any]:
        """Add the current network."""
        return {**super().extra_state(), "loop_network": self._network[0].state_dict() if self._network else None}
