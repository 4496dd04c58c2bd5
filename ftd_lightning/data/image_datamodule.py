"""The images of one data set: what every question about them is answered from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from lightning.pytorch import LightningDataModule

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.data.datasets import OWN_IMAGES, get_dataset
from ftd_lightning.data.folder import folder_labels, take_folder_census
from ftd_lightning.data.images import ImageDataset, Request
from ftd_lightning.data.own_datamodule import OwnDataModule
from ftd_lightning.data.real_images import RealImages, choose
from ftd_lightning.data.transform import Standardization
from ftd_lightning.data.whitening_cache import cached_whitening

if TYPE_CHECKING:
    from torch import Tensor

    from ftd_lightning.contracts import Images, ImageTransform, Part
    from ftd_lightning.data.census import Census


class ImageDataModule(LightningDataModule):
    """The part of :class:`~ftd_lightning.data.datamodule.DistillationDataModule` that knows the real images.

    It finds, describes, reads and splits them, and transforms each part when it is first asked for. What to read is in
    the hyper-parameters that the constructor of the subclass saves.

    Args:
        root: folder of the data set's files.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__()
        self.root: Path | None = Path(root).expanduser()
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
        return get_dataset(hparams["dataset"], self._request)

    @property
    def _request(self) -> Request:
        keys = ("download", "image_size", "test_fraction", "cache_dir")
        return Request(cast("Path", self.root), **{key: self.hparams[key] for key in keys})

    @cached_property
    def census(self) -> Census | None:
        """Counts over the files of a "folder", by their headers, without decoding; None for other data sets."""
        if "spec" in self.__dict__:
            return self.spec.census
        return take_folder_census(self._request) if self.hparams["dataset"] == "folder" else None

    @cached_property
    def _folder_labels(self) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        return folder_labels(self._request)

    def count(self, name: Part) -> list[int]:
        """Count the images of each class in a part, in label order; those of a "folder" are not decoded for it."""
        if self._real is None and self.hparams["dataset"] == "folder":
            names, labels = self._folder_labels
            source, index = choose(labels, **self._split_options)[name]
            return labels[source][index].bincount(minlength=len(names)).tolist()
        return self._read().labels(name).bincount(minlength=self.num_classes).tolist()

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
        return {"name": self.hparams["dataset"], **self._split_options, **self.spec.describe()}

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
            self._real = RealImages(self.spec, **self._split_options)
        return self._real

    @property
    def _split_options(self) -> dict[str, Any]:
        return {key: self.hparams[key] for key in ("val_fraction", "max_per_class", "seed")}

    def _fit_whitening(self) -> None:
        if self._transform is None:
            name, eps = self.hparams["dataset"], self.hparams["zca_eps"]
            self._transform = cached_whitening(
                self._read().pictures("train"), name, eps=eps, cache_dir=self.hparams["cache_dir"]
            )

    def _part(self, name: Part) -> Images:
        return self._read().images(name, self.transform)
