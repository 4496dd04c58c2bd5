"""DM: synthetic images whose mean embeddings match those of real ones (Zhao and Bilen, WACV 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.networks import Network
from ftd_lightning.functional.augment import STRATEGY, Augmentation
from ftd_lightning.functional.distribution_matching import distribution_distance, embed
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.modules.class_matching import ClassBatches, summed
from ftd_lightning.modules.distillation import Distillation, Init

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class DistributionMatching(Distillation):
    """Learns a synthetic set by distribution matching (DM).

    In every iteration a new random network, never trained, embeds real and synthetic images of each class, which one
    siamese augmentation has changed alike; the squared distances of the mean embeddings are summed over classes. A
    network with BatchNorm sees all classes in one batch.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class.
        init: "real" starts from random real images of each class (the published setting), "noise" from a normal.
        batch_real: real images per class and iteration.
        lr_images: learning rate of the pixels; 1 as published (10 for CIFAR-10 at 100 images per class and more).
        momentum: of the pixels.
        lr_network: the step size that the set carries for its evaluation; nothing is trained with it here.
        augment: DSA, siamese: a strategy, the fields of an ``Augmentation``, or one; "" for none. Resampling has
            ``align_corners`` False by default, as in this line of work.
        iterations_per_epoch: iterations that make a Lightning epoch; 20,000 iterations as published.
        seed: of initial images, networks, real batches and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
    """

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
        init: Init = "real",
        batch_real: int = 256,
        lr_images: float = 1.0,
        momentum: float = 0.5,
        lr_network: float = 0.01,
        augment: dict[str, Any] | str | Augmentation = STRATEGY,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        check_bounds(DistributionMatching, locals())
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

    @property
    def method(self) -> str:
        """The method's short name."""
        return "dm"

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images to the device, or leave them in host memory where they do not fit."""
        self.batches = ClassBatches(self, self.hparams["batch_real"])

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Compare mean embeddings of each class on one new network."""
        iteration = batch["iteration"]
        network = self.fresh_network("network", iteration).requires_grad_(False)
        distances = self._joint_distance if batch_norms(network) else self._distances
        return self.log_loss(summed(self.images, distances(network, self._pairs(iteration))))

    def _pairs(self, iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield synthetic and real images of each class, augmented alike."""
        batches = self.batches
        for label, real in enumerate(batches.real(iteration)):
            synthetic = batches.synthetic(label)
            yield batches.siamese(synthetic, label, iteration), batches.siamese(real, label, iteration)

    def _distances(self, network: nn.Module, pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        for synthetic, real in pairs:
            yield distribution_distance(embed(network, synthetic), embed(network, real))

    def _joint_distance(self, network: nn.Module, pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Embed all classes in one batch per side: statistics of a single class would hide what sets it apart."""
        sides = zip(*pairs, strict=True)
        synthetic, real = (embed(network, torch.cat(side)).split([len(x) for x in side]) for side in sides)
        yield torch.stack([distribution_distance(*pair) for pair in zip(synthetic, real, strict=True)]).sum()
