"""DC and DSA: synthetic images whose gradients in a network's weights match those of real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.networks import Network
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import STRATEGY, Augmentation
from ftd_lightning.functional.gradient_matching import batch_norms, gradient_distance, loss_gradients
from ftd_lightning.modules.class_matching import ClassBatches, summed, train_on_set
from ftd_lightning.modules.distillation import Distillation, Init

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
        ipc: synthetic images per class.
        init: "real" starts from random real images of each class (DSA as published), "noise" from a normal (DC).
        outer_loops: T, iterations on one network. None: as published for this ipc (1, 10, 20, 30, 40 or 50).
        inner_epochs: K, epochs over the synthetic set between two of them. None: likewise.
        batch_real: real images per class and iteration.
        lr_images: learning rate of the pixels.
        momentum: of the pixels.
        lr_network: learning rate of the network between iterations, and the step size that the set carries.
        augment: DSA: a strategy, the fields of an ``Augmentation``, or one; "" for none, which is DC. Resampling has
            ``align_corners`` False by default, as in this line of work.
        iterations_per_epoch: iterations that make a Lightning epoch; as published there are 1001 T iterations.
        seed: of initial images, networks, real batches, order of training and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.

    Raises:
        InputError: for numbers out of range, an unknown augmentation, or an ipc without published loops that names
            none.
    """

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
        init: Init = "real",
        outer_loops: int | None = None,
        inner_epochs: int | None = None,
        batch_real: int = 256,
        lr_images: float = 0.1,
        momentum: float = 0.5,
        lr_network: float = 0.01,
        augment: dict[str, Any] | str | Augmentation = STRATEGY,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        check_bounds(GradientMatching, locals())
        super().__init__(
            network=network,
            network_options=network_options,
            ipc=ipc,
            init=init,
            augment=Augmentation.of(augment, align_corners=False),
            iterations_per_epoch=iterations_per_epoch,
            seed=seed,
            real=real,
            lr_images=lr_images,
            step_size=lr_network,
            momentum=momentum,
        )
        self.save_arguments(locals(), augment=self.augment)
        published = PUBLISHED_LOOPS.get(ipc, (None, None))
        loops = (outer_loops or published[0], inner_epochs or published[1])
        for name, value in zip(("outer_loops", "inner_epochs"), loops, strict=True):
            if value is None:
                raise InputError(f"ipc={ipc} has no published loops (those are {list(PUBLISHED_LOOPS)}): give {name}")
        self.outer_loops, self.inner_epochs = (int(value) for value in loops if value)
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
        batches = self.batches
        for label, drawn in enumerate(batches.real(iteration)):
            real = batches.siamese(drawn, label, iteration)
            synthetic = batches.siamese(batches.synthetic(label), label, iteration)
            target = loss_gradients(network, real, self.labels.new_full((len(real),), label))
            labels = self.labels.new_full((len(synthetic),), label)
            yield gradient_distance(loss_gradients(network, synthetic, labels, keep_graph=True), target)

    def extra_state(self) -> dict[str, Any]:
        """Add the current network."""
        return {**super().extra_state(), "loop_network": self._network[0].state_dict() if self._network else None}
