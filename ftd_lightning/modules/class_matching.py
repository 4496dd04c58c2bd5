"""What DC, DSA, DM and CAFE share: synthetic and real images of a class, seen by the same network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ftd_lightning.core.networks import Network, refuse_object
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import make_generator, network_to_device, to_device
from ftd_lightning.modules.distillation import Distillation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TRAIN_BATCH = 256  # synthetic images per step of the network's own training, in all of these methods


class _Summed(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return scale * gradient, None, None


class ClassMatching(Distillation):
    """The base of methods that compare synthetic with real images of each class on a network.

    Its subclasses' hyper-parameters include ``network_options``, ``batch_real``, ``lr_images``, ``momentum``,
    ``lr_network`` and ``iterations_per_epoch``; they call :meth:`keep` in their ``__init__``. Images are learned by
    SGD; the set's step size is ``lr_network``, which is not learned.

    Under DDP every rank draws real images of its own for the same network, and the gradient is averaged.
    """

    step_size: Tensor

    def keep(self, network: Network, augment: Augmentation, real: tuple[Tensor, Tensor] | None) -> None:
        """Check what ``__init__`` of a subclass got and saved as hyper-parameters.

        Raises:
            InputError: for a module where fresh networks are drawn.
        """
        refuse_object(network)
        self.augment = augment
        self._architecture = network
        self.keep_real(real)

    def build(self) -> None:
        """Make the initial synthetic set."""
        self.fresh = self.own_networks(self._architecture, self.hparams["network_options"])
        self.make_images()
        self.register_buffer("step_size", torch.tensor(float(self.hparams["lr_network"])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Learn the images by SGD."""
        return torch.optim.SGD([self.images], lr=self.hparams["lr_images"], momentum=self.hparams["momentum"])

    def on_fit_start(self) -> None:
        """Move the real images to the device, or leave them in host memory where they do not fit."""
        super().on_fit_start()
        labels, self._pool = self.real_images().labels, self.real_on_device().images
        self._of_class = [(labels == label).nonzero().squeeze(1) for label in range(self.num_classes)]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.labels) // int(self.hparams["ipc"])

    def fresh_network(self, *keys: int | str) -> nn.Module:
        """Draw a new network, in training mode on the device; equal keys give equal weights, on every rank."""
        network = self.fresh.build(self.hparams["seed"], "network", *keys)
        return network_to_device(network, self.device, self.images.dtype).train()

    def synthetic_of(self, label: int) -> Tensor:
        """Return the synthetic images of a class, (ipc, C, H, W)."""
        ipc = self.hparams["ipc"]
        return self.images[label * ipc : (label + 1) * ipc]

    def real_images_by_class(
        self, *keys: int | str, count: int | None = None, on_all_ranks: bool = False
    ) -> Iterator[Tensor]:
        """Draw ``count`` (else ``batch_real``) real images of each class without replacement; all, if it has fewer.

        Every rank draws other images, unless ``on_all_ranks``.

        Args:
            keys: of the draw; equal keys give equal images.
            count: of each class.
            on_all_ranks: draw the same images on every rank.

        Yields:
            (n, C, H, W) of class 0, then of class 1, and so on, on the device, in the trainer's precision.
        """
        rank, drawn = 0 if on_all_ranks else self.global_rank, []
        for label, members in enumerate(self._of_class):
            order = torch.randperm(len(members), generator=self._generator("real", label, *keys, rank))
            drawn.append(members[order[: count or self.hparams["batch_real"]]])
        index = to_device(torch.cat(drawn), self._pool.device)  # in one copy
        for part in index.split([len(of_class) for of_class in drawn]):
            yield to_device(self._pool[part], self.device, self.images.dtype)

    def siamese(self, images: Tensor, label: int, *keys: int | str) -> Tensor:
        """Augment images of a class: with equal keys in the same way, be they real or synthetic, few or many."""
        return self.augment(images, self._generator("siamese", label, *keys, self.global_rank), siamese=True)

    def _generator(self, *keys: int | str) -> torch.Generator:
        return make_generator(self.hparams["seed"], *keys)

    def summed(self, losses: Iterable[Tensor]) -> Tensor:
        """Add losses up, differentiating each in the images before the next is made: only one graph is alive at a time.

        The step is taken on the sum. Stepping class by class would let momentum move every class at every step.
        """
        value, gradient = self.images.new_zeros(()), torch.zeros_like(self.images)
        for loss in losses:
            gradient += torch.autograd.grad(loss, self.images)[0]
            value += loss.detach()
            del loss  # or its graph would live on while the next one is made
        return _Summed.apply(self.images, value, gradient)  # type: ignore[no-any-return]

    def train_on_set(self, network: nn.Module, epochs: int, *keys: int | str) -> None:
        """Train a network on the present synthetic set by plain SGD, in place; each image augmented for itself."""
        images, optimizer = self.images.detach(), torch.optim.SGD(network.parameters(), lr=self.hparams["lr_network"])
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=self._generator("order", *keys, epoch))
            for step, index in enumerate(to_device(order, self.device).split(TRAIN_BATCH)):
                batch = self.augment(images[index], self._generator("inner", *keys, epoch, step))
                optimizer.zero_grad()
                cross_entropy(network(batch), self.labels[index]).backward()
                optimizer.step()
