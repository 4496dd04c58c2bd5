"""KIP: a set on which kernel ridge regression predicts the classes of real images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.labels import RidgeTargets
from ftd_lightning.core.networks import Network
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.kernels import centred_targets, nngp_kernel, ntk_kernel
from ftd_lightning.modules.distillation import Distillation, Init
from ftd_lightning.modules.ridge_distillation import record_accuracies, ridge_accuracy, ridge_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ftd_lightning.contracts import Images
    from ftd_lightning.files.synthetic_set import SyntheticSet


KERNELS = {"ntk": ntk_kernel, "nngp": nngp_kernel}


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
    options = {"depth": kernel["depth"], "bias_variance": kernel["bias_variance"]}

    def between(images: Tensor, others: Tensor) -> Tensor:
        return KERNELS[kernel["name"]](images.double().flatten(1), others.double().flatten(1), **options)

    own = between(synthetic.images, synthetic.images)
    cross = lambda images: between(images, synthetic.images)  # noqa: E731
    return float(ridge_accuracy(cross, own, targets, kernel["reg"], real))


Kernel = Literal["ntk", "nngp"]


class KernelInducingPoints(Distillation):
    """Learns a synthetic set by kernel inducing points (KIP), with kernels of fully connected networks.

    In every iteration, kernel ridge regression on the synthetic images predicts a batch of real ones, and half of the
    mean squared distance from their centred one-hot labels is minimised by Adam in the images, and in the labels where
    they are learned. The kernel is that of an infinitely wide fully connected ReLU network, in closed form, in float64.

    The method's own protocol is the accuracy of the same regression on real images, "kernel regression, test images"
    in the set's scores; ``kernel_accuracy`` measures it of a written set. Networks are evaluated with probabilities,
    which ``SyntheticSet.training_labels`` makes of learned targets. Under DDP every rank draws other real images.

    Args:
        network: of evaluations by networks; a name, an import path, or a function that builds one.
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
        lr_network: step size of the set, for its evaluation.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: of initial images and real batches.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        measure_every: Lightning epochs between measurements by the method's own protocol; 0: when the fit ends alone.

    Raises:
        InputError: for numbers out of range and an unknown kernel.
    """

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
        super().__init__(
            network=network,
            network_options=network_options,
            ipc=ipc,
            init=init,
            augment=Augmentation(""),
            iterations_per_epoch=iterations_per_epoch,
            seed=seed,
            real=real,
            lr_images=lr_images,
            step_size=lr_network,
        )
        self.save_arguments(locals())

    def build(self) -> None:
        """Make the initial synthetic set and its targets."""
        super().build()
        learned, lr = self.hparams["learn_labels"], self.hparams["lr_labels"]
        self.soft_labels = RidgeTargets(self.labels, self.num_classes, scale=1.0, learned=learned, lr=lr)

    @property
    def targets(self) -> Tensor:
        """Targets of the regression on the synthetic images, (N, K)."""
        assert isinstance(self.soft_labels, RidgeTargets)
        return self.soft_labels.values

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the real images to the device, or leave them in host memory where they do not fit."""
        self._real = self.real_on_device()

    @property
    def method(self) -> str:
        """The method's short name."""
        return "kip"

    def describe(self) -> dict[str, Any]:
        """Describe the data, the network and the kernel."""
        named = {key: self.hparams[key] for key in ("depth", "bias_variance", "reg")}
        return {**super().describe(), "kernel": {"name": self.hparams["kernel"], **named}}

    def kernel(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the kernel of (M, C, H, W) and (N, C, H, W) images, (M, N) float64."""
        rows = (images.double().flatten(1), others.double().flatten(1))
        options = {key: self.hparams[key] for key in ("depth", "bias_variance")}
        return KERNELS[self.hparams["kernel"]](*rows, **options)

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Predict a batch of real images."""
        assert isinstance(self.soft_labels, RidgeTargets)
        real = self.draw_real(self._real, self.hparams["batch_target"], batch["iteration"], self.global_rank)
        wanted = self.soft_labels.of_classes(real.labels).to(self.images.dtype)
        cross, own = self.kernel(real.images, self.images), self.kernel(self.images, self.images)
        return self.log_loss(ridge_loss(cross, own, self.targets, wanted, self.hparams["reg"]))

    def own_accuracies(self, real: Images) -> Tensor:
        """Measure the accuracy of the kernel regression, (1,)."""
        own = self.kernel(self.images, self.images)
        cross = partial(self.kernel, others=self.images)
        return torch.stack([ridge_accuracy(cross, own, self.targets, self.hparams["reg"], real)])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure by the method's own protocol where that is due: before the set is written."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        record_accuracies(self, "kernel regression", self.own_accuracies, self.hparams["measure_every"])
