"""Teachers: epochs of GSAM through Lightning's Trainer, beside the plain loop.

Both train the same network on the same noise of CIFAR's size (what the pixels show changes no time) in batches of 256,
float32, DSA, mean loss and accuracy kept, nothing recorded and nothing validated. Ours is the whole of an epoch of the
fit, with what Lightning does between one and the next. The epochs take turns within one fit: a callback runs an epoch
of the plain loop before each of ours. The first of each, in which a compiler compiles, is not counted. Eager and
compiled epochs are those of two fits.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.measure import DEVICE, Result, Row, now, timed
from benchmarks.reference import gsam_epoch, sample_loader
from ftd_lightning import DistillationDataModule, FlatTeacher
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.sources import ImageDataset, Pictures
from ftd_lightning.functional import dsa, make_generator
from ftd_lightning.functional.compiling import Compile
from ftd_lightning.models import ConvNet

LR, RHO, ALPHA, BATCH = 0.01, 0.01, 1.0, 256
# A teacher of full length, for which "auto" decides: CIFAR-10's.
EPOCHS, IMAGES = 50, 50_000
SIZES: dict[str, list[dict[str, int]]] = {
    "quick": [{"images": 512, "width": 16}],
    "cpu": [{"images": 1024, "width": 32}, {"images": 512, "width": 128}],
    "cuda": [{"images": 50_000, "width": 32}, {"images": 50_000, "width": 128}],
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
        self._began = now()

    def on_train_end(self, trainer, pl_module) -> None:
        self._end()

    def _end(self) -> None:
        if self._began is not None:
            timed(lambda: None)  # waits for the device
            self.ours.append(now() - self._began)


def fit(
    data: ImageDataset,
    callback: Callback,
    *,
    epochs: int,
    compile: Compile = "auto",  # noqa: A002
    teachers: int = 1,
    ranks: int = 1,
    **network,
) -> tuple[FlatTeacher, DistillationDataModule]:
    """Train teachers on a data set through the Trainer."""
    settings = {"teachers": teachers, "epochs": epochs, "lr": LR, "rho": RHO, "alpha": ALPHA, "compile": compile}
    DATASETS["noise"] = lambda request: data
    try:
        module = FlatTeacher(network_options=network, **settings)
        images = DistillationDataModule("noise", batch_size=BATCH, val_fraction=0.0)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            trainer = Trainer(
                accelerator=DEVICE,
                devices=ranks,
                strategy="ddp" if ranks > 1 else "auto",
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


def compare(repeats: int, *, images: int, compiled: bool, image_size: int = 32, **network: int) -> Result:
    """Time epochs of a teacher in turns, eager ones and, in a second fit, compiled ones."""
    data = noise(images, image_size=image_size)
    train, _ = data.load()
    loader = sample_loader((train.pictures - 0.5) / 0.3, train.labels, batch_size=BATCH)
    case = f"{images} images of {image_size} px, width {network.get('width', 128)}"
    result = Result([])
    for compiles in [False, True][: 1 + compiled]:
        plain = ConvNet(3, 10, image_size, **network).to(DEVICE)
        turns = InTurns(plain_teacher(plain, lambda epoch: loader))
        fit(data, turns, epochs=repeats + 1, compile=compiles, **network)
        ours, theirs, path = turns.ours[1:], turns.reference[1:], ", compiled" if compiles else ""
        result.rows += [
            Row("teacher", case, f"time of an epoch{path}", "s", ours, theirs),
            Row(
                "teacher",
                case,
                f"images/s{path}",
                "1/s",
                *([images / s for s in side] for side in (ours, theirs)),
                True,
            ),
        ]
    return result


def run(scale: str, repeats: int, *, compiled: bool = False) -> Result:
    """Measure at a scale."""
    torch.set_float32_matmul_precision("high")  # what `ftd fit` sets; for both sides
    result = Result([], ["teacher: noise of CIFAR's size, GSAM, float32; neither side records or validates"])
    for size in SIZES["quick" if scale == "quick" else DEVICE]:
        result.add(compare(repeats, compiled=compiled, **size))
    return result
