"""Parts of DC, DSA, DM and CAFE: batches of each class, and losses that are summed over classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ftd_lightning.functional.seeding import to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ftd_lightning.modules.distillation import Distillation

TRAIN_BATCH = 256  # synthetic images per step of the network's own training, in all of these methods


class ClassBatches:
    """Synthetic and real images of each class, of a distillation whose fit begins.

    Under DDP every rank draws real images of its own.

    Args:
        module: whose images and device they are.
        batch_real: real images per class and draw.
    """

    def __init__(self, module: Distillation, batch_real: int) -> None:
        self.module, self.batch_real = module, batch_real
        labels, self._pool = module.real_images().labels, module.real_on_device().images
        self._of_class = [(labels == label).nonzero().squeeze(1) for label in range(module.num_classes)]

    def synthetic(self, label: int) -> Tensor:
        """Return the synthetic images of a class, (ipc, C, H, W)."""
        ipc = self.module.ipc
        return self.module.images[label * ipc : (label + 1) * ipc]

    def real(self, *keys: int | str, count: int | None = None, on_all_ranks: bool = False) -> Iterator[Tensor]:
        """Draw real images of each class without replacement; all, if it has fewer.

        Args:
            keys: of the draw; equal keys give equal images.
            count: of each class; None draws ``batch_real``.
            on_all_ranks: draw the same images on every rank.

        Yields:
            (n, C, H, W) of class 0, then of class 1, and so on, on the device, in the trainer's precision.
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
        """Augment images of a class: with equal keys in the same way, be they real or synthetic, few or many."""
        module = self.module
        return module.augment(images, module.generator("siamese", label, *keys, module.global_rank), siamese=True)


class _Summed(torch.autograd.Function):
    """A scalar with a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return scale * gradient, None, None


def summed(images: Tensor, losses: Iterable[Tensor]) -> Tensor:
    """Add losses up, differentiating each in the images before the next is made: only one graph is alive at a time.

    The step is taken on the sum. Stepping class by class would let momentum move every class at every step.
    """
    value, gradient = images.new_zeros(()), torch.zeros_like(images)
    for loss in losses:
        gradient += torch.autograd.grad(loss, images)[0]
        value += loss.detach()
        del loss  # or its graph would live on while the next one is made
    return _Summed.apply(images, value, gradient)  # type: ignore[no-any-return]


def train_on_set(module: Distillation, network: nn.Module, lr: float, epochs: int, *keys: int | str) -> None:
    """Train a network on the present synthetic set by plain SGD, in place; each image augmented for itself.

    Args:
        module: whose set it is.
        network: on its device.
        lr: learning rate.
        epochs: over the set.
        keys: of the order and the augmentation.
    """
    images, optimizer = module.images.detach(), torch.optim.SGD(network.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=module.generator("order", *keys, epoch))
        for step, index in enumerate(to_device(order, module.device).split(TRAIN_BATCH)):
            batch = module.augment(images[index], module.generator("inner", *keys, epoch, step))
            optimizer.zero_grad()
            cross_entropy(network(batch), module.labels[index]).backward()
            optimizer.step()
