"""Evaluation during distillation: fresh networks trained on the set as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ftd_lightning.data.datamodule import DistillationDataModule
from ftd_lightning.data.datasets import Images
from ftd_lightning.data.files import run_folder
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.modules.protocol import accuracy, mean_and_std, train_fresh_networks
from ftd_lightning.modules.trajectory_matching import TrajectoryMatching

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


PARTS = {"val": "held-out training images", "test": "test images"}


class EvaluateSynthetic(Callback):
    """Trains fresh networks on the raw and on the averaged images every few epochs and logs their accuracy.

    Every measurement takes networks of its own: the averaged images never meet one that saw the raw ones. Accuracy on
    held-out training images ("val") may choose an iterate; accuracy on the test images is logged beside it, for the eye
    only. Both travel with a set of that iteration (``metadata["scores"]``). It runs at the end of a training epoch,
    where gradients are on.

    Args:
        every_n_epochs: how often, in Lightning epochs of ``iterations_per_epoch``; also after the last one.
        networks: fresh networks a measurement.
        epochs: of each over the synthetic set.
        keep_best: write the set whose mean val accuracy is the highest so far to ``best.safetensors`` beside the logs.
        seed: decides initialisation, batches and augmentation, with the iteration.
        lr: learning rate; None takes the present step size.
    """

    def __init__(
        self,
        every_n_epochs: int = 5,
        networks: int = 2,
        epochs: int = 1000,
        keep_best: bool = True,
        seed: int = 0,
        lr: float | None = None,
    ) -> None:
        if min(every_n_epochs, networks, epochs) < 1:
            raise InputError("EvaluateSynthetic: every_n_epochs, networks and epochs must be at least 1")
        self.every_n_epochs = every_n_epochs
        self.networks = networks
        self.epochs = epochs
        self.keep_best = keep_best
        self.seed = seed
        self.lr = lr
        self.best_accuracy = -1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what it cannot measure."""
        if not isinstance(pl_module, TrajectoryMatching):
            raise InputError(f"EvaluateSynthetic measures TrajectoryMatching, not {type(pl_module).__name__}")
        if not isinstance(getattr(trainer, "datamodule", None), DistillationDataModule):
            raise InputError("EvaluateSynthetic takes real images from a DistillationDataModule: give one")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where it is due."""
        assert isinstance(pl_module, TrajectoryMatching)
        last = 0 <= trainer.max_steps <= trainer.global_step
        if (trainer.current_epoch + 1) % self.every_n_epochs and not last:
            return
        chosen: dict[str, float] = {}
        for name in ("raw", "ema"):
            if name == "ema" and pl_module.ema_images is None:
                continue
            for part, accuracies in self._measure(trainer, pl_module, name).items():
                summary = mean_and_std(accuracies)
                pl_module.scores[f"{name} images, {PARTS[part]}"] = summary
                pl_module.log(f"evaluation/{name}_{part}_accuracy_mean", summary["mean"], prog_bar=part == "val")
                pl_module.log(f"evaluation/{name}_{part}_accuracy_std", summary["std"])
                if part == "val":
                    chosen[name] = float(summary["mean"])
        if chosen and max(chosen.values()) > self.best_accuracy:
            self.best_accuracy = max(chosen.values())
            if self.keep_best and trainer.is_global_zero:
                best = pl_module.synthetic_set()
                best.metadata["chosen_on"] = {"held_out_accuracy": chosen, "iteration": trainer.global_step}
                best.save(run_folder(trainer) / "best.safetensors")

    def _measure(self, trainer: Trainer, module: TrajectoryMatching, name: str) -> dict[str, torch.Tensor]:
        datamodule, device = trainer.datamodule, module.device  # type: ignore[attr-defined]
        keys = (self.seed, "evaluation", trainer.global_step, name)
        networks = [module.fresh.build(*keys, index).to(device) for index in range(self.networks)]
        train_fresh_networks(
            networks,
            (module.images if name == "raw" else module.ema_images).detach().clone(),  # type: ignore[union-attr]
            module.labels,
            epochs=self.epochs,
            lr=float(module.step_size.detach()) if self.lr is None else self.lr,
            seed=derive_seed(*keys),
            strategy=module.hparams["augment"],
            mode=module.hparams["augment_mode"],
            progress=f"evaluation of {name} images" if trainer.is_global_zero else None,
        )
        parts: dict[str, Images] = {"val": datamodule.val, "test": datamodule.test}
        return {
            part: torch.tensor([accuracy(net, *(t.to(device) for t in images)) for net in networks])
            for part, images in parts.items()
            if len(images.labels)
        }

    def state_dict(self) -> dict[str, Any]:
        """Keep the best accuracy."""
        return {"best_accuracy": self.best_accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best_accuracy = state_dict["best_accuracy"]
