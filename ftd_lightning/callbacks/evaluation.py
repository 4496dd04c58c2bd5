"""Evaluation during distillation: fresh networks trained on the set as it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ftd_lightning.data.datamodule import DistillationDataModule
from ftd_lightning.data.datasets import Images
from ftd_lightning.data.files import replacing, run_folder
from ftd_lightning.errors import InputError
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.training.distillation import Distillation
from ftd_lightning.training.evaluation_protocol import accuracies, from_all_ranks, mean_and_std, train_fresh_networks
from ftd_lightning.training.ranks import own_share
from ftd_lightning.training.side_by_side import SideBySide

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


PARTS = {"val": "held-out training images", "test": "test images"}
PARTS_ON_FILE = {"val": "held_out", "test": "test"}


class EvaluateSynthetic(Callback):
    """Trains fresh networks on the raw and on the averaged images every few epochs and logs their accuracy.

    Every measurement takes networks of its own: the averaged images never meet one that saw the raw ones. Accuracy on
    held-out training images ("val") may choose an iterate; accuracy on the test images is logged beside it, for the eye
    only. Both travel with a set of that iteration (``metadata["scores"]``), and all measurements of a run are listed in
    ``evaluations.json`` beside the logs. It runs at the end of a training epoch, where gradients are on. Under DDP each
    of W ranks trains every W-th network, with the results of one process.

    Args:
        every_n_epochs: how often, in Lightning epochs of ``iterations_per_epoch``; also after the last one.
        networks: fresh networks a measurement.
        epochs: of each over the synthetic set.
        keep_best: write the set whose mean val accuracy is the highest so far to ``best.safetensors`` beside the logs.
        seed: decides initialisation, batches and augmentation, with the iteration.
        lr: learning rate; None takes the present step size.
        compile: torch.compile for forward and backward passes: True, False, or "auto": on a GPU only.

    Attributes:
        history: what ``evaluations.json`` says: a measurement each, as ``{"iteration": int, "images": "raw" | "ema",
            "part": "held_out" | "test", "mean": float, "std": float, "n": int}``.
    """

    def __init__(
        self,
        every_n_epochs: int = 5,
        networks: int = 2,
        epochs: int = 1000,
        keep_best: bool = True,
        seed: int = 0,
        lr: float | None = None,
        compile: Compile = "auto",  # noqa: A002
    ) -> None:
        if min(every_n_epochs, networks, epochs) < 1:
            raise InputError("EvaluateSynthetic: every_n_epochs, networks and epochs must be at least 1")
        self.every_n_epochs = every_n_epochs
        self.networks = networks
        self.epochs = epochs
        self.keep_best = keep_best
        self.seed = seed
        self.lr = lr
        self.compile = compile
        compiles(compile, torch.device("cpu"))  # complains of an unknown setting
        self.best_accuracy = -1.0
        self.history: list[dict[str, Any]] = []
        self._losses: SideBySide | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what it cannot measure."""
        if not isinstance(pl_module, Distillation):
            raise InputError(f"EvaluateSynthetic measures what a distillation makes, not {type(pl_module).__name__}")
        if not isinstance(getattr(trainer, "datamodule", None), DistillationDataModule):
            raise InputError("EvaluateSynthetic takes real images from a DistillationDataModule: give one")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where it is due."""
        assert isinstance(pl_module, Distillation)
        last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        last = last or trainer.current_epoch + 1 == trainer.max_epochs
        if (trainer.current_epoch + 1) % self.every_n_epochs and not last:
            return
        chosen: dict[str, float] = {}
        # A run that went on from a checkpoint of this very iteration measures it again.
        self.history = [entry for entry in self.history if entry["iteration"] < trainer.global_step]
        for name in ("raw", "ema"):
            if name == "ema" and pl_module.ema_images is None:
                continue
            for part, values in self._measure(trainer, pl_module, name).items():
                summary = mean_and_std(values)
                where = {"iteration": trainer.global_step, "images": name, "part": PARTS_ON_FILE[part]}
                self.history.append({**where, **summary})
                pl_module.scores[f"{name} images, {PARTS[part]}"] = summary
                pl_module.log(f"evaluation/{name}_{part}_accuracy_mean", summary["mean"], prog_bar=part == "val")
                pl_module.log(f"evaluation/{name}_{part}_accuracy_std", summary["std"])
                if part == "val":
                    chosen[name] = float(summary["mean"])
        if trainer.is_global_zero:
            with replacing(run_folder(trainer) / "evaluations.json") as file:
                file.write_text(json.dumps(self.history, indent=2) + "\n")
        if chosen and max(chosen.values()) > self.best_accuracy:
            self.best_accuracy = max(chosen.values())
            if self.keep_best and trainer.is_global_zero:
                best = pl_module.synthetic_set()
                best.metadata["chosen_on"] = {"held_out_accuracy": chosen, "iteration": trainer.global_step}
                best.save(run_folder(trainer) / "best.safetensors")

    def _measure(self, trainer: Trainer, module: Distillation, name: str) -> dict[str, torch.Tensor]:
        datamodule, device = trainer.datamodule, module.device  # type: ignore[attr-defined]
        keys = (self.seed, "evaluation", trainer.global_step, name)
        own = own_share(self.networks, rank=trainer.global_rank, world_size=trainer.world_size)
        networks = [module.fresh.build(*keys, index).to(device) for index in own]
        self._losses = self._losses or SideBySide(self.compile, device)  # one for all, which compiles once
        train_fresh_networks(
            networks,
            (module.images if name == "raw" else module.ema_images).detach().clone(),  # type: ignore[union-attr]
            module.labels,
            epochs=self.epochs,
            lr=float(module.step_size.detach()) if self.lr is None else self.lr,
            seed=derive_seed(*keys),
            strategy=module.hparams["augment"],
            mode=module.hparams["augment_mode"],
            align_corners=module.hparams.get("align_corners", True),
            progress=f"evaluation of {name} images" if trainer.is_global_zero else None,
            indices=own,
            losses=self._losses,
        )
        parts: dict[str, Images] = {"val": datamodule.val, "test": datamodule.test}
        return {
            part: torch.tensor(from_all_ranks(accuracies(networks, *(t.to(device) for t in images)), self.networks))
            for part, images in parts.items()
            if len(images.labels)
        }

    def state_dict(self) -> dict[str, Any]:
        """Keep what was measured, and the best of it."""
        return {"best_accuracy": self.best_accuracy, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best_accuracy = state_dict["best_accuracy"]
        self.history = list(state_dict.get("history", []))
