"""What ``ftd rank`` is asked for, and what its sets agree on: data set, held-out images, network, augmentation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd_lightning.bounds import check_bounds
from ftd_lightning.data import DistillationDataModule, SyntheticSet
from ftd_lightning.data.datasets import check_name
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.models.description import same_network
from ftd_lightning.models.registry import recorded_network
from ftd_lightning.training.fresh_networks import FreshNetworks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ftd_lightning.contracts import ImageShape

LEARNING_RATES = (0.001, 0.01, 0.1)
SPLIT = {"val_fraction": 0.1, "max_per_class": None, "seed": 0}  # where sets do not agree on one


@dataclass(frozen=True)
class RankSettings:
    """How sets are scored; the same for all sets of a call.

    Args:
        out: folder of rank.json, rank.md, rank.png, and of what is finished (evaluations).
        networks: trained on everything that is compared; each mean and standard deviation is over them.
        epochs: over a set, and over as many random real images.
        real_epochs: over all real images; null: 60, or more where that is less than 360 steps.
        learning_rates: to choose from on held-out training images, beside the set's own step size.
        lr_networks: of those networks, how many choose a learning rate by their mean held-out accuracy.
        network: a name or import path; null takes that of the sets.
        network_options: its arguments, where ``network`` is given.
        augment: DSA strategy, "" for none; null takes that of the sets that have one.
        ema: use the averaged images of sets that have them.
        seed: draws random real images, initialisations, batches and augmentation.
        threads: of the CPU; null leaves torch's own choice. They decide no number.

    Raises:
        InputError: for numbers out of range.
    """

    out: str = "runs/rank"
    networks: int = 5
    epochs: int = 1000
    real_epochs: int | None = None
    learning_rates: list[float] = field(default_factory=lambda: list(LEARNING_RATES))
    lr_networks: int = 2
    network: str | None = None
    network_options: dict[str, Any] | None = None
    augment: str | None = None
    ema: bool = False
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_bounds(RankSettings, vars(self))
        if not self.learning_rates:
            raise InputError("RankSettings: learning_rates is empty: give at least one")
        if self.network_options is not None and self.network is None:
            raise InputError("RankSettings: network_options are those of a network: give network as well")


@dataclass(frozen=True)
class RankData:
    """The real images; what is null is that of the sets.

    Args:
        root: folder of the images or of their downloads.
        dataset: name of the data set; needed where the sets do not name theirs.
        image_size: height and width in pixels that images were resized to.
        val_fraction: share of the training images held out to choose learning rates; 0.1 where sets have different ones
            or hold none out.
        max_per_class: keep at most so many images of each class, in training and in test.
        test_fraction: share that is the test part of a "folder" that names none.
        seed: decides which images are held out.
        download: fetch what is missing.
        cache_dir: folder of decoded images.
    """

    root: str = "data"
    dataset: str | None = None
    image_size: int | None = None
    val_fraction: float | None = None
    max_per_class: int | None = None
    test_fraction: float | None = None
    seed: int | None = None
    download: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_bounds(RankData, vars(self))


def read_sets(files: Sequence[str]) -> dict[str, SyntheticSet]:
    """Read sets, by their names as given.

    Raises:
        InputError: for a file that is missing or is no set, a set that is given twice, or sets of different classes.
    """
    if not files:
        raise InputError("ftd rank: give at least one set")
    known: dict[Path, str] = {}
    for name in files:
        if (path := Path(name).resolve()) in known:
            raise InputError(f"{name}: is given twice")
        known[path] = name
    sets = {name: SyntheticSet.load(name) for name in files}
    (first, one), *others = sets.items()
    for name, other in others:
        counts = len(one.class_names), len(other.class_names)
        if all(counts) and counts[0] != counts[1]:
            raise InputError(f"{name}: has {counts[1]} classes, {first} has {counts[0]}: rank them apart")
        differ = all(counts) and one.class_names != other.class_names
        if differ or one.images.shape[1:] != other.images.shape[1:]:
            raise InputError(f"{name}: has other classes or image sizes than {first}: rank them apart")
    return sets


def _described(one: SyntheticSet) -> dict[str, Any]:
    """Return what a set says of its data set; it may be the name alone, or nothing."""
    recorded = one.metadata.get("dataset")
    return recorded if isinstance(recorded, dict) else {"name": recorded} if recorded else {}


def _check_same_images(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Refuse different data; how the training images are split is not part of it."""
    for key in (one.keys() & other.keys()) - SPLIT.keys():
        if one[key] != other[key]:
            raise InputError(f"{where} (dataset.{key} {other[key]!r:.60} and {one[key]!r:.60})")


