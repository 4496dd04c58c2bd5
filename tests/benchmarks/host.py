"""What the host does in a teacher's step, beside an empty step of manual optimization: no arithmetic worth the name."""

from __future__ import annotations

import tempfile
import time
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ftd_lightning import DistillationDataModule, FlatTeacher
from ftd_lightning.functional.augment import STRATEGY
from ftd_lightning.models import ConvNet

SMALL = {"width": 4, "depth": 1}
BATCH, SIZE = 8, 8
PATHS = {"without DSA": "", "with DSA": STRATEGY}


class TwoPasses(LightningModule):
    """Takes two passes and a step of SGD, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = ConvNet(3, 10, SIZE, **SMALL)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.01)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.step()


class LastEpoch(Callback):
    """Measures CPU seconds from the first step of an epoch to the end of its last."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, *_) -> None:
        self.seconds = time.process_time() - self.began


def seconds_of(module: LightningModule, data: DistillationDataModule) -> float:
    """Fit for two epochs, and give the CPU seconds of the second."""
    clock = LastEpoch()
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_epochs": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, **silent}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=[clock], default_root_dir=folder, **options)
        trainer.fit(module, datamodule=data)
    return clock.seconds


def host_pairs(steps: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Measure pairs of an empty epoch and a teacher's, of so many steps each, for every path, in turns."""
    images, labels = torch.rand(BATCH * steps, 3, SIZE, SIZE), torch.arange(BATCH * steps) % 10
    parts = TensorDataset(images, labels), TensorDataset(images[:10], labels[:10])
    data = DistillationDataModule.from_datasets(*parts, batch_size=BATCH, val_fraction=0.0)
    found: dict[str, list[tuple[float, float]]] = {path: [] for path in PATHS}
    for _ in range(repeats):
        for path, augment in PATHS.items():
            teacher = FlatTeacher(network_options=SMALL, teachers=1, epochs=2, augment=augment, compile=False)
            found[path].append((seconds_of(TwoPasses(), data), seconds_of(teacher, data)))
    return found
