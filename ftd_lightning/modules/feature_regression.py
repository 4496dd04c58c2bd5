"""A pool of networks, each trained a little whenever it was used, and replaced when it is old (FRePo)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.arguments import not_plain, plain
from ftd_lightning.core.networks import Network
from ftd_lightning.functional.distribution_matching import embed
from ftd_lightning.functional.kernels import half_squared_error
from ftd_lightning.functional.seeding import network_to_device, to_device
from ftd_lightning.modules.distillation import Init
from ftd_lightning.modules.kernel_inducing_points import ridge_accuracy
from ftd_lightning.modules.ridge_distillation import RidgeDistillation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ftd_lightning.contracts import Images


class _Member:
    """One place of the pool: its present network, that network's optimizer, and how often it was trained."""

    def __init__(self, network: nn.Module, lr: float, age: int, generation: int) -> None:
        self.network, self.age, self.generation = network, age, generation
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr)


class NetworkPool:
    """Networks of different ages.

    At the start all weights are fresh, but ages are spread evenly over [0, max_steps): otherwise all networks would be
    replaced at about the same time, and the images would meet only young networks for a while.

    Args:
        build: makes the network of a place and a generation, on its device and in training mode; equal arguments give
            equal weights.
        size: number of places.
        max_steps: steps after which a network is replaced by a fresh one.
        lr: of Adam.
    """

    def __init__(self, build: Callable[[int, int], nn.Module], size: int, max_steps: int, lr: float) -> None:
        self._build, self._max_steps, self._lr = build, max_steps, lr
        self._members = [_Member(build(place, 0), lr, place * max_steps // size, 0) for place in range(size)]

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, place: int) -> nn.Module:
        """Return the present network of a place."""
        return self._members[place].network

    @property
    def ages(self) -> list[int]:
        """Steps of each network, counted from what it began with."""
        return [member.age for member in self._members]

    def train(self, place: int, images: Tensor, targets: Tensor) -> None:
        """Take one step on half the squared error, or replace the network where that was its last.

        Args:
            place: in [0, size).
            images: (N, C, H, W).
            targets: (N, K), without gradient.
        """
        member = self._members[place]
        member.optimizer.zero_grad()
        half_squared_error(member.network(images), targets).backward()  # type: ignore[no-untyped-call]
        member.optimizer.step()
        member.age += 1
        if member.age >= self._max_steps:
            generation = member.generation + 1
            self._members[place] = _Member(self._build(place, generation), self._lr, 0, generation)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return weights, states of the optimizers, ages and generations, place by place."""
        return [
            {
                "network": member.network.state_dict(),
                "optimizer": member.optimizer.state_dict(),
                "age": member.age,
                "generation": member.generation,
            }
            for member in self._members
        ]

    def load_state_dict(self, states: list[Mapping[str, Any]]) -> None:
        """Continue with what :meth:`state_dict` returned for a pool of the same size and network."""
        for member, state in zip(self._members, states, strict=True):
            member.network.load_state_dict(state["network"])
            member.optimizer.load_state_dict(state["optimizer"])
            member.age, member.generation = state["age"], state["generation"]


class FeatureRegression(RidgeDistillation):
    """Learns a synthetic set by neural feature regression with pooling (FRePo, NeurIPS 2022).

    In every iteration one network of a pool is drawn. Ridge regression on its features of the synthetic images, the
    inputs of its last linear layer, predicts a batch of real images; half of the mean squared distance from their
    targets is minimised by Adam in images and targets, whose gradient passes through the features and the solution, but
    through no training. Before the next iteration that network takes one step of Adam on the set as it then is, and
    after ``max_steps_per_network`` of them a fresh one takes its place. The pool is part of a checkpoint; under DDP it
    is the same on every rank.

    Not as published: Adam instead of LAMB, a constant learning rate, no flipped copies in the batches, and no second
    term of the loss (the authors' margin on the labels).

    The method's own protocol is the accuracy of the ridge regression on features, the mean over the networks of the
    pool: "ridge regression on the pool's features, test images" in the set's scores.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class.
        init: "real" starts from random real images of each class, "noise" from a normal.
        reg: regularisation relative to the mean of the kernel's diagonal; 1e-6 as published.
        pool_size: networks in the pool.
        max_steps_per_network: after which a network is replaced.
        pool_batch: most synthetic images of such a step; drawn at random where the set has more.
        lr_pool: Adam's learning rate of the pool's networks.
        batch_target: real images per iteration, of all classes together.
        lr_images: Adam's learning rate of the pixels.
        learn_labels: learn the labels too, as published.
        lr_labels: Adam's learning rate of theirs.
        lr_network: the step size that the set carries for its evaluation.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: decides initial images, networks and batches.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        measure_every: Lightning epochs between measurements by the method's own protocol; 0: when the fit ends alone.

    Raises:
        InputError: for numbers out of range; in the fit, for a network that runs no ``nn.Linear``.
    """

    regression = "ridge regression on the pool's features"

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
        init: Init = "real",
        reg: float = 1e-6,
        pool_size: int = 10,
        max_steps_per_network: int = 100,
        pool_batch: int = 500,
        lr_pool: float = 3e-4,
        batch_target: int = 1024,
        lr_images: float = 3e-4,
        learn_labels: bool = True,
        lr_labels: float = 3e-4,
        lr_network: float = 0.01,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        measure_every: int = 0,
    ) -> None:
        check_bounds(FeatureRegression, locals())
        super().__init__()
        network_options = plain(network_options)
        self.save_hyperparameters(ignore=not_plain(network))
        self.keep(network, real)
        self._networks: NetworkPool | None = None  # no submodules, so not among DDP's parameters
        self._saved: list[Mapping[str, Any]] | None = None

    @property
    def method(self) -> str:
        """The method's short name."""
        return "frepo"

    @property
    def target_scale(self) -> float:
        """Factor of the centred one-hot vectors: 1 for 10 classes, less for more, as published."""
        return math.sqrt(10 / self.num_classes)

    def kernel_metadata(self) -> dict[str, Any]:
        """Name the kernel: that of networks' features."""
        return {"name": "features", "reg": self.hparams["reg"]}

    def on_fit_start(self) -> None:
        """Make the pool on the device, or continue with a checkpoint's."""
        super().on_fit_start()

        def build(place: int, generation: int) -> nn.Module:
            network = self.fresh.build(self.hparams["seed"], "pool", place, generation)
            return network_to_device(network, self.device, self.images.dtype).train()

        hparams = self.hparams
        self._networks = NetworkPool(build, hparams["pool_size"], hparams["max_steps_per_network"], hparams["lr_pool"])
        if self._saved is not None:
            self._networks.load_state_dict(self._saved)
            self._saved = None

    @property
    def pool(self) -> NetworkPool:
        """The pool, once a fit has started."""
        assert self._networks is not None
        return self._networks

    def place_of(self, iteration: int) -> int:
        """Draw the network of an iteration, in [0, pool_size), the same on every rank."""
        drawn = torch.randint(len(self.pool), (), generator=self._generator("place", iteration))
        return int(drawn)

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Predict a batch of real images by a network's features."""
        iteration = batch["iteration"]
        # Here and not after the update: a checkpoint that a callback writes in between then has all there is to know.
        if iteration > 0:
            self._train_network(iteration - 1)
        images, targets = self.real_batch(iteration)
        network = self.pool[self.place_of(iteration)]
        own = self.features(network, self.images)
        with torch.no_grad():
            real = self.features(network, images)
        return self.ridge_loss(real @ own.T, own @ own.T, targets)

    def features(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return a network's features, (N, D) float64; no gradient reaches its weights."""
        weights = {name: value.detach() for name, value in network.named_parameters()}
        return embed(network, images, weights=weights).double()

    def _train_network(self, iteration: int) -> None:
        """Train the network of an iteration on the set that it has led to."""
        index = torch.randperm(len(self.images), generator=self._generator("set", iteration))
        index = to_device(index[: self.hparams["pool_batch"]], self.device)
        self.pool.train(self.place_of(iteration), self.images.detach()[index], self.targets.detach()[index])

    def own_accuracies(self, real: Images) -> Tensor:
        """Measure the accuracy of the regression on the features of each network of the pool, (n,)."""
        measured = []
        for place in range(len(self.pool)):
            network = self.pool[place]
            own = self.features(network, self.images)

            def cross(images: Tensor, network: nn.Module = network, own: Tensor = own) -> Tensor:
                return self.features(network, images.to(self.images.dtype)) @ own.T

            measured.append(ridge_accuracy(cross, own @ own.T, self.targets, self.hparams["reg"], real))
        return torch.stack(measured)

    def extra_state(self) -> dict[str, Any]:
        """Keep the pool."""
        return {**super().extra_state(), "pool": None if self._networks is None else self._networks.state_dict()}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Continue with it when the fit starts, because the device is known then."""
        super().restore(state, checkpoint)
        self._saved = state["pool"]