def data_options(sets: Mapping[str, SyntheticSet], given: RankData) -> dict[str, Any]:
    """Return the arguments of the datamodule: what is given, else what the sets agree on.

    Raises:
        InputError: for sets of different data sets, or where none is named.
    """
    described = {name: _described(one) for name, one in sets.items()}
    first = next(iter(sets))
    for name, one in described.items():
        _check_same_images(described[first], one, f"{name}: was made of another data set than {first}")
        if given.dataset is not None:  # before anything is downloaded
            check_name(given.dataset)
            if one.get("name", given.dataset) != given.dataset:
                raise InputError(f"{name}: was made of {one['name']!r}, not of {given.dataset!r}")
    options: dict[str, Any] = {}
    for key, otherwise in SPLIT.items():
        values = [one.get(key, otherwise) for one in described.values()]
        options[key] = values[0] if values.count(values[0]) == len(values) else otherwise
    options["val_fraction"] = options["val_fraction"] or SPLIT["val_fraction"]
    named = [one for one in described.values() if "name" in one]
    options |= {"dataset": named[0]["name"]} if named else {}
    options |= {key: one[key] for key in ("image_size",) for one in named if key in one}
    options |= {option.name: value for option in fields(given) if (value := getattr(given, option.name)) is not None}
    if "dataset" not in options:
        raise InputError(f"{first}: does not name its data set: give --data.dataset")
    return options


def read_data(sets: Mapping[str, SyntheticSet], given: RankData) -> dict[str, DistillationDataModule]:
    """Read the real images through the transform of each set, by the set's name; sets of one transform share them.

    Raises:
        InputError: for sets of different data sets, or other classes or images than those of the data set; and where no
            training images are held out.
    """
    options = data_options(sets, given)
    by_transform: list[tuple[dict[str, Any], DistillationDataModule]] = []
    found = {}
    for name, one in sets.items():
        transform = one.transform.describe()
        data = next((known for described, known in by_transform if described == transform), None)
        if data is None:
            data = DistillationDataModule(synthetic=str(Path(name).resolve()), **options)  # "random" is no file
            data.prepare_data()
            data.setup()
            by_transform.append((transform, data))
        here = data.description().dataset
        _check_same_images(
            here, _described(one), f"{name}: was made of another data set than {options['dataset']} here"
        )
        if not len(data.val.labels):
            raise InputError("ftd rank chooses learning rates on held-out images: give --data.val_fraction above 0")
        found[name] = data
    return found


def choose_network(sets: Mapping[str, SyntheticSet], settings: RankSettings, shape: ImageShape) -> FreshNetworks:
    """Return the network to score by: the given one, or that of the sets.

    Raises:
        InputError: where sets name different ones, or none of this library.
    """
    if settings.network is not None:
        fresh = FreshNetworks(settings.network, settings.network_options, shape)
        fresh.architecture()  # refuses options that it does not take
        return fresh
    named = {name: one.metadata["network"] for name, one in sets.items() if "network" in one.metadata}
    if not named:
        raise InputError(f"{next(iter(sets))}: does not name its network: give --network")
    (first, chosen), *others = named.items()
    name, options = recorded_network(chosen, first, "give --network")
    for file, other in others:
        if not same_network({**chosen, **shape._asdict()}, {**other, **shape._asdict()}):
            raise InputError(f"{file}: names another network than {first}: give --network for all")
    return FreshNetworks(name, options, shape)


def choose_augmentation(sets: Mapping[str, SyntheticSet], settings: RankSettings) -> Augmentation:
    """Return the augmentation to score with: the given one; that of the sets that have one; DSA's whole strategy.

    Raises:
        InputError: where sets name different ones.
    """
    if settings.augment is not None:
        return Augmentation(settings.augment)
    described = {name: one.metadata.get("augmentation") for name, one in sets.items()}
    named = {name: Augmentation.of(value) for name, value in described.items() if value}
    named = {name: augment for name, augment in named.items() if augment}
    if not named:
        return Augmentation()
    (first, chosen), *others = named.items()
    for name, other in others:
        if other != chosen:
            unlike = [key for key, value in chosen.plain().items() if other.plain()[key] != value]
            raise InputError(
                f"{name}: was made with another augmentation than {first} ({', '.join(unlike)}): "
                f"give --augment for all, such as --augment {chosen.strategy}"
            )
    return chosen
