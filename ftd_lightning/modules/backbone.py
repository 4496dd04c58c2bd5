"""CLP-DD and matching of class means: sets for a linear probe on a backbone that is given and never trained."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ftd_lightning.contracts import Images, ImageShape
from ftd_lightning.core.linear_probe import LinearProbe, frozen
from ftd_lightning.core.networks import Network, NetworkFactory
from ftd_lightning.data.decoding import cache_folder, cached
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, write_tensors
from ftd_lightning.files.trajectory_store import TrajectoryStore
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.linear_probes import centred_class_means, class_mean_loss, ridge_cross_entropy
from ftd_lightning.functional.seeding import to_device
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.modules.distillation import Distillation, Init, common
from ftd_lightning.sizes import as_size

if TYPE_CHECKING:
    from collections.abc import Mapping

Loss = Literal["ridge", "class_means"]
METHODS = {"ridge": "clp-dd", "class_means": "sfm"}
BATCH = 256  # real images whose features are computed at a time
KIND = "features"


@torch.no_grad()
def cached_features(probe: LinearProbe, images: Tensor, device: torch.device, *, backbone: str) -> Tensor:
    """Read the features of real images (N, C, H, W) from the user's cache, or compute them and write them there.

    They are known by the images' values and ``backbone``, a fingerprint. Where the backbone computes others for the
    first images, they are replaced. Memory and file take 4 D bytes per image.

    Returns:
        (N, D) float32, of length 1, on the CPU.
    """
    path = cache_folder(None) / "features" / f"{fingerprint(images)}_{backbone}.safetensors"

    def features(images: Tensor) -> Tensor:
        return probe.features(to_device(images, device)).float().cpu()

    def compute() -> None:
        found = torch.cat([features(part) for part in images.split(BATCH)])
        write_tensors(path, {"features": found}, kind=KIND, metadata={"backbone": backbone})

    def read(path: Path) -> Tensor:
        found, first = TensorFile(path, kind=KIND)["features"], features(images[:2])
        if found[:2].shape != first.shape or not torch.allclose(found[:2], first, atol=1e-2):
            raise InputError(f"{path}: holds features of another backbone")
        return found

    return cached(path, read, compute, "they are computed again", "XDG_CACHE_HOME")


class BackboneDistillation(Distillation):
    """Learns a synthetic set on which a linear probe on a given, frozen backbone is trained.

    The backbone's features of all real images are computed once, of images that are not augmented. In every iteration
    ``copies`` of the synthetic images, each augmented anew, pass through the backbone, and Adam takes a step on one of
    two losses:

    - "ridge" (CLP-DD, arXiv 2605.07194): cross entropy of a batch of real features under the ridge regression on the
      synthetic ones, at a temperature.
    - "class_means" (SFM, arXiv 2602.05391): one minus the cosine between centred class means of synthetic and of all
      real features. It is Linear Gradient Matching (NeurIPS 2025) with a head of zeros on all real images.

    Features are divided by their lengths, for the probe that is evaluated as well. The defaults of regularisation,
    temperature and rate are this library's. ``EvaluateSynthetic`` and ``SyntheticEvaluation`` train a
    ``core.LinearProbe``. A checkpoint does not hold the backbone; "backbone" in a set's metadata has its name and a
    fingerprint.

    Args:
        network: the backbone: an ``nn.Module`` from images (N, C, H, W), as the datamodule normalises them, to features
            (N, D), which is copied; a function that returns one, or its import path; or the folder of a trajectory
            store. See ``core.LinearProbe``.
        network_options: arguments of that function.
        head: name of the backbone's submodule that makes logits and is left out.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random real images of each class), "noise" (standard normal), or a set or its file to continue.
        loss: "ridge" or "class_means".
        reg: of the ridge regression, relative to the mean of the kernel's diagonal.
        temperature: of its softmax.
        batch_target: real images per iteration of "ridge", of all classes together.
        copies: of the synthetic images in an iteration; 1 without augmentation.
        lr_images: Adam's learning rate of the pixels, or of a decoder's parameters.
        lr_network: the step size that the set carries: of SGD on the probe.
        augment: DSA of the copies: a strategy, the fields of an ``Augmentation``, or one; "" for none.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: of initial images, real batches and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        decoder: learn parameters that images are decoded from, in place of pixels, such as ``decoders.Pyramid``.
    """

    accepts_module = True

    def __init__(
        self,
        network: Network,
        network_options: dict[str, Any] | None = None,
        head: str | None = None,
        ipc: Ipc = 1,
        init: Init = "real",
        loss: Loss = "ridge",
        reg: float = 0.01,
        temperature: float = 0.1,
        batch_target: int = 1024,
        copies: int = 10,
        lr_images: float = 0.01,
        lr_network: float = 1.0,
        augment: dict[str, Any] | str | Augmentation = "crop_scale_rotate",
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        decoder: Decoder | dict[str, Any] | None = None,
    ) -> None:
        augment = Augmentation.of(augment)
        super().__init__(**common(locals()), step_size=lr_network)
        if loss not in METHODS:
            raise InputError(f"BackboneDistillation: loss={loss!r} must be one of {', '.join(METHODS)}")
        self.save_arguments(locals())

    @property
    def method(self) -> str:
        """The method's short name."""
        return METHODS[self.hparams["loss"]]

    def make_networks(self) -> NetworkFactory:
        """Return the builder of linear probes on the backbone."""
        backbone, options = self._network_arguments
        head = self.hparams["head"]
        if isinstance(backbone, str):
            named = {"backbone": backbone, "options": options, "head": head}
            self._network_arguments = ("ftd_lightning.core.LinearProbe", named)
            self._refuse_other_normalisation(Path(backbone).expanduser())
        elif backbone is not None:
            found = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone(**(options or {}))
            shape = self._shape() if self.data is None else self.data.shape
            self._network_arguments = (partial(LinearProbe, *shape, backbone=frozen(found, head)), None)
        return super().make_networks()

    def _refuse_other_normalisation(self, folder: Path) -> None:
        """Refuse a store of teachers of whitened images for standardised ones, and the other way round."""
        described = TrajectoryStore(folder).metadata.get("transform") if folder.is_dir() else None
        ours = None if self.data is None else self.data.transform.describe().get("kind")
        if described and ours and (theirs := described.get("kind")) != ours:
            raise InputError(f"{folder}: its teachers have seen images of the transform {theirs}, not {ours}")

    def _shape(self) -> ImageShape:
        images, labels = self.real_images()
        return ImageShape(images.shape[1], int(labels.max()) + 1, as_size(images.shape[2:]))

    def build(self) -> None:
        """Make the initial synthetic set, and a probe, whose backbone is used."""
        super().build()
        probe = self.fresh.build(self.seed, "backbone")
        assert isinstance(probe, LinearProbe)
        self._probe = (probe,)  # no submodule: neither among DDP's parameters nor in a checkpoint
        self._backbone = probe.backbone_fingerprint()

    def describe(self) -> dict[str, Any]:
        """Describe the data, the probe and the backbone."""
        kind = type(self._probe[0].backbone)
        name = self.hparams.get("network") or f"{kind.__module__}.{kind.__qualname__}"
        return {**super().describe(), "backbone": {"name": name, "fingerprint": self._backbone}}

    def extra_state(self) -> dict[str, Any]:
        """Add the fingerprint of the backbone."""
        return {**super().extra_state(), "backbone": self._backbone}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Refuse another backbone."""
        if state["backbone"] != self._backbone:
            raise InputError("the checkpoint is of a backbone of another fingerprint: pass the same one, or begin anew")
        super().restore(state, checkpoint)

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the backbone to the device, and find the features of the real images."""
        probe, real = self._probe[0].to(self.device, self.images.dtype), self.real_images()
        features = cached_features(probe, real.images, self.device, backbone=self._backbone)
        self._real = Images(features.to(self.device), real.labels.to(self.device))
        self._real_means = centred_class_means(*self._real, self.num_classes).to(self.images.dtype)

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Compare features of augmented synthetic images with those of real ones."""
        iteration, hparams, classes = batch["iteration"], self.hparams, self.num_classes
        count = hparams["copies"] if self.augment else 1
        generators = [self.generator("copies", iteration, number) for number in range(count)]
        images = torch.cat([self.augment(self.images, generator) for generator in generators])
        features, labels = self._probe[0].features(images), self.labels.repeat(count)
        with torch.autocast(self.device.type, enabled=False):  # rounding to bf16 is as large as lambda
            if hparams["loss"] == "class_means":
                return self.log_loss(class_mean_loss(centred_class_means(features, labels, classes), self._real_means))
            real = self.draw_real(self._real, hparams["batch_target"], iteration, self.global_rank)
            options = {key: hparams[key] for key in ("reg", "temperature")}
            return self.log_loss(ridge_cross_entropy(features, labels, *real, num_classes=classes, **options))
