"""The one DataModule: real images for teachers, their held-out and test parts, and synthetic sets for evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import CombinedLoader

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import (
    BatchPlan,
    BringsBatches,
    Images,
    ImageTransform,
    PlansBatches,
)
from ftd_lightning.data.coresets import BASELINES, random_real_images, teacher_coreset
from ftd_lightning.data.datasets import check_name
from ftd_lightning.data.image_datamodule import ImageDataModule
from ftd_lightning.data.loader import BatchOrder, TensorLoader, fits_on, host_loader
from ftd_lightning.data.own_datamodule import OwnDataModule
from ftd_lightning.data.own_images import read_datasets
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info


class NoLoaders(CombinedLoader):
    """The combination of no loaders, on which Lightning skips validation; of an empty list it warns."""

    def __init__(self) -> None:
        super().__init__([], "sequential")

    @property
    def flattened(self) -> list[Any]:
        """Return no loaders."""
        return []

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        """Ignore Lightning, which sets what it has read."""

    def __len__(self) -> int:
        return 0


class DistillationDataModule(ImageDataModule):
    """Images of one data set, transformed and held as tensors on the training device.

    What it trains on depends on the module that is fitted: one that has its own batches (a distillation) gets those;
    with ``synthetic`` given, others get its images, else the real training images. It is a ``contracts.DataSource``.

    Args:
        dataset: a name of the table in ``ftd_lightning.data.datasets``. Images that are given as objects are for
            :meth:`from_datasets` and :meth:`from_datamodule`.
        root: folder of the images or of their downloads.
        batch_size: images per batch, on each rank.
        val_fraction: share of every class's *training* images held out, so that an iterate can be chosen without the
            test set, 0.9 at most. 0 trains on all, as the paper does. Unused where a "folder" has ``train/``, ``val/``
            and ``test/``: those in ``val/`` are held out.
        zca: whiten instead of standardising; fitted on the training images that are not held out.
        zca_eps: added to the eigenvalues; above 0.
        max_per_class: keep at most so many images of each class, in training and in test; None keeps all.
        synthetic: train on a synthetic set: its file, "real" (all real images), or ipc real images of each class:
            "random", or chosen by a teacher's features, "herding" and "k-center" (greedy). A file contains its own
            transform, which the test images then go through.
        ema: use the averaged images of the file.
        ipc: images per class of "random", "herding" and "k-center".
        download: fetch what is missing.
        on_device: "auto" puts images on the GPU where they take at most half of its free memory; "no" or False reads
            them from host memory through a DataLoader; "yes" or True insists.
        num_workers: of that DataLoader.
        seed: decides the held-out images, the random ones, and the order of batches.
        image_size: height and width in pixels that the images are resized to; None: the data set's own.
        test_fraction: share of every class that becomes the test part, in (0, 0.9], for a "folder" of classes that
            names no test part; the names of the files decide which images.
        trajectories: store of the teachers whose features "herding" and "k-center" use.
        teacher: which of them.
        cache_dir: folder of decoded images and whitenings; None: ``ftd_lightning`` in the user's cache folder.

    Attributes:
        spec: the description of the data set. That of "tiny-imagenet" and "folder" is found in their files, and that of
            another datamodule in its images, at its first use: it and what follows from it (``num_classes``,
            ``in_channels``, ``image_size``, ``class_names``) need ``prepare_data``, or do its downloading and decoding.
        synthetic_set: what ``synthetic`` named, after ``setup``, or None.
        census: counts over the files of a "folder", by their headers; None for other data sets.
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
        on_device: Literal["auto", "yes", "no"] | bool = "auto",
        num_workers: int = 0,
        seed: int = 0,
        image_size: int | None = None,
        test_fraction: float = 0.2,
        trajectories: str | None = None,
        teacher: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        check_bounds(DistillationDataModule, locals())
        super().__init__(root)
        check_name(dataset)
        # Not to the logger: Lightning refuses names that module and datamodule share with different values.
        self.save_hyperparameters(logger=False)
        self.synthetic_set: SyntheticSet | None = None
        self._ready = False

    @classmethod
    def from_datasets(  # type: ignore[override]  # Lightning's makes loaders that no phase here can use
        cls,
        train: Any,
        test: Any,
        *,
        val: Any = None,
        class_names: Sequence[str] | None = None,
        transform: ImageTransform | None = None,
        **options: Any,
    ) -> DistillationDataModule:
        """Read torch datasets of (image, label), or pairs of tensors (images, labels), into memory.

        Images are pictures: Pillow images, uint8, floats in [0, 1], or uint16, which is divided by its largest value.
        Items are read once. Mean and standard deviation are measured on ``train``; the contents identify the data.

        Args:
            train: e.g. a torchvision dataset, with or without ``ToTensor``.
            test: likewise.
            val: the images that are held out; None: the share ``val_fraction`` of ``train`` is.
            class_names: in label order; None: ``train.classes``, or numbers.
            transform: for images that are normalised already: how they were. They are taken as they are.
            options: arguments of the constructor, but those that say where files are.

        Raises:
            InputError: for images that are not pictures, images of different sizes without ``image_size``, and labels
                other than 0 .. K-1.
        """
        for name in ("dataset", "root", "download", "test_fraction"):
            if name in options:
                raise InputError(f"{name}= is for images in files: from_datasets takes them as objects")
        if transform is not None and options.get("zca"):
            raise InputError("zca=True whitens pictures: leave out transform=, which is for images normalised already")
        data = cls(**options)
        options = {"class_names": class_names, "image_size": data.hparams["image_size"], "transform": transform}
        data.take(read_datasets(train, test, val, **options))
        return data

    @classmethod
    def from_datamodule(
        cls,
        datamodule: LightningDataModule,
        *,
        class_names: Sequence[str] | None = None,
        transform: ImageTransform | None = None,
        synthetic: str | None = None,
    ) -> DistillationDataModule:
        """Read the loaders of another LightningDataModule into memory, once, and serve every phase from there.

        Its ``prepare_data`` and ``setup`` are called by ours. Images are pictures, as for :meth:`from_datasets`. The
        validation loader's images are the held-out ones; without one, none are. Map-style datasets are read whole, in
        their own order: of samplers, only the choice of a ``SubsetRandomSampler`` counts. Its hooks on batches
        (``on_after_batch_transfer`` and the like) are not called.

        Args:
            datamodule: its loaders yield (images, labels); the batch size is that of its training loader.
            class_names: in label order; None: those of its training dataset, or numbers.
            transform: for images that are normalised already: how they were.
            synthetic: as in the constructor.
        """
        data = cls(val_fraction=0.0, synthetic=synthetic)
        data.take(OwnDataModule(datamodule, class_names, transform))
        data.prepare_data_per_node = datamodule.prepare_data_per_node
        return data

    def prepare_data(self) -> None:
        """Download or decode the data set and fit the whitening, once per node; all are cached."""
        if self._own is not None:
            self._own.prepare()
            return
        self._read()
        if self.hparams["zca"] and not self._set_file():
            self._fit_whitening()

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images, unless that was done."""
        if self._ready:
            return
        file = self._set_file()
        loaded = SyntheticSet.load(file) if file else None
        self._read()
        if loaded is not None:
            self._check_fits(loaded, Path(str(file)))
            self._transform = loaded.transform
            held = loaded.metadata.get("ema_initial_weight", 0.0)
            if self.hparams["ema"] and held > 0.05:
                rank_zero_info(f"{file}: its averaged images still hold {100 * held:.0f} % of the initial ones")
        elif self.hparams["zca"]:
            self._fit_whitening()
        self.synthetic_set = loaded or self._baseline()
        self._ready = True

    def training_set(self) -> SyntheticSet | None:
        """Return the set that takes the place of the training images, or None."""
        self.setup()
        return self.synthetic_set

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
            real = random_real_images(self._part("train"), ipc, seed) if kind == "random" else self._part("train")
        else:
            by = {key: self.hparams[key] for key in ("trajectories", "teacher")}
            real, metadata["chosen_by"] = teacher_coreset(
                self._part("train"), kind, ipc, described=self.describe(), **by
            )
        return SyntheticSet(*real, class_names=self.class_names, transform=self.transform, metadata=metadata)

    def _check_fits(self, synthetic: SyntheticSet, file: Path) -> None:
        shape, wanted = tuple(synthetic.images.shape[1:]), (self.in_channels, self.image_size, self.image_size)
        names = synthetic.class_names or self.class_names
        if not synthetic.class_names:
            replace(synthetic, class_names=names).check(file)  # labels of as many classes
        if (shape, names) != (wanted, self.class_names):
            raise InputError(
                f"{file}: holds {shape} images of the classes {', '.join(names)}, "
                f"{self.hparams['dataset']} has {wanted} images of {', '.join(self.class_names)}; "
                "set data.dataset to the set's own (and data.image_size, where it was resized)"
            )

    def _module(self) -> object:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _loader(self, images: Images, *, shuffle: bool) -> Iterable[Any]:
        trainer, module = self.trainer, self._module()
        device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
        plan = BatchPlan(*((trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)), _same_epoch)
        if isinstance(module, PlansBatches):
            plan = module.batch_plan()
        order = BatchOrder(
            len(images.labels),
            self.hparams["batch_size"],
            shuffle=shuffle,
            seed=self.hparams["seed"],
            rank=plan.rank,
            world_size=plan.world_size,
            epoch_map=plan.epoch,
        )
        place = self.hparams["on_device"]
        if place in ("no", False) or (place == "auto" and not fits_on(device, images.images)):
            return host_loader(images.images.cpu(), images.labels.cpu(), order, num_workers=self.hparams["num_workers"])
        return TensorLoader(images.images.to(device), images.labels.to(device), order)

    def train_dataloader(self) -> Iterable[Any]:
        """Return the module's own batches, synthetic images or real ones; see the class."""
        module = self._module()
        if isinstance(module, BringsBatches):
            return module.iteration_loader()
        if self.synthetic_set is not None:
            chosen = Images(self.synthetic_set.chosen(ema=self.hparams["ema"]), self.synthetic_set.training_labels())
            return self._loader(chosen, shuffle=True)
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Iterable[Any]:
        """Return the held-out images, in order; nothing where there are none, or the module's fit does not validate."""
        module, doing = self._module(), None if self.trainer is None else self.trainer.state.fn
        measures_itself = doing == "fit" and isinstance(module, PlansBatches) and not module.batch_plan().validates
        if measures_itself or isinstance(module, BringsBatches) or not len(self._read().labels("val")):
            if doing == "validate":
                raise InputError("no training images are held out to validate on: set data.val_fraction")
            return [] if self.trainer is None else NoLoaders()
        return self._loader(self.val, shuffle=False)

    def test_dataloader(self) -> Iterable[Any]:
        """Return the test images, in order."""
        return self._loader(self.test, shuffle=False)

    predict_dataloader = test_dataloader


def _same_epoch(epoch: int) -> int:
    return epoch
