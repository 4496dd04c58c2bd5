"""KIP and FRePo: sets on which ridge regression predicts the classes of real images."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ftd_lightning.callbacks.evaluation import PARTS
from ftd_lightning.core.evaluation import mean_and_std
from ftd_lightning.core.labels import SetLabels
from ftd_lightning.core.networks import Network
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.distribution_matching import embed
from ftd_lightning.functional.kernels import (
    centred_targets,
    half_squared_error,
    nngp_kernel,
    ntk_kernel,
    ridge_predictions,
    ridge_weights,
)
from ftd_lightning.functional.seeding import to_device
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.modules.distillation import Distillation, Init, common

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ftd_lightning.contracts import Images
    from ftd_lightning.files.synthetic_set import SyntheticSet

KERNELS = {"ntk": ntk_kernel, "nngp": nngp_kernel}
Kernel = Literal["ntk", "nngp"]
BATCH = 2048  # real images whose kernel with the set is in memory at a time


def closed_form(kernel: Mapping[str, Any], images: Tensor, others: Tensor) -> Tensor:
    """Return the kernel of ``metadata["kernel"]``, of (M, C, H, W) and (N, C, H, W) images: (M, N) float64."""
    rows = (images.double().flatten(1), others.double().flatten(1))
    return KERNELS[kernel["name"]](*rows, depth=kernel["depth"], bias_variance=kernel["bias_variance"])


def ridge_accuracy(cross: Callable[[Tensor], Tensor], own: Tensor, targets: Tensor, reg: float, real: Images) -> Tensor:
    """Measure the share of real images that ridge regression classifies correctly, in [0, 1]: a scalar.

    ``cross`` maps real images (M, C, H, W), on any device, to their kernel with the set (M, N); ``own`` (N, N) is the
    kernel of the set, ``targets`` (N, K) are its labels, ``reg`` is as for ``functional.ridge_predictions``.
    """
    right, weights = torch.zeros((), device=own.device), ridge_weights(own, targets, reg=reg)
    for images, labels in zip(real.images.split(BATCH), real.labels.split(BATCH), strict=True):
        predictions = cross(to_device(images, own.device)).double() @ weights
        right += (predictions.argmax(1) == to_device(labels, own.device)).sum()
    return right / len(real.labels)


def record_accuracies(module: Distillation, name: str, measure: Callable[[Images], Tensor]) -> None:
    """Log and record the accuracies of a protocol on real images at the end of a batch, where that is due.

    ``measure`` returns those of each kernel, (n,).
    """
    trainer, source, every = module.trainer, module.source, module.hparams["measure_every"]
    due = (every and (trainer.current_epoch + 1) % every == 0) or trainer.current_epoch + 1 == trainer.max_epochs
    ends = trainer.should_stop or trainer.global_step == trainer.max_steps
    if source is None or not (ends or (due and trainer.is_last_batch)):
        return
    for part, (in_words, on_file) in PARTS.items():
        real = source.part(part)
        if not len(real.labels):
            continue
        with torch.no_grad():
            summary = mean_and_std(measure(real))
        module.record_scores({f"{name}, {in_words}": summary})
        log = partial(module.log, sync_dist=True, batch_size=1)  # equal on all ranks; Lightning warns if not said
        log(f"evaluation/ridge_{on_file}_accuracy", summary["mean"], prog_bar=part == "val")


class RidgeTargets(SetLabels):
    """Targets (N, K) of a module's images that ridge regression is fitted to: centred one-hot vectors times ``scale``.

    With ``learn_labels``, learning starts from them, or from the labels of the set that the module continues.
    """

    def __init__(self, module: Distillation, *, scale: float = 1.0) -> None:
        hparams, self._num_classes, self._scale = module.hparams, module.num_classes, scale
        learned, self._reg = hparams["learn_labels"], hparams["reg"]
        start = centred_targets(module.first_labels if learned else module.labels, self._num_classes, scale=scale)
        made = {"label_kind": "target", "labels_made": "learned"} if learned else {}
        options = {"lr": hparams["lr_labels"]} if learned else {}
        super().__init__(start, learned=learned, options=options, metadata={"target_scale": scale, **made})

    def of_set(self) -> Tensor | None:
        """Return learned targets, (N, K)."""
        return self.values if self.are_learned else None

    def loss(self, k_ts: Tensor, k_ss: Tensor, classes: Tensor) -> Tensor:
        """Return half the mean squared distance of predictions for real images from their targets.

        ``k_ts`` (M, N) and ``k_ss`` (N, N) are kernels in float64, ``classes`` (M,) are of the real images.
        """
        wanted = centred_targets(classes, self._num_classes, scale=self._scale).to(self.values.dtype)
        return half_squared_error(ridge_predictions(k_ts, k_ss, self.values, reg=self._reg), wanted)


@torch.no_grad()
def kernel_accuracy(synthetic: SyntheticSet, real: Images) -> float:
    """Measure the accuracy of kernel regression with the images and labels of a set that was learned by KIP.

    Kernel and regularisation are those of ``metadata["kernel"]``; labels are taken as targets, classes as centred
    one-hot vectors. In float64, on the set's device.

    Args:
        synthetic: written by ``KernelInducingPoints``.
        real: images as networks see them, with the set's transform, and classes.

    Returns:
        The share of correct classifications, in [0, 1].

    Raises:
        InputError: for a set without a closed-form kernel, and for real images of another shape, or none.
    """
    kernel: dict[str, Any] = synthetic.metadata.get("kernel", {})
    if kernel.get("name") not in KERNELS:
        raise InputError(f"kernel_accuracy: the set's metadata name no kernel of {', '.join(KERNELS)}: KIP's sets do")
    shapes = [tuple(images.shape[1:]) for images in (real.images, synthetic.images)]
    if not len(real.labels) or shapes[0] != shapes[1]:
        raise InputError(f"kernel_accuracy: {len(real.labels)} real images of {shapes[0]}, the set's are {shapes[1]}")
    labels, scale = synthetic.labels, synthetic.metadata.get("target_scale", 1.0)
    targets = centred_targets(labels, len(synthetic.class_names), scale=scale) if labels.ndim == 1 else labels
    own = closed_form(kernel, synthetic.images, synthetic.images)
    cross = partial(closed_form, kernel, others=synthetic.images)
    return float(ridge_accuracy(cross, own, targets, kernel["reg"], real))


class KernelInducingPoints(Distillation):
    """Learns a synthetic set by kernel inducing points (KIP), with kernels of fully connected networks.

    In every iteration, kernel ridge regression on the synthetic images predicts a batch of real ones, and half of the
    mean squared distance from their centred one-hot labels is minimised by Adam in the images, and in the labels where
    they are learned. The kernel belongs to an infinitely wide fully connected ReLU network, in closed form, in float64.

    The method's own protocol is the accuracy of the same regression on real images, "kernel regression, test images"
    in the set's scores; ``kernel_accuracy`` measures it of a written set. Networks are evaluated with probabilities,
    which ``SyntheticSet.training_labels`` makes of learned targets. Under DDP every rank draws other real images.

    Args:
        network: of evaluations by networks; a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random real images of each class), "noise" (standard normal), or a set or its file to continue.
        kernel: "ntk" or "nngp".
        depth: hidden layers.
        bias_variance: of every layer; weights have variance 2. 0.01 as published.
        reg: regularisation relative to the mean of the kernel's diagonal; 1e-6 as published.
        batch_target: real images per iteration, of all classes together.
        lr_images: Adam's learning rate of the pixels.
        learn_labels: learn the labels too.
        lr_labels: Adam's learning rate of theirs.
        lr_network: step size of the set, for its evaluation.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: of initial images and real batches.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        measure_every: Lightning epochs between measurements by the method's own protocol; 0: when the fit ends alone.
    """

    method = "kip"
    soft_labels: RidgeTargets

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
        init: Init = "real",
        kernel: Kernel = "ntk",
        depth: int = 3,
        bias_variance: float = 0.01,
        reg: float = 1e-6,
        batch_target: int = 1024,
        lr_images: float = 0.04,
        learn_labels: bool = False,
        lr_labels: float = 0.04,
        lr_network: float = 0.01,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        measure_every: int = 0,
    ) -> None:
        super().__init__(**common(locals()), augment=Augmentation(""), step_size=lr_network)
        if kernel not in KERNELS:
            raise InputError(f"KernelInducingPoints: kernel={kernel!r} must be one of {', '.join(KERNELS)}")
        self.save_arguments(locals())

    def build(self) -> None:
        """Make the initial synthetic set and its targets."""
        super().build()
        self.soft_labels = RidgeTargets(self)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images to the device, where they fit."""
        self._real = self.real_on_device()

    def describe(self) -> dict[str, Any]:
        """Describe the data, the network and the kernel."""
        named = {key: self.hparams[key] for key in ("depth", "bias_variance", "reg")}
        return {**super().describe(), "kernel": {"name": self.hparams["kernel"], **named}}

    def kernel(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the kernel of (M, C, H, W) and (N, C, H, W) images, (M, N) float64."""
        return closed_form({**self.hparams, "name": self.hparams["kernel"]}, images, others)

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Predict a batch of real images."""
        real = self.draw_real(self._real, self.hparams["batch_target"], batch["iteration"], self.global_rank)
        cross, own = self.kernel(real.images, self.images), self.kernel(self.images, self.images)
        return self.log_loss(self.soft_labels.loss(cross, own, real.labels))

    def own_accuracies(self, real: Images) -> Tensor:
        """Measure the accuracy of the kernel regression, (1,)."""
        own = self.kernel(self.images, self.images)
        cross = partial(self.kernel, others=self.images)
        return ridge_accuracy(cross, own, self.soft_labels.values, self.hparams["reg"], real)[None]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure by the method's own protocol where that is due: before the set is written."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        record_accuracies(self, "kernel regression", self.own_accuracies)


class NetworkPool:
    """Networks of different ages, each trained a little by Adam whenever it was used.

    ``build`` makes the network of a place and a generation; equal arguments give equal weights. After ``max_steps``
    steps a fresh one takes its place. At the start all weights are fresh, but ages are spread evenly over
    [0, max_steps), so that the networks are replaced at different times.
    """

    def __init__(self, build: Callable[[int, int], nn.Module], size: int, max_steps: int, lr: float) -> None:
        self._build, self._max_steps = build, max_steps
        self._adam = partial(torch.optim.Adam, lr=lr)
        self.networks = [build(place, 0) for place in range(size)]
        self.ages = [place * max_steps // size for place in range(size)]
        self._generations = [0] * size
        self._optimizers = [self._adam(network.parameters()) for network in self.networks]

    def step(self, place: int, images: Tensor, targets: Tensor) -> None:
        """Train a network one step on half the squared error; replace it after its last."""
        optimizer = self._optimizers[place]
        optimizer.zero_grad()
        half_squared_error(self.networks[place](images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self.ages[place] += 1
        if self.ages[place] >= self._max_steps:
            self.ages[place] = 0
            self._generations[place] += 1
            self.networks[place] = self._build(place, self._generations[place])
            self._optimizers[place] = self._adam(self.networks[place].parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return weights, states of the optimizers, ages and generations, by place."""
        return {
            "networks": [network.state_dict() for network in self.networks],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "ages": list(self.ages),
            "generations": list(self._generations),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the :meth:`state_dict` of a pool of the same size and network."""
        self.ages, self._generations = list(state["ages"]), list(state["generations"])
        parts = zip(self.networks, state["networks"], self._optimizers, state["optimizers"], strict=True)
        for network, weights, optimizer, moments in parts:
            network.load_state_dict(weights)
            optimizer.load_state_dict(moments)


class FeatureRegression(Distillation):
    """Learns a synthetic set by neural feature regression with pooling (FRePo, NeurIPS 2022).

    In every iteration one network of a pool is drawn. Ridge regression on its features of the synthetic images, the
    inputs of its last linear layer, predicts a batch of real images; half of the mean squared distance from their
    targets is minimised by Adam in images and targets. Before the next iteration that network takes one step of Adam on
    the set, and after ``max_steps_per_network`` of them a fresh one takes its place. The pool is part of a checkpoint;
    under DDP it is the same on every rank, while real images differ.

    Not as published: Adam instead of LAMB, a constant learning rate, no flipped copies in the batches, and no second
    term of the loss (the authors' margin on the labels).

    The method's own protocol is the accuracy of the ridge regression, the mean over the networks of the pool: "ridge
    regression on the pool's features, test images" in the set's scores.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random real images of each class), "noise" (standard normal), or a set or its file to continue.
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
        seed: of initial images, networks and batches.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        measure_every: Lightning epochs between measurements by the method's own protocol; 0: when the fit ends alone.

    Raises:
        InputError: in the fit, for a network that runs no ``nn.Linear``.
    """

    method = "frepo"
    soft_labels: RidgeTargets
    pool: NetworkPool  # from the start of a fit; no submodule, so not among DDP's parameters

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
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
        super().__init__(**common(locals()), augment=Augmentation(""), step_size=lr_network)
        self.save_arguments(locals())

    def build(self) -> None:
        """Make the initial synthetic set and its targets, smaller for more than 10 classes, as published."""
        super().build()
        self.soft_labels = RidgeTargets(self, scale=math.sqrt(10 / self.num_classes))

    def describe(self) -> dict[str, Any]:
        """Describe the data, the network and the kernel, which is made of networks' features."""
        return {**super().describe(), "kernel": {"name": "features", "reg": self.hparams["reg"]}}

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images to the device; make the pool, or continue with a checkpoint's."""
        self._real = self.real_on_device()
        hparams, build = self.hparams, partial(self.fresh_network, "pool")
        self.pool = NetworkPool(build, hparams["pool_size"], hparams["max_steps_per_network"], hparams["lr_pool"])
        if state is not None:
            self.pool.load_state_dict(state["pool"])

    def place_of(self, iteration: int) -> int:
        """Draw the network of an iteration, in [0, pool_size), the same on every rank."""
        return int(torch.randint(self.hparams["pool_size"], (), generator=self.generator("place", iteration)))

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Predict a batch of real images by a network's features."""
        iteration = batch["iteration"]
        # Here and not after the update, so that a checkpoint may lie between them.
        if iteration > 0:
            self._train_network(iteration - 1)
        images, classes = self.draw_real(self._real, self.hparams["batch_target"], iteration, self.global_rank)
        network = self.pool.networks[self.place_of(iteration)]
        own = self.features(network, self.images)
        with torch.no_grad():
            real = self.features(network, images)
        return self.log_loss(self.soft_labels.loss(real @ own.T, own @ own.T, classes))

    def features(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return a network's features, (N, D) float64; no gradient reaches its weights."""
        weights = {name: value.detach() for name, value in network.named_parameters()}
        return embed(network, images, weights=weights).double()

    def _train_network(self, iteration: int) -> None:
        """Train the network of an iteration on the set that it has led to."""
        order = torch.randperm(len(self.images), generator=self.generator("set", iteration))
        index = to_device(order[: self.hparams["pool_batch"]], self.device)
        self.pool.step(self.place_of(iteration), self.images.detach()[index], self.soft_labels.values.detach()[index])

    def own_accuracies(self, real: Images) -> Tensor:
        """Measure the accuracy of the regression on the features of each network of the pool, (n,)."""
        return torch.stack([self._accuracy_of(network, real) for network in self.pool.networks])

    def _accuracy_of(self, network: nn.Module, real: Images) -> Tensor:
        own = self.features(network, self.images)
        cross = lambda images: self.features(network, images.to(self.images.dtype)) @ own.T  # noqa: E731
        return ridge_accuracy(cross, own @ own.T, self.soft_labels.values, self.hparams["reg"], real)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure by the method's own protocol where that is due: before the set is written."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        record_accuracies(self, "ridge regression on the pool's features", self.own_accuracies)

    def extra_state(self) -> dict[str, Any]:
        """Add the pool."""
        return {**super().extra_state(), "pool": self.pool.state_dict()}
