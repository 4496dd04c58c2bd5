"""Measures the synthetic set while it is learned, and tells when a callback's work is due."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import LearnsSet, data_source
from ftd_lightning.core.evaluation import EvaluationProtocol, PartsOnDevice, mean_and_std, train_fresh_networks
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.core.module import run_folder
from ftd_lightning.core.ranks import ranks_share
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import write_json
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.seeding import derive_seed, network_to_device, to_device

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from ftd_lightning.contracts import Part, TrainingSet


def is_last_epoch(trainer: Trainer) -> bool:
    """Tell, in ``on_train_epoch_end``, whether the fit ends with this epoch."""
    steps_done = 0 <= trainer.max_steps <= trainer.global_step
    return trainer.should_stop or steps_done or trainer.current_epoch + 1 == trainer.max_epochs


def is_due(trainer: Trainer, every_n_epochs: int | None, *, times: int) -> bool:
    """Tell, in ``on_train_epoch_end``, whether regular work is due, whatever happens at the end of the fit.

    It is due every n epochs, never for 0, and ``times`` times in the whole fit for None.
    """
    if every_n_epochs is None:
        per_epoch, epochs = int(trainer.num_training_batches), trainer.max_epochs
        limits = [epochs] if epochs is not None and epochs > 0 else []
        limits += [-(-trainer.max_steps // per_epoch)] if trainer.max_steps > 0 else []
        every_n_epochs = -(-min(limits) // times) if limits else 10
    return every_n_epochs > 0 and (trainer.current_epoch + 1) % every_n_epochs == 0


# Part of a data source: its name in the scores of a set's metadata, and its name in evaluations.json.
PARTS: dict[Part, tuple[str, str]] = {"val": ("held-out training images", "held_out"), "test": ("test images", "test")}


class EvaluateSynthetic(Callback):
    """Trains fresh networks on the raw and on the averaged images every few epochs and logs their accuracy.

    Every measurement trains new networks: no network sees both raw and averaged images. Accuracy on held-out training
    images ("val") chooses the best set; accuracy on test images is logged only. Both are recorded in a set of that
    iteration (``metadata["scores"]``), and all measurements of a run in ``evaluations.json`` beside the logs. Under DDP
    each of W ranks trains every W-th network, with the results of one process. Modules that learn no set are left
    alone.

    Args:
        every_n_epochs: how often, in Lightning epochs of ``iterations_per_epoch``; also after the last one. A final
            measurement that is not due is recorded but chooses no set, because a resumed run would not repeat it.
            None: four times in a fit; 0: never.
        networks: fresh networks per measurement.
        epochs: of each over the synthetic set.
        keep_best: write the set whose mean val accuracy is the highest so far to ``best.safetensors`` beside the logs.
        seed: decides initialisation, batches and augmentation, with the iteration.
        lr: learning rate; None takes the current step size.
        compile: torch.compile for forward and backward passes: True, False, or "auto": on a GPU only.

    Attributes:
        history: the contents of ``evaluations.json``: measurements, each ``{"iteration": int, "images": "raw" | "ema",
            "part": "held_out" | "test", "mean": float, "std": float, "n": int}``.
        best_accuracy: mean val accuracy of the best set, in [0, 1]; -1 before the first.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        networks: int = 2,
        epochs: int = 500,
        keep_best: bool = True,
        seed: int = 0,
        lr: float | None = None,
        compile: Compile = "auto",  # noqa: A002
    ) -> None:
        check_bounds(EvaluateSynthetic, locals())
        self.every_n_epochs, self.networks, self.epochs = every_n_epochs, networks, epochs
        self.keep_best, self.seed, self.lr, self.compile = keep_best, seed, lr, compile
        compiles(compile, torch.device("cpu"))  # refuses an unknown setting
        self.best_accuracy = -1.0
        self.history: list[dict[str, Any]] = []
        self._regular: list[dict[str, Any]] = []  # history without the final measurement that was not due
        self._losses: IndependentLosses | None = None
        self._real: PartsOnDevice | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; the checkpoint of this one is loaded later."""
        if stage == "fit":
            self.best_accuracy, self.history, self._regular = -1.0, [], []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse fits that cannot be measured before anything is learned."""
        if not isinstance(pl_module, LearnsSet) or self.every_n_epochs == 0:
            return
        source = data_source(trainer.datamodule)  # type: ignore[attr-defined]
        if source is None:
            raise InputError(
                "EvaluateSynthetic needs real images to measure on: fit with a DistillationDataModule (from_datasets "
                "and from_datamodule make one of yours)"
            )
        source.part("test")  # refuses data without test images
        self._real = PartsOnDevice(source, trainer.strategy.root_device)
        pl_module.evaluation_network(self.seed)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the memory of the real images back."""
        self._real = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where it is due."""
        if not isinstance(pl_module, LearnsSet) or self.every_n_epochs == 0:
            return
        complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        iteration = pl_module.iterations
        regular = complete and is_due(trainer, self.every_n_epochs, times=4)
        if not regular and not is_last_epoch(trainer):
            return
        # A run that resumes from a checkpoint of this very iteration measures it again.
        self._regular = [entry for entry in self._regular if entry["iteration"] < iteration]
        self.history = list(self._regular)
        chosen, scores, synthetic = {}, {}, pl_module.synthetic_set()
        for name, images in pl_module.learned_images().items():
            for part, values in self._measure(trainer, pl_module, synthetic, name, images).items():
                summary = mean_and_std(values)
                in_words, on_file = PARTS[part]
                self.history.append({"iteration": iteration, "images": name, "part": on_file, **summary})
                scores[f"{name} images, {in_words}"] = summary
                log = partial(pl_module.log, sync_dist=True)  # equal on all ranks, but Lightning would warn
                log(f"evaluation/{name}_{part}_accuracy_mean", summary["mean"], prog_bar=part == "val")
                log(f"evaluation/{name}_{part}_accuracy_std", summary["std"])
                if part == "val":
                    chosen[name] = float(summary["mean"])
        pl_module.record_scores(scores)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_json(run_folder(trainer) / "evaluations.json", self.history)
        if regular:
            self._regular = list(self.history)
            self._keep_best(trainer, pl_module, chosen, iteration)

    def _keep_best(self, trainer: Trainer, module: LearnsSet, chosen: dict[str, float], iteration: int) -> None:
        if not chosen or max(chosen.values()) <= self.best_accuracy:
            return
        self.best_accuracy = max(chosen.values())
        if self.keep_best and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            best = module.synthetic_set()
            best.metadata["chosen_on"] = {"held_out_accuracy": chosen, "iteration": iteration}
            best.save(run_folder(trainer) / "best.safetensors")

    def _measure(
        self, trainer: Trainer, module: LearnsSet, synthetic: TrainingSet, name: str, images: torch.Tensor
    ) -> dict[Part, torch.Tensor]:
        device = trainer.strategy.root_device
        assert self._real is not None
        if self.lr is None and synthetic.step_size is None:
            raise InputError("EvaluateSynthetic: this method learns no step size: give lr")
        lr = float(synthetic.step_size.mean()) if self.lr is None else self.lr  # type: ignore[union-attr]
        keys = (self.seed, "evaluation", module.iterations, name)
        own = ranks_share(self.networks, rank=trainer.global_rank, world_size=trainer.world_size)
        networks = [network_to_device(module.evaluation_network(*keys, index), device, images.dtype) for index in own]
        if self._losses is None:  # one for all measurements, which compiles once
            self._losses = IndependentLosses(self.compile, device)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        train_fresh_networks(
            networks,
            images.detach().clone(),
            to_device(synthetic.training_labels(), device),
            EvaluationProtocol(epochs=self.epochs, lr=lr, augment=module.augment),
            seed=derive_seed(*keys),
            progress=f"evaluation of {name} images" if shown else None,
            indices=own,
            losses=self._losses,
        )
        return self._real.accuracies(networks, self.networks)

    def state_dict(self) -> dict[str, Any]:
        """Keep the measurements and the best accuracy."""
        return {"best_accuracy": self.best_accuracy, "history": self._regular}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the list of measurements."""
        self.best_accuracy = state_dict["best_accuracy"]
        self._regular = list(state_dict["history"])
        self.history = list(self._regular)
