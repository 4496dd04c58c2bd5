"""What KIP and FRePo share: a set on which ridge regression predicts the classes of real images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.callbacks.evaluation import PARTS
from ftd_lightning.core.evaluation import mean_and_std
from ftd_lightning.core.networks import Network, refuse_object
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.kernels import centred_targets, half_squared_error, ridge_predictions
from ftd_lightning.functional.seeding import make_generator, to_device
from ftd_lightning.modules.distillation import Distillation

if TYPE_CHECKING:
    from ftd_lightning.contracts import Images


class RidgeDistillation(Distillation):
    """The base of methods whose loss is the error of ridge regression in closed form.

    Its subclasses' hyper-parameters include ``network_options``, ``reg``, ``batch_target``, ``lr_images``,
    ``learn_labels``, ``lr_labels``, ``lr_network``, ``iterations_per_epoch`` and ``measure_every``; they call
    :meth:`keep` in their ``__init__``. Images, and targets where they are learned, are learned by Adam.

    Labels of the set: classes, or, where they are learned, (N, K) targets (``label_kind`` "target"). Two protocols
    measure it. The method's own, accuracy of the ridge regression, is measured on the raw targets when the fit ends and
    every ``measure_every`` Lightning epochs; it is logged (``evaluation/ridge_test_accuracy``) and recorded in the
    set's scores. The library's, networks trained by cross entropy, takes probabilities:
    ``SyntheticSet.training_labels`` makes them of the targets.

    Under DDP every rank draws real images of its own, and the gradient is averaged.

    Attributes:
        targets: (N, K): what the regression is fitted to; a parameter where it is learned.
    """

    step_size: Tensor
    targets: nn.Parameter | Tensor
    regression = "ridge regression"  # names the method's own protocol in the set's scores

    def keep(self, network: Network, real: tuple[Tensor, Tensor] | None) -> None:
        """Check what ``__init__`` of a subclass got and saved as hyper-parameters.

        Raises:
            InputError: for a module where fresh networks are drawn.
        """
        refuse_object(network)
        self.augment = Augmentation.of("")
        self._architecture = network
        self.keep_real(real)

    def build(self) -> None:
        """Make the initial synthetic set."""
        self.fresh = self.own_networks(self._architecture, self.hparams["network_options"])
        self.make_images()
        start = centred_targets(self.labels, self.num_classes, scale=self.target_scale)
        if self.hparams["learn_labels"]:
            self.targets = nn.Parameter(start, requires_grad=self.hparams["lr_labels"] > 0)
        else:
            self.register_buffer("targets", start)
        self.register_buffer("step_size", torch.tensor(float(self.hparams["lr_network"])))

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.labels) // int(self.hparams["ipc"])

    @property
    def target_scale(self) -> float:
        """Factor of the centred one-hot vectors."""
        return 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Learn images and targets by Adam."""
        groups: list[dict[str, Any]] = [{"params": [self.images], "lr": self.hparams["lr_images"]}]
        if self.hparams["learn_labels"]:
            groups.append({"params": [self.targets], "lr": self.hparams["lr_labels"]})
        # Fused: its count of steps is on the device, where a step that is skipped is undone without waiting.
        return torch.optim.Adam(groups, fused=True)

    def on_fit_start(self) -> None:
        """Move the real images to the device, or leave them in host memory where they do not fit."""
        super().on_fit_start()
        self._images, self._classes = self.real_on_device()

    def real_batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Draw ``batch_target`` real images of all classes without replacement (all, if there are fewer).

        Returns:
            Images (M, C, H, W) and their targets (M, K); every rank's are its own.
        """
        generator = self._generator("real", iteration, self.global_rank)
        order = torch.randperm(len(self._classes), generator=generator)[: self.hparams["batch_target"]]
        index = to_device(order, self._classes.device)
        images = to_device(self._images[index], self.device, self.images.dtype)  # in the trainer's precision
        classes = to_device(self._classes[index], self.device)
        return images, centred_targets(classes, self.num_classes, scale=self.target_scale).to(self.images.dtype)

    def _generator(self, *keys: int | str) -> torch.Generator:
        return make_generator(self.hparams["seed"], *keys)

    def ridge_loss(self, k_ts: Tensor, k_ss: Tensor, targets: Tensor) -> Tensor:
        """Return half the mean squared distance of predictions for real images from their targets.

        Args:
            k_ts: (M, N) kernel of real and synthetic images, float64.
            k_ss: (N, N), float64.
            targets: of the real images, (M, K).
        """
        predictions = ridge_predictions(k_ts, k_ss, self.targets, reg=self.hparams["reg"])
        return self.logged(half_squared_error(predictions, targets))

    def own_accuracies(self, real: Images) -> Tensor:
        """Measure the accuracy of the ridge regression, (n,): of each of n kernels."""
        raise NotImplementedError

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure by the method's own protocol where that is due or the fit ends: before the set is written."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        trainer, every = self.trainer, self.hparams["measure_every"]
        due = (every and (self.epoch + 1) % every == 0) or trainer.current_epoch + 1 == trainer.max_epochs
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if self.source is None or not (ends or (due and trainer.is_last_batch)):
            return
        for part, (in_words, on_file) in PARTS.items():
            real = self.source.part(part)
            if not len(real.labels):
                continue
            with torch.no_grad():
                summary = mean_and_std(self.own_accuracies(real))
            self.record_scores({f"{self.regression}, {in_words}": summary})
            log = partial(self.log, sync_dist=True, batch_size=1)  # equal on all ranks; Lightning warns if not said
            log(f"evaluation/ridge_{on_file}_accuracy", summary["mean"], prog_bar=part == "val")

    def set_labels(self) -> Tensor:
        """Return (N,) classes, or (N, K) learned targets."""
        return self.targets if self.hparams["learn_labels"] else self.labels

    def learned(self) -> dict[str, Tensor]:
        """Return what is learned, by name."""
        return {**super().learned(), **({"labels": self.targets} if self.hparams["learn_labels"] else {})}

    def kernel_metadata(self) -> dict[str, Any]:
        """Describe the kernel: at least "name" and "reg"."""
        raise NotImplementedError

    def set_metadata(self) -> dict[str, Any]:
        """Describe the data, the network, the kernel and the labels."""
        return {
            **super().set_metadata(),
            "kernel": self.kernel_metadata(),
            "target_scale": self.target_scale,
            **({"label_kind": "target", "labels_made": "learned"} if self.hparams["learn_labels"] else {}),
        }
