"""The one DataModule: real images for teachers, their held-out and test parts, and synthetic sets for evaluation."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from tqdm.auto import tqdm

from ftd_lightning.data.coresets import BASELINES, random_real_images, teacher_coreset
from ftd_lightning.data.datasets import check_name, get_dataset
from ftd_lightning.data.files import fingerprint
from ftd_lightning.data.images import ImageDataset, Images, Request, sample_per_class, unit_range
from ftd_lightning.data.loader import BatchOrder, TensorLoader, fits_on, host_loader
from ftd_lightning.data.progress import estimated_bar
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.data.transform import ImageTransform, Standardization, Whitening
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

CHUNK = 5000  # images transformed at a time: bounds the memory of whitening


class DistillationDataModule(LightningDataModule):
    """Images of one data set, transformed and held as tensors on the training device.

    What it trains on depends on who asks: a module with an ``iteration_loader`` (a distillation) gets its
    segments; with ``synthetic`` given, its images; else the real training images.

    Args:
        dataset: a name of the table in ``ftd_lightning.data.datasets``.
        root: folder of the images or of their downloads, of cached whitenings and of caches of decoded images.
        batch_size: images a batch, on each rank.
        val_fraction: share of every class's *training* images held out, so that an iterate can be chosen without the
            test set. 0 trains on all, as the paper does.
        zca: whiten instead of standardising; fitted on the training images that are not held out.
        zca_eps: added to the eigenvalues.
        max_per_class: keep at most so many images of each class, in training and in test; None keeps all.
        synthetic: train on a synthetic set: its file, "real" (all real images), or ipc real images of each class:
            "random", or chosen by a teacher's features, "herding" and "k-center" (greedy). A file brings its own
            transform, which the test images then go through.
        ema: use the averaged images of the file.
        ipc: images per class of "random", "herding" and "k-center".
        download: fetch what is missing.
        on_device: "auto" puts images on the GPU where they take at most half of its free memory; "no" reads them from
            host memory through a DataLoader; "yes" insists.
        num_workers: of that DataLoader.
        seed: decides the held-out images, the random ones, and the order of batches.
        image_size: height and width in pixels that the images are resized to; None: the data set's own.
        test_fraction: share of every class that becomes the test part, in (0, 1), for a "folder" without ``val/``; the
            same images for every seed.
        trajectories: store of the teachers whose features "herding" and "k-center" take.
        teacher: which of them.

    Attributes:
        train, val, test: ``Images`` (float32, transformed), after ``setup``.
        spec: the description of the data set. That of "tiny-imagenet" and "folder" is found in their files, at its
            first use: it and what follows from it (``num_classes``, ``in_channels``, ``image_size``, ``class_names``)
            are asked for after ``prepare_data``, or do its downloading and decoding.
        synthetic_set: what ``synthetic`` named, after ``setup``, or None.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str = "data",
        batch_size: int = 256,
        val_fraction: float = 0.1,
        zca: bool = False,
        zca_eps: float = 0.1,
        max_per_class: int | None = None,
        synthetic: str | None = None,
        ema: bool = False,
        ipc: int = 1,
        download: bool = True,
        on_device: Literal["auto", "yes", "no"] = "auto",
        num_workers: int = 0,
        seed: int = 0,
        image_size: int | None = None,
        test_fraction: float = 0.2,
        trajectories: str | None = None,
        teacher: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction={val_fraction} must lie in [0, 1)")
        if not 0 < test_fraction < 1:
            raise InputError(f"test_fraction={test_fraction} must lie between 0 and 1")
        numbers = {"batch_size": batch_size, "ipc": ipc, "max_per_class": max_per_class, "image_size": image_size}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        check_name(dataset)
        # Not to the logger: Lightning refuses names that module and datamodule share with different values.
        self.save_hyperparameters(logger=False)
        self.root = Path(root)
        self._transform: ImageTransform | None = None
        self.synthetic_set: SyntheticSet | None = None
        self._ready = False

    @cached_property
    def spec(self) -> ImageDataset:
        """The description of the data set; see the class."""
        hparams = self.hparams
        request = Request(self.root, hparams["download"], hparams["image_size"], hparams["test_fraction"])
        return get_dataset(hparams["dataset"], request)

    @property
    def transform(self) -> ImageTransform:
        """The image transform; before ``setup``, that of images which are not whitened."""
        return self._transform or Standardization(self.spec.mean, self.spec.std)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.spec.class_names)

    @property
    def in_channels(self) -> int:
        """C."""
        return self.spec.in_channels

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.spec.image_size

    @property
    def class_names(self) -> list[str]:
        """K names, in label order."""
        return list(self.spec.class_names)

    def describe(self) -> dict[str, Any]:
        """Name the training images and their transform; equal descriptions mean equal images."""
        keys = ("val_fraction", "max_per_class", "seed")
        dataset = {"name": self.hparams["dataset"], **{key: self.hparams[key] for key in keys}, **self.spec.describe()}
        return {"dataset": dataset, "transform": self.transform.describe()}

    def prepare_data(self) -> None:
        """Download or decode the data set and fit the whitening, once a node; all are cached under ``root``."""
        train, _ = self.spec.load(self.root, self.hparams["download"])
        if self.hparams["zca"] and not self._set_file():
            self._whitening(self._split(train)[0])

    def setup(self, stage: str | None = None) -> None:
        """Read, split and transform the images."""
        if self._ready:
            return
        file = self._set_file()
        loaded = SyntheticSet.load(file) if file else None
        # All there is was fetched by prepare_data; download=True only says where to look.
        train, test = self.spec.load(self.root, self.hparams["download"])
        train, val = self._split(train)
        if loaded is not None:
            self._check_fits(loaded, Path(str(file)))
            self._transform = loaded.transform
        elif self.hparams["zca"]:
            self._transform = self._whitening(train)
        self.train, self.val, self.test = (
            Images(self._transformed(part.pictures, name), part.labels)
            for name, part in (("training", train), ("held-out", val), ("test", self._limited(test)))
        )
        self.synthetic_set = loaded or self._baseline()
        if self.trainer is not None and (self._wants_segments() or not len(self.val.labels)):
            self.trainer.limit_val_batches = 0  # Lightning warns of an empty loader, but takes this for an answer
        self._ready = True

    def _set_file(self) -> str | None:
        synthetic: str | None = self.hparams["synthetic"]
        return None if synthetic in BASELINES else synthetic

    def _baseline(self) -> SyntheticSet | None:
        """Real images in the place of synthetic ones."""
        kind, ipc, seed = (self.hparams[key] for key in ("synthetic", "ipc", "seed"))
        if kind is None:
            return None
        metadata = {"method": kind, **self.describe()}
        if kind in ("random", "real"):
            real = random_real_images(self.train, ipc, seed) if kind == "random" else self.train
        else:
            by = {key: self.hparams[key] for key in ("trajectories", "teacher")}
            real, metadata["chosen_by"] = teacher_coreset(self.train, kind, ipc, described=self.describe(), **by)
        return SyntheticSet(*real, class_names=self.class_names, transform=self.transform, metadata=metadata)

    def _check_fits(self, synthetic: SyntheticSet, file: Path) -> None:
        shape, wanted = tuple(synthetic.images.shape[1:]), (self.in_channels, self.image_size, self.image_size)
        if (shape, synthetic.class_names) != (wanted, self.class_names):
            raise InputError(
                f"{file}: holds {shape} images of the classes {', '.join(synthetic.class_names)}, "
                f"{self.hparams['dataset']} has {wanted} images of {', '.join(self.class_names)}; "
                "set data.dataset to the set's own (and data.image_size, where it was resized)"
            )

    def _limited(self, images: Images) -> Images:
        limit = self.hparams["max_per_class"]
        if limit is None:
            return images
        shuffled = torch.randperm(len(images.labels), generator=make_generator(self.hparams["seed"], "limit"))
        kept = [shuffled[images.labels[shuffled] == label][:limit] for label in range(self.num_classes)]
        return images.take(torch.cat(kept).sort().values)

    def _split(self, train: Images) -> tuple[Images, Images]:
        """Cut the training images into those used and those held out, each in the original order."""
        train = self._limited(train)
        generator = make_generator(self.hparams["seed"], "held out")
        held_out = torch.zeros(len(train.labels), dtype=torch.bool)
        held_out[sample_per_class(train.labels, float(self.hparams["val_fraction"]), generator)] = True
        return train.take((~held_out).nonzero().squeeze(1)), train.take(held_out.nonzero().squeeze(1))

    def _whitening(self, train: Images) -> Whitening:
        """Read the whitening from the cache, or fit and cache it. Its name holds all that it depends on."""
        eps, data = self.hparams["zca_eps"], fingerprint(train.pictures)
        path = (
            self.root
            / "whitening"
            / f"zca_{self.hparams['dataset']}_{data}_{eps}_kornia{version('kornia')}.safetensors"
        )
        if path.is_file():
            return Whitening.load(path)
        values = train.pictures[0].numel()
        what = f"whitening: fitting {values} x {values} on {len(train.labels)} images"
        with estimated_bar(what, Whitening.estimate_seconds(values)):
            whitening = Whitening.fit(unit_range(train.pictures), eps=eps, fitted_on=data)
        whitening.save(path)
        return whitening

    def _transformed(self, pictures: Tensor, name: str) -> Tensor:
        chunks = pictures.split(CHUNK)
        bar = tqdm(chunks, desc=f"transforming {name} images", disable=len(chunks) < 3, leave=False)
        return torch.cat([self.transform.apply(unit_range(chunk)) for chunk in bar])

    def _loader(self, images: Images, *, shuffle: bool) -> Iterable[Any]:
        trainer = self.trainer
        module = trainer.lightning_module if trainer is not None else None
        # A module whose processes each train networks of their own wants all images in each, in the orders it names.
        shared = trainer is not None and not getattr(module, "independent_ranks", False)
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None and shared else (0, 1)
        device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
        order = BatchOrder(
            len(images.labels),
            self.hparams["batch_size"],
            shuffle=shuffle,
            seed=self.hparams["seed"],
            rank=rank,
            world_size=world_size,
            epoch_map=getattr(module, "data_epoch", None),
        )
        place = self.hparams["on_device"]
        if place == "no" or (place == "auto" and not fits_on(device, images.pictures)):
            return host_loader(
                images.pictures.cpu(), images.labels.cpu(), order, num_workers=self.hparams["num_workers"]
            )
        return TensorLoader(images.pictures.to(device), images.labels.to(device), order)

    def _wants_segments(self) -> bool:
        return self.trainer is not None and hasattr(self.trainer.lightning_module, "iteration_loader")

    def train_dataloader(self) -> Iterable[Any]:
        """Give teacher segments, synthetic images or real ones; see the class."""
        if self._wants_segments():
            segments: Iterable[Any] = self.trainer.lightning_module.iteration_loader()  # type: ignore[union-attr, operator]
            return segments
        if self.synthetic_set is not None:
            chosen = Images(self.synthetic_set.chosen(ema=self.hparams["ema"]), self.synthetic_set.labels)
            return self._loader(chosen, shuffle=True)
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Iterable[Any]:
        """Give the held-out training images, in order; an empty list where none are held out."""
        return self._loader(self.val, shuffle=False) if len(self.val.labels) else []

    def test_dataloader(self) -> Iterable[Any]:
        """Give the test images, in order."""
        return self._loader(self.test, shuffle=False)
