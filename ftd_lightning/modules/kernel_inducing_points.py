"""How well kernel regression on a synthetic set classifies real images: the protocol of KIP's authors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.arguments import not_plain, plain
from ftd_lightning.core.networks import Network
from ftd_lightning.errors import InputError
from ftd_lightning.functional.kernels import centred_targets, nngp_kernel, ntk_kernel, ridge_weights
from ftd_lightning.functional.seeding import to_device
from ftd_lightning.modules.distillation import Init
from ftd_lightning.modules.ridge_distillation import RidgeDistillation

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftd_lightning.contracts import Images
    from ftd_lightning.files.synthetic_set import SyntheticSet


KERNELS = {"ntk": ntk_kernel, "nngp": nngp_kernel}
BATCH = 2048  # real images whose kernel with the set is in memory at a time


def ridge_accuracy(cross: Callable[[Tensor], Tensor], own: Tensor, targets: Tensor, reg: float, real: Images) -> Tensor:
    """Measure the share of real images that ridge regression classifies correctly, in [0, 1]: a scalar.

    Args:
        cross: maps real images (M, C, H, W) to their kernel with the set, (M, N).
        own: kernel of the set, (N, N).
        targets: of the set, (N, K).
        reg: as for ``functional.ridge_predictions``.
        real: on any device.
    """
    right, weights = torch.zeros((), device=own.device), ridge_weights(own, targets, reg=reg)
    for images, labels in zip(real.images.split(BATCH), real.labels.split(BATCH), strict=True):
        predictions = cross(to_device(images, own.device)).double() @ weights
        right += (predictions.argmax(1) == to_device(labels, own.device)).sum()
    return right / len(real.labels)


@torch.no_grad()
def kernel_accuracy(synthetic: SyntheticSet, real: Images) -> float:
    """Measure the accuracy of kernel regression with the images and labels of a set that was learned by KIP.

    The kernel and the regularisation are those that the set was learned with (``metadata["kernel"]``); its labels are
    taken as the targets that they are, classes as centred one-hot vectors. In float64, on the set's device.

    Args:
        synthetic: written by ``KernelInducingPoints``.
        real: images as networks see them, with the set's transform, and classes.

    Returns:
        The share of correct classifications, in [0, 1].

    Raises:
        InputError: for a set without a closed-form kernel, and where there are no real images, or of another shape.
    """
    kernel: dict[str, Any] = synthetic.metadata.get("kernel", {})
    if kernel.get("name") not in KERNELS:
        raise InputError(f"kernel_accuracy: the set's metadata name no kernel of {', '.join(KERNELS)}: KIP's sets do")
    shapes = [tuple(images.shape[1:]) for images in (real.images, synthetic.images)]
    if not len(real.labels) or shapes[0] != shapes[1]:
        raise InputError(f"kernel_accuracy: {len(real.labels)} real images of {shapes[0]}, the set's are {shapes[1]}")
    labels, scale = synthetic.labels, synthetic.metadata.get("target_scale", 1.0)
    targets = centred_targets(labels, len(synthetic.class_names), scale=scale) if labels.ndim == 1 else labels
    options = {"depth": kernel["depth"], "bias_variance": kernel["bias_variance"]}

    def between(images: Tensor, others: Tensor) -> Tensor:
        return KERNELS[kernel["name"]](images.double().flatten(1), others.double().flatten(1), **options)

    own = between(synthetic.images, synthetic.images)
    cross = lambda images: between(images, synthetic.images)  # noqa: E731
    return float(ridge_accuracy(cross, own, targets, kernel["reg"], real))


Kernel = Literal["ntk", "nngp"]


class KernelInducingPoints(RidgeDistillation):
    """Learns a synthetic set by kernel inducing points (KIP), with kernels of fully connected networks.

    In every iteration, kernel ridge regression on the synthetic images predicts a batch of real ones, and half of the
    mean squared distance from their centred one-hot labels is minimised by Adam in the images, and in the labels where
    they are learned. The kernel is that of an infinitely wide fully connected ReLU network, in closed form; no network
    is drawn or trained. Kernel and solution are computed in float64.

    The method's own protocol is the accuracy of the same regression on real images, "kernel regression, test images"
    in the set's scores; ``training.kernel_accuracy`` measures it of a set that was written.

    Args:
        network: of the evaluation by networks, which the set names; the method itself has none. A name, an import
            path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class.
        init: "real" starts from random real images of each class, "noise" from a normal.
        kernel: "ntk" or "nngp".
        depth: hidden layers.
        bias_variance: of every layer; weights have variance 2. 0.01 as published.
        reg: regularisation relative to the mean of the kernel's diagonal; 1e-6 as published.
        batch_target: real images per iteration, of all classes together.
        lr_images: Adam's learning rate of the pixels.
        learn_labels: learn the labels too.
        lr_labels: Adam's learning rate of theirs.
        lr_network: the step size that the set carries for its evaluation; nothing is trained with it here.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: decides initial images and real batches.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        measure_every: Lightning epochs between measurements by the method's own protocol; 0: when the fit ends alone.

    Raises:
        InputError: for numbers out of range and an unknown kernel.
    """

    regression = "kernel regression"

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
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
        check_bounds(KernelInducingPoints, locals())
        if kernel not in KERNELS:
            raise InputError(f"KernelInducingPoints: kernel={kernel!r} must be one of {', '.join(KERNELS)}")
        super().__init__()
        network_options = plain(network_options)
        self.save_hyperparameters(ignore=not_plain(network))
        self.keep(network, real)

    @property
    def method(self) -> str:
        """The method's short name."""
        return "kip"

    def kernel_metadata(self) -> dict[str, Any]:
        """Name the kernel and its numbers."""
        named = {key: self.hparams[key] for key in ("depth", "bias_variance", "reg")}
        return {"name": self.hparams["kernel"], **named}

    def kernel(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the kernel of (M, C, H, W) and (N, C, H, W) images, (M, N) float64."""
        rows = (images.double().flatten(1), others.double().flatten(1))
        options = {key: self.hparams[key] for key in ("depth", "bias_variance")}
        return KERNELS[self.hparams["kernel"]](*rows, **options)

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Predict a batch of real images."""
        images, targets = self.real_batch(batch["iteration"])
        return self.ridge_loss(self.kernel(images, self.images), self.kernel(self.images, self.images), targets)

    def own_accuracies(self, real: Images) -> Tensor:
        """Measure the accuracy of the kernel regression, (1,)."""
        own = self.kernel(self.images, self.images)

        def cross(images: Tensor) -> Tensor:
            return self.kernel(images, self.images)

        return torch.stack([ridge_accuracy(cross, own, self.targets, self.hparams["reg"], real)])
