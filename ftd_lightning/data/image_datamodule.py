"""The images of one data set: what every question about them is answered from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from lightning.pytorch import LightningDataModule

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.data.cache_folder import CacheFolder
from ftd_lightning.data.datasets import OWN_IMAGES, get_dataset
from ftd_lightning.data.images import ImageDataset, Request
from ftd_lightning.data.own_datamodule import OwnDataModule
from ftd_lightning.data.real_images import RealImages
from ftd_lightning.data.transform import Standardization
from ftd_lightning.data.whitening_cache import cached_whitening

if TYPE_CHECKING:
    from ftd_lightning.contracts import Images, ImageTransform, Part


class ImageDataModule(LightningDataModule):
    """The part of :class:`~ftd_lightning.data.datamodule.DistillationDataModule` that knows the real images.

    It finds, describes, reads and splits them, and transforms each part when it is first asked for. What to read is in
    the hyper-parameters that the constructor of the subclass saves.

    Args:
        root: folder of the data set's files.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__()
        self.root: Path | None = Path(root)
        self._own: OwnDataModule | None = None
        self._real: RealImages | None = None
        self._transform: ImageTransform | None = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *arguments: Any, weights_only: bool = True, **options: Any
    ) -> Self:
        """Make the datamodule of a fit again, as Lightning does, but import nothing that the file names."""
        options |= {"weights_only": weights_only, "_instantiator": None}
        return super().load_from_checkpoint(checkpoint_path, *arguments, **options)

    def take(self, images: ImageDataset | OwnDataModule) -> None:
        """Read a data set that is given as an object instead of the one that is named."""
        self.hparams["dataset"], self.root = OWN_IMAGES, None
        if isinstance(images, OwnDataModule):
            self._own = images
        else:
            self.spec = images

    @cached_property
    def spec(self) -> ImageDataset:
        """The description of the data set; see the class."""
        hparams = self.hparams
        if self._own is not None:
            spec, hparams["batch_size"] = self._own.read(self.trainer)
            return spec
        request = Request(
            cast("Path", self.root),
            hparams["download"],
            hparams["image_size"],
            hparams["test_fraction"],
            self._cache.cache_dir,
        )
        return get_dataset(hparams["dataset"], request)

    @property
    def _cache(self) -> CacheFolder:
        folder = self.hparams["cache_dir"]
        return CacheFolder(self.root, Path(folder) if folder else None, makes_root=self.hparams["download"])

    @property
    def transform(self) -> ImageTransform:
        """The image transform; before ``setup``, that of images which are not whitened."""
        return self._transform or self.spec.transform or Standardization(self.spec.mean, self.spec.std)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.spec.class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.spec.in_channels

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.spec.image_size

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return list(self.spec.class_names)

    @cached_property
    def _dataset(self) -> dict[str, Any]:
        keys = ("val_fraction", "max_per_class", "seed")
        return {"name": self.hparams["dataset"], **{key: self.hparams[key] for key in keys}, **self.spec.describe()}

    def description(self) -> DataDescription:
        """Describe the training images; see ``contracts.DataSource``."""
        shape = ImageShape(self.in_channels, self.num_classes, self.image_size)
        dataset = dict(self._dataset)
        return DataDescription(shape, self.class_names, self.transform, dataset, self.hparams["batch_size"])

    def describe(self) -> dict[str, Any]:
        """Name the training images and their transform; equal descriptions mean equal images."""
        return self.description().metadata()

    def part(self, name: Part) -> Images:
        """Return the images of a part, transformed at first use: "train", "val" (possibly none) or "test"."""
        self.setup("fit")
        return self._part(name)

    @property
    def train(self) -> Images:
        """The training images that are not held out."""
        return self.part("train")

    @property
    def val(self) -> Images:
        """The held-out images."""
        return self.part("val")

    @property
    def test(self) -> Images:
        """The test images."""
        return self.part("test")

    def _read(self) -> RealImages:
        if self._real is None:
            options = {key: self.hparams[key] for key in ("val_fraction", "max_per_class", "seed")}
            self._real = RealImages(self.spec, **options)
        return self._real

    def _fit_whitening(self) -> None:
        if self._transform is None:
            name, eps = self.hparams["dataset"], self.hparams["zca_eps"]
            self._transform = cached_whitening(self._read().pictures("train"), name, eps=eps, cache=self._cache)

    def _part(self, name: Part) -> Images:
        return self._read().images(name, self.transform)
