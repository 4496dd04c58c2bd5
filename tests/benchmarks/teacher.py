"""Teachers: epochs of GSAM through Lightning's Trainer, beside the plain loop.

Both train the same network on the same noise of CIFAR's size (what the pixels show changes no time) in batches of 256,
float32, DSA, mean loss and accuracy kept, nothing recorded and nothing validated. Ours is the whole of an epoch of the
fit, with what Lightning does between one and the next. The epochs take turns within one fit: a callback runs an epoch
of the plain loop before each of ours. The first of each is not counted.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.measure import DEVICE, Result, Row, timed
from benchmarks.reference import gsam_epoch, sample_loader
from ftd_lightning import DistillationDataModule, FlatTeacher
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.images import ImageDataset, Pictures
from ftd_lightning.functional import dsa, make_generator
from ftd_lightning.models import ConvNet

LR, RHO, ALPHA, BATCH = 0.01, 0.01, 1.0, 256
SIZES = {
    "quick": {"images": 512, "width": 16},
    "cpu": {"images": 2048, "width": 128},
    "cuda": {"images": 50_000, "width": 128},
}


def noise(images: int, *, image_size: int = 32) -> ImageDataset:
    """A data set of random pictures in [0, 1] in 10 classes, equally many of each."""

    def load() -> tuple[Pictures, Pictures]:
        pictures = torch.rand(images, 3, image_size, image_size, generator=make_generator("noise"))
        train = Pictures(pictures, torch.arange(images) % 10)
        return train, train.take(torch.arange(10))

    names = tuple("abcdefghij")
    return ImageDataset(names, 3, image_size, (0.5,) * 3, (0.3,) * 3, load)


def augmentation(epoch: int) -> Callable[[Tensor, int], Tensor]:
    """DSA as FlatTeacher draws it in an epoch, with seed 0."""
    return lambda images, step: dsa(images, make_generator(0, "dsa", epoch, step, 0))


class InTurns(Callback):
    """Runs and times an epoch of the reference before each of ours."""

    def __init__(self, reference: Callable[[int], object]) -> None:
        self.run_reference = reference
        self.ours: list[float] = []
        self.reference: list[float] = []
        self._began: float | None = None

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._end()
        self.reference.append(timed(partial(self.run_reference, trainer.current_epoch)))
        self._began = time.perf_counter()

    def on_train_end(self, trainer, pl_module) -> None:
        self._end()

    def _end(self) -> None:
        if self._began is not None:
            timed(lambda: None)  # waits for the device
            self.ours.append(time.perf_counter() - self._began)


def fit(
    data: ImageDataset, callback: Callback, *, epochs: int, **network
) -> tuple[FlatTeacher, DistillationDataModule]:
    """Train one teacher on a data set through the Trainer."""
    DATASETS["noise"] = lambda request: data
    try:
        module = FlatTeacher(network_options=network, teachers=1, epochs=epochs, lr=LR, rho=RHO, alpha=ALPHA)
        images = DistillationDataModule("noise", batch_size=BATCH, val_fraction=0.0)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            trainer = Trainer(
                accelerator=DEVICE,
                devices=1,
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                default_root_dir=folder,
                callbacks=[callback],
            )
            trainer.fit(module, datamodule=images)
    finally:
        del DATASETS["noise"]
    return module, images


def plain_teacher(
    network: torch.nn.Module, epoch_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
) -> Callable[[int], object]:
    """Give a function that trains the network for one epoch of the plain loop."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    return lambda epoch: gsam_epoch(
        network, epoch_batches(epoch), optimizer, rho=RHO, alpha=ALPHA, augment=augmentation(epoch)
    )


def compare(repeats: int, *, images: int, image_size: int = 32, **network: int) -> Result:
    """Time epochs of a teacher in turns."""
    data = noise(images, image_size=image_size)
    train, _ = data.load()
    loader = sample_loader((train.pictures - 0.5) / 0.3, train.labels, batch_size=BATCH)
    plain = ConvNet(3, 10, image_size, **network).to(DEVICE)
    turns = InTurns(plain_teacher(plain, lambda epoch: loader))
    fit(data, turns, epochs=repeats + 1, **network)
    case = f"{images} images of {image_size} px, width {network.get('width', 128)}"
    ours, theirs = turns.ours[1:], turns.reference[1:]
    rows = [
        Row("teacher", case, "time of an epoch", "s", ours, theirs),
        Row("teacher", case, "images/s", "1/s", [images / s for s in ours], [images / s for s in theirs], True),
    ]
    return Result(rows, ["teacher: noise of CIFAR's size, GSAM, float32; neither side records or validates"])


def run(scale: str, repeats: int, **_: object) -> Result:
    """Measure at a scale."""
    size = SIZES["quick" if scale == "quick" else DEVICE]
    torch.set_float32_matmul_precision("high")  # what `ftd fit` sets; for both sides
    return compare(repeats, **size)
