"""The DataModule of all phases: real images, split, transformed when they are first asked for, and their loaders."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import (
    BatchPlan,
    DataDescription,
    Images,
    ImageShape,
    ImageTransform,
    LearnsSet,
    PlansBatches,
)
from ftd_lightning.data.coresets import BASELINES, random_real_images, teacher_coreset
from ftd_lightning.data.datasets import DATASETS, check_name
from ftd_lightning.data.decoding import cached_whitening
from ftd_lightning.data.folder import Census, find_parts
from ftd_lightning.data.in_memory import read_datamodule, read_datasets
from ftd_lightning.data.loaders import BatchOrder, TensorLoader, fits_on, host_loader
from ftd_lightning.data.sources import OWN_IMAGES, ImageDataset, Pictures, Request, unit_range
from ftd_lightning.data.splits import split
from ftd_lightning.errors import InputError
from ftd_lightning.files.schema import check_labels, check_tensor
from ftd_lightning.files.synthetic_set import SyntheticSet
from ftd_lightning.files.transforms import Standardization
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.sizes import ImageSize, as_size, sides

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from ftd_lightning.contracts import Part
    from ftd_lightning.data.decoding import LabelledFiles
    from ftd_lightning.data.in_memory import Choice


CHUNK = 5000  # images transformed at a time: bounds the memory of whitening


def _of_classes(part: Pictures, known: Sequence[str], wanted: Sequence[str]) -> Pictures:
    """Number the labels of a part in the order of ``wanted``; -1 for those of other classes."""
    if list(known) == list(wanted):
        return part
    place = torch.tensor([wanted.index(name) if name in wanted else -1 for name in known])
    return Pictures(part.pictures, place[part.labels])


class RealImages:
    """The parts of a data set, read and split as ``splits.split`` says, each transformed when it is first asked for."""

    def __init__(self, spec: ImageDataset, classes: Sequence[str], **split_options: Any) -> None:
        parts = {name: _of_classes(part, spec.class_names, classes) for name, part in spec.load().items()}
        if not any(bool((some != some[..., :1, :1]).any()) for some in parts["train"].pictures.split(100)):
            raise InputError("every training image is of a single colour: check the images, and how they are read")
        kept = {name: (part.labels >= 0).nonzero().squeeze(1) for name, part in parts.items()}
        chosen = split({name: part.labels[kept[name]] for name, part in parts.items()}, **split_options)
        # Whole parts, which may be mapped from files, and the indices of the images that are used.
        self._parts = {name: (parts[source], kept[source][index]) for name, (source, index) in chosen.items()}
        self._applied = spec.transform
        self._images: dict[Part, Images] = {}

    def labels(self, name: Part) -> Tensor:
        """Return the labels of a part, (N,) int64; no image is transformed for it."""
        part, index = self._parts[name]
        return part.labels[index]

    def pictures(self, name: Part) -> Tensor:
        """Return the pictures of a part, (N, C, H, W)."""
        part, index = self._parts[name]
        return part.pictures[index]

    def images(self, name: Part, transform: ImageTransform) -> Images:
        """Return the images of a part; later calls, with the same transform, return the same tensors."""
        if name not in self._images:
            (pictures, labels), index = self._parts[name]
            same = self._applied is not None and self._applied.describe() == transform.describe()
            images = torch.empty(len(index), *pictures.shape[1:])  # filled chunk by chunk: torch.cat would take twice
            for i in tqdm(range(0, len(index), CHUNK), desc=f"transforming {name} images", leave=False, delay=1):
                chunk = pictures[index[i : i + CHUNK]]
                if not same:  # a set may have another transform than images that are normalised already
                    chunk = transform.apply(self._applied.invert(chunk) if self._applied else unit_range(chunk))
                images[i : i + CHUNK] = chunk
            self._images[name] = Images(images, labels[index])
        return self._images[name]


def given_images(real: Sequence[Tensor]) -> Images:
    """Check real images that are given as tensors: images (N, C, H, W) of floats, and their classes, (N,) int64."""
    if len(real) != 2 or not all(isinstance(part, torch.Tensor) for part in real):
        raise InputError("real: is not a pair of tensors, images and labels")
    images, labels = real
    check_tensor(images.float(), "images", "real", (None,) * 4)
    check_labels(labels, len(images), None, "class", "real")
    return Images(images, labels)


def _made(make: Callable[[], LightningDataModule]) -> LightningDataModule:
    """Make another datamodule whose ``save_hyperparameters`` does not take the arguments of this one for its own."""
    if isinstance(make, partial) and make.args and isinstance(make.args[-1], type):  # LightningCLI would hand them on
        make = partial(make.args[-1], **make.keywords)
    return Context().run(make)


class NoLoaders(CombinedLoader):
    """The combination of no loaders, on which Lightning skips validation; of an empty list it warns."""

    # Lightning sets the loaders that it has read, which is ignored.
    flattened = property(lambda self: [], lambda self, loaders: None)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__([], "sequential")

    def __len__(self) -> int:
        return 0


def chosen_classes(known: Sequence[str], chosen: Sequence[str] | None) -> list[str]:
    """Return the names of the classes that are used, in label order: all, or those that were chosen."""
    if chosen is None:
        return list(known)
    if len(set(chosen)) < len(chosen) or not chosen or not set(chosen) <= set(known):
        raise InputError(f"classes={chosen}: give some of {', '.join(known)}, each once")
    return list(chosen)


class DistillationDataModule(LightningDataModule):
    """Images of one data set, transformed and held as tensors on the training device.

    The module that is fitted decides what is trained on: one that has its own batches (a distillation) gets those; with
    ``synthetic`` given, others get its images, else the real training images. It is a ``contracts.DataSource``.

    Args:
        dataset: a name of the table in ``ftd_lightning.data.datasets``.
        root: folder of the images or of their downloads.
        batch_size: images per batch, on each rank.
        val_fraction: share of every class's *training* images held out, so that an iterate can be chosen without the
            test set, 0.9 at most. 0 trains on all, as the paper does. Unused where a "folder" has ``train/``, ``val/``
            and ``test/``: those in ``val/`` are held out.
        zca: whiten instead of standardising; fitted on the training images that are not held out.
        zca_eps: added to the eigenvalues; above 0.
        classes: names of the classes to use, which are numbered in this order; None: all.
        max_per_class: keep at most so many images of each class, in training and in test; None keeps all.
        synthetic: train on a synthetic set: its file, or from Python a ``SyntheticSet``, whose transform the test
            images then go through; "real" (all real images); or ipc real images of each class: "random", or by a
            teacher's features "herding", "k-center".
        ema: use the averaged images of the set.
        ipc: images per class of "random", "herding" and "k-center"; a list names those of each, in label order.
        download: fetch missing files.
        on_device: "auto" puts images on the GPU where they take at most half of its free memory; "no" or False reads
            them from host memory through a DataLoader; "yes" or True insists.
        num_workers: of that DataLoader.
        seed: decides the held-out images, the random ones, and the order of batches.
        image_size: pixels that the images are resized to, or (height, width); None: the data set's own.
        test_fraction: share of every class that becomes the test part, in (0, 0.9], for a "folder" of classes that
            names no test part; the names of the files decide which images.
        trajectories: store of the teachers whose features "herding" and "k-center" use.
        teacher: which of them.
        cache_dir: folder of decoded images and whitenings; None: ``ftd_lightning`` in the user's cache folder.
        skip_broken: leave image files out that cannot be read, and say which; without it they are refused.
        datamodule: class, or function without arguments, of another LightningDataModule, which is read in place of a
            data set as by ``from_datamodule``: ``--data.datamodule mine.MyData --data.datamodule.init_args.size 3``.

    Attributes:
        spec: the description of the data set. "tiny-imagenet" and "folder" are described by their files, another
            datamodule by its images, at first use: it and what follows from it (``num_classes``, ``in_channels``,
            ``image_size``, ``class_names``) need ``prepare_data``, or do its downloading and decoding.
        synthetic_set: the set that ``synthetic`` named, after ``setup``, or None.
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
        classes: list[str] | None = None,
        max_per_class: int | None = None,
        synthetic: str | SyntheticSet | None = None,
        ema: bool = False,
        ipc: Ipc = 1,
        download: bool = True,
        on_device: Literal["auto", "yes", "no"] | bool = "auto",
        num_workers: int = 0,
        seed: int = 0,
        image_size: int | tuple[int, int] | None = None,
        test_fraction: float = 0.2,
        trajectories: str | None = None,
        teacher: int = 0,
        cache_dir: str | None = None,
        skip_broken: bool = False,
        datamodule: Callable[[], LightningDataModule] | None = None,
    ) -> None:
        check_bounds(DistillationDataModule, locals())
        super().__init__()
        image_size = None if image_size is None else as_size(image_size)
        if dataset not in DATASETS:
            check_name(dataset)
        # Not to the logger: Lightning refuses names that module and datamodule share with different values.
        self.save_hyperparameters(logger=False, ignore=["datamodule"])
        self.root: Path | None = Path(root).expanduser()
        self.synthetic_set: SyntheticSet | None = None
        if isinstance(synthetic, SyntheticSet):  # hyper-parameters are plain values
            self.synthetic_set, self.hparams["synthetic"] = synthetic, None
        self.wrapped = None if datamodule is None else _made(datamodule)
        self.reading: dict[str, Any] = {"image_size": image_size}  # with the arguments of from_datamodule
        if self.wrapped is not None:
            self.hparams.update(dataset=OWN_IMAGES, val_fraction=0.0)
            self.root, self.prepare_data_per_node = None, self.wrapped.prepare_data_per_node
        self._real: RealImages | None = None
        self._transform: ImageTransform | None = None
        self._ready = False

    @classmethod
    def from_datasets(  # type: ignore[override]  # Lightning's makes loaders that no phase here can use
        cls,
        train: Any,
        test: Any,
        *,
        val: Any = None,
        batch: Choice | None = None,
        class_names: Sequence[str] | None = None,
        transform: Any = None,
        **options: Any,
    ) -> Self:
        """Read torch datasets of (image, label), or pairs of tensors (images, labels), into memory.

        Images are pictures: Pillow images, uint8, floats in [0, 1], or uint16, which is divided by its largest value.
        Items are read once. Mean and standard deviation are measured on ``train``; the contents identify the data.

        Args:
            train: e.g. a torchvision dataset, with or without ``ToTensor``; labels are 0 .. K-1.
            test: the test images.
            val: the images that are held out; None: the share ``val_fraction`` of ``train`` is.
            batch: returns (image, label) from an item of another form: ``lambda b: (b["image"], b["label"])``.
            class_names: in label order; None: ``train.classes``, or numbers.
            transform: of images that are normalised already, which are taken as they are: torchvision's ``Normalize``
                or a ``Compose`` with one in it, ``Standardization`` or ``Whitening``. None: the ``Normalize`` in the
                datasets' own ``transform``, if any.
            options: arguments of the constructor, but those that say where files are.
        """
        for name in ("dataset", "root", "download", "test_fraction", "skip_broken"):
            if name in options:
                raise InputError(f"{name}= is for images in files: from_datasets takes them as objects")
        data = cls(**options)
        data.hparams["dataset"], data.root = OWN_IMAGES, None
        size = data.hparams["image_size"]
        how = {"batch": batch, "class_names": class_names, "image_size": size, "transform": transform}
        data.spec = read_datasets(train, test, val, **how)
        return data

    @classmethod
    def from_datamodule(
        cls,
        datamodule: Any,
        *,
        batch: Choice | None = None,
        loaders: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        transform: Any = None,
        **options: Any,
    ) -> Self:
        """Read the loaders of another LightningDataModule into memory, once, and serve every phase from there.

        Images are pictures, as for :meth:`from_datasets`. The validation loader's images are the held-out ones; without
        one, none are. Without a test loader, what needs test images is refused. Map-style datasets are read whole, in
        their own order: of samplers, only the choice of a ``SubsetRandomSampler`` counts. Hooks on batches
        (``on_after_batch_transfer`` and the like) are not called.

        Args:
            datamodule: of ``lightning`` or ``pytorch_lightning``; the batch size is that of its training loader.
            batch: returns (images, labels) from a batch of another form: ``lambda b: (b["image"] / 1e4, b["label"])``.
            loaders: which of several loaders of a part is read, by its index or key, such as ``{"val": 0}``.
            class_names: in label order; None: those of its training dataset, or numbers.
            transform: of images that are normalised already, as for :meth:`from_datasets`.
            options: arguments of the constructor, such as ``synthetic``. Those that find, hold out and batch images do
                not count.
        """
        data = cls(datamodule=lambda: datamodule, **options)
        data.reading |= {"batch": batch, "loaders": loaders, "class_names": class_names, "transform": transform}
        return data

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *arguments: Any, weights_only: bool = True, **options: Any
    ) -> Self:
        """Make the datamodule of a fit again, as Lightning does, but import nothing that the file names."""
        options |= {"weights_only": weights_only, "_instantiator": None}
        return super().load_from_checkpoint(checkpoint_path, *arguments, **options)

    @property
    def _request(self) -> Request:
        keys = ("download", "image_size", "test_fraction", "cache_dir", "skip_broken")
        return Request(self.root or Path(), **{key: self.hparams[key] for key in keys})

    @property
    def _split_options(self) -> dict[str, Any]:
        return {key: self.hparams[key] for key in ("val_fraction", "max_per_class", "seed")}

    @cached_property
    def spec(self) -> ImageDataset:
        """The description of the data set; see the class."""
        if self.wrapped is not None:
            spec, self.hparams["batch_size"] = read_datamodule(self.wrapped, self.trainer, **self.reading)
            return spec
        return DATASETS[self.hparams["dataset"]](self._request)

    @cached_property
    def census(self) -> Census | None:
        """Counts over the files of a "folder", by their headers, without decoding; None for other data sets."""
        return Census.take(*self._folder) if self.hparams["dataset"] == "folder" else None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.spec.in_channels

    @property
    def image_size(self) -> ImageSize:
        """Pixels of each side, or (height, width) of rectangles."""
        return self.spec.image_size

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return chosen_classes(self.spec.class_names, self.hparams["classes"])

    @property
    def transform(self) -> ImageTransform:
        """The image transform; before ``setup``, of images that are not whitened."""
        return self._transform or self.spec.transform or Standardization(self.spec.mean, self.spec.std)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        classes = {} if self.hparams["classes"] is None else {"classes": self.class_names}
        return {"name": self.hparams["dataset"], **classes, **self._split_options, **self.spec.fingerprint()}

    def description(self) -> DataDescription:
        """Describe the training images; see ``contracts.DataSource``."""
        shape = ImageShape(self.in_channels, self.num_classes, self.image_size)
        dataset, batch_size = dict(self._fingerprint), self.hparams["batch_size"]
        return DataDescription(shape, self.class_names, self.transform, dataset, batch_size)

    def describe(self) -> dict[str, Any]:
        """Return ``description().metadata()``: equal values mean equal images."""
        return self.description().metadata()

    def _read(self) -> RealImages:
        if self._real is None:
            self._real = RealImages(self.spec, self.class_names, **self._split_options)
        return self._real

    @cached_property
    def _folder(self) -> tuple[tuple[str, ...], dict[str, LabelledFiles]]:
        return find_parts(self._request)

    def count(self, name: Part) -> list[int]:
        """Count the images of each class in a part, in label order; those of a "folder" are not decoded for it."""
        if self._real is None and self.hparams["dataset"] == "folder":
            found, parts = self._folder
            names = chosen_classes(found, self.hparams["classes"])
            numbers = torch.tensor([names.index(name) if name in names else -1 for name in found])
            labels = {part: numbers[listed.labels] for part, listed in parts.items()}
            labels = {part: listed[listed >= 0] for part, listed in labels.items()}
            source, index = split(labels, **self._split_options)[name]
            return labels[source][index].bincount(minlength=len(names)).tolist()
        return self._read().labels(name).bincount(minlength=self.num_classes).tolist()

    def part(self, name: Part) -> Images:
        """Return the images of a part, transformed at first use: "train", "val" (possibly none) or "test"."""
        self.setup("fit")
        if name == "test" and not len(self._read().labels(name)):
            raise InputError("there are no test images: of a wrapped datamodule, a test_dataloader is read")
        return self._read().images(name, self.transform)

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

    def prepare_data(self) -> None:
        """Download or decode the data set and fit the whitening, once per node; all are cached."""
        if self.wrapped is not None:
            self.wrapped.prepare_data()
            return
        self._read()
        if self.hparams["zca"] and self.synthetic_set is None and not self._set_file():
            self._fit_whitening()

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images, unless that was done."""
        if self._ready:
            return
        loaded, where = self.synthetic_set, "synthetic"
        if (file := self._set_file()) is not None:
            loaded, where = SyntheticSet.load(file), file
        self._read()
        if loaded is not None:
            self._check_fits(loaded, where)
            self._transform = loaded.transform
            initial = loaded.metadata.get("ema_initial_weight", 0.0)
            if self.hparams["ema"] and initial > 0.05:
                rank_zero_info(f"{where}: its averaged images still hold {100 * initial:.0f} % of the initial ones")
        elif self.hparams["zca"]:
            self._fit_whitening()
        self.synthetic_set = loaded or self._baseline()
        self._ready = True

    def _fit_whitening(self) -> None:
        if self._transform is None:
            if self.spec.transform is not None:
                raise InputError("zca=True whitens pictures, but these images are normalised already")
            eps, cache_dir = self.hparams["zca_eps"], self.hparams["cache_dir"]
            pictures = partial(self._read().pictures, "train")
            self._transform = cached_whitening(pictures, self._fingerprint, eps=eps, cache_dir=cache_dir)

    def training_set(self) -> SyntheticSet | None:
        """Return the set that takes the place of the training images, or None."""
        self.setup()
        return self.synthetic_set

    def _set_file(self) -> str | None:
        synthetic: str | None = self.hparams["synthetic"]
        return None if synthetic in BASELINES else synthetic

    def _baseline(self) -> SyntheticSet | None:
        """Real images in the place of synthetic ones."""
        hparams = self.hparams
        if (kind := hparams["synthetic"]) is None:
            return None
        real, described = self._read().images("train", self.transform), self.describe()
        metadata = {"method": kind, **described}
        if kind == "random":
            real = random_real_images(real, hparams["ipc"], hparams["seed"])
        elif kind != "real":
            by = {key: hparams[key] for key in ("ipc", "trajectories", "teacher")}
            real, metadata["chosen_by"] = teacher_coreset(real, kind, described=described, **by)
        return SyntheticSet(*real, class_names=self.class_names, transform=self.transform, metadata=metadata)

    def _check_fits(self, synthetic: SyntheticSet, file: str) -> None:
        shape, wanted = tuple(synthetic.images.shape[1:]), (self.in_channels, *sides(self.image_size))
        names = synthetic.class_names or self.class_names
        if not synthetic.class_names:
            replace(synthetic, class_names=names).check(file)  # labels of as many classes
        if (shape, names) != (wanted, self.class_names):
            raise InputError(
                f"{file}: holds {shape} images of the classes {', '.join(names)}, "
                f"{self.hparams['dataset']} has {wanted} images of {', '.join(self.class_names)}; "
                "set data.dataset to the set's own (and data.image_size and data.classes)"
            )
        of_set, share = synthetic.metadata.get("dataset"), self._fingerprint.get("test_fraction")
        theirs = of_set.get("test_fraction", share) if isinstance(of_set, dict) else share
        if share is not None and theirs < share:  # test parts of smaller shares are parts of larger ones
            raise InputError(f"{file}: has seen test images: data.test_fraction was {theirs}, and is {share} now")

    def _module(self) -> object:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _loader(self, images: Images, *, shuffle: bool) -> Iterable[Any]:
        trainer, module, hparams = self.trainer, self._module(), self.hparams
        device, ranks = torch.device("cpu"), (0, 1)
        if trainer is not None:
            device, ranks = trainer.strategy.root_device, (trainer.global_rank, trainer.world_size)
        plan = module.batch_plan() if isinstance(module, PlansBatches) else BatchPlan(*ranks, lambda epoch: epoch)
        shares: dict[str, Any] = {"rank": plan.rank, "world_size": plan.world_size, "epoch_map": plan.epoch}
        size, seed = hparams["batch_size"], hparams["seed"]
        order = BatchOrder(len(images.labels), size, shuffle=shuffle, seed=seed, **shares)
        place = hparams["on_device"]
        if place in ("no", False) or (place == "auto" and not fits_on(device, images.images)):
            return host_loader(images.images.cpu(), images.labels.cpu(), order, num_workers=hparams["num_workers"])
        return TensorLoader(images.images.to(device), images.labels.to(device), order)

    def train_dataloader(self) -> Iterable[Any]:
        """Return the module's own batches, synthetic images or real ones; see the class."""
        module = self._module()
        if isinstance(module, LearnsSet):
            return module.train_dataloader()
        if self.synthetic_set is not None:
            chosen = Images(self.synthetic_set.chosen(ema=self.hparams["ema"]), self.synthetic_set.training_labels())
            return self._loader(chosen, shuffle=True)
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Iterable[Any]:
        """Return the held-out images, in order; nothing where there are none, or the module's fit does not validate."""
        module, doing = self._module(), None if self.trainer is None else self.trainer.state.fn
        measures_itself = doing == "fit" and isinstance(module, PlansBatches) and not module.batch_plan().validates
        if measures_itself or isinstance(module, LearnsSet) or not len(self._read().labels("val")):
            if doing == "validate":
                raise InputError("no training images are held out to validate on: set data.val_fraction")
            return [] if self.trainer is None else NoLoaders()
        return self._loader(self.val, shuffle=False)

    def test_dataloader(self) -> Iterable[Any]:
        """Return the test images, in order."""
        return self._loader(self.test, shuffle=False)

    predict_dataloader = test_dataloader
