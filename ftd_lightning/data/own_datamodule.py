"""Images that another LightningDataModule's loaders return, read into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from tqdm.auto import tqdm

from ftd_lightning.data.own_images import READ_TWICE, as_batch, classes_of, describe_images, joined, warn_of_random
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lightning.pytorch import LightningDataModule, Trainer

    from ftd_lightning.contracts import ImageTransform
    from ftd_lightning.data.images import ImageDataset, Pictures
    from ftd_lightning.data.own_images import Batch


@dataclass(frozen=True)
class OwnDataModule:
    """Another LightningDataModule, whose images are to be read.

    Attributes:
        datamodule: its loaders yield (images, labels).
        class_names: K names; None: those of its training dataset's ``classes``, or numbers.
        transform: what its images have gone through; None: they are pictures.
    """

    datamodule: LightningDataModule
    class_names: Sequence[str] | None = None
    transform: ImageTransform | None = None

    def prepare(self) -> None:
        """Call its ``prepare_data``."""
        self.datamodule.prepare_data()

    def read(self, trainer: Trainer | None) -> tuple[ImageDataset, int]:
        """Set it up and read all its images; also return its batch size.

        Raises:
            InputError: where it has no training or test loader, and for what :func:`as_batch` and
                :func:`describe_images` refuse.
        """
        self.datamodule.trainer = trainer
        for stage in ("fit", "test"):
            self.datamodule.setup(stage)
        loaders = {part: self._loader(part) for part in ("train", "val", "test")}
        for part in ("train", "test"):
            if loaders[part] is None:
                raise InputError(f"{type(self.datamodule).__name__} has no {part}_dataloader, which is needed")
        (train, batch_size), (test, _) = (self._read(loaders[part], part) for part in ("train", "test"))
        val = None if loaders["val"] is None else self._read(loaders["val"], "val")[0]
        names = self.class_names or classes_of(getattr(loaders["train"], "dataset", None), train.labels)
        return describe_images(train, test, val, class_names=names, transform=self.transform), batch_size

    def _loader(self, part: str) -> Any:
        if not is_overridden(f"{part}_dataloader", self.datamodule):
            return None
        found = getattr(self.datamodule, f"{part}_dataloader")()
        loaders = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else [found]
        if len(loaders) > 1:
            raise InputError(
                f"{type(self.datamodule).__name__}.{part}_dataloader returns {len(loaders)} loaders, not one"
            )
        return loaders[0] if loaders else None

    def _read(self, loader: Any, part: str) -> tuple[Pictures, int]:
        ordered = _in_order(loader, part)
        if ordered is not None:
            some = range(min(READ_TWICE, len(ordered.dataset)))  # type: ignore[arg-type]
            first, again = (_as_batches([ordered.collate_fn([ordered.dataset[i] for i in some])], part) for _ in "12")
            warn_of_random(first, again, part)
        bar = tqdm(ordered or loader, desc=f"reading {part} images", unit="batch", leave=False, delay=1)
        batches = list(_as_batches(bar, part))
        size = getattr(loader, "batch_size", None) or (len(batches[0][1]) if batches else 1)
        return joined(batches, part, transform=self.transform), size


def _as_batches(batches: Iterable[Any], part: str) -> Iterator[Batch]:
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"{part}: batches must be pairs (images, labels), not {type(batch).__name__}")
        yield as_batch(batch[0], batch[1], part)


def _in_order(loader: Any, part: str) -> DataLoader[Any] | None:
    """Return a loader of the same images in the dataset's order, each once; None without a map-style dataset."""
    # Without a batch_sampler the dataset's items are batches.
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return None
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    order: Sequence[int] = range(len(loader.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, SubsetRandomSampler):
        order = sorted(sampler.indices)
    elif not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        rank_zero_info(
            f"{part}: all {len(order):,} images of the dataset are read once; the order and weights of its "
            f"{type(sampler).__name__} are not used"
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 256,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # the global one is left alone
    )
