"""What ``ftd rank`` is asked for, and what its sets agree on: data set, held-out images, network, augmentation."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.command_line import command_parser
from ftd_lightning.contracts import Images
from ftd_lightning.core.evaluation import (
    REAL_STEPS,
    EvaluationProtocol,
    PartsOnDevice,
    accuracies,
    mean_and_std,
    train_fresh_networks,
)
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.core.networks import FreshNetworks
from ftd_lightning.core.results import held_out_seen
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.coresets import class_probabilities
from ftd_lightning.data.datasets import check_name
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import (
    TensorFile,
    fingerprint,
    read_json,
    replacing,
    versions,
    write_json,
    write_tensors,
)
from ftd_lightning.files.schema import per_cent
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.models.description import same_network
from ftd_lightning.models.registry import recorded_network
from ftd_lightning.studies.fits import held, minor_version
from ftd_lightning.studies.tables import markdown_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

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
    learning_rates: Sequence[float] = LEARNING_RATES
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


SCORES = ("hlr", "ior", "lrs", "ars")


def normalised(value: float) -> float:
    """Map a weighted difference of accuracies in [-1, 1] to a score in [0, 1].

    Example:
        >>> [round(normalised(value), 4) for value in (-1.0, 0.0, 1.0)]
        [0.0, 0.2689, 1.0]
    """
    least = math.exp(-1)
    return (math.exp(value) - least) / (math.e - least)


def hard_label_recovery(real: float, hard: float) -> float:
    """HLR, in [-1, 1]; lower is better.

    Args:
        real: accuracy of a network trained on all real images, a fraction.
        hard: of one trained on the set with hard labels.

    Example:
        >>> hard_label_recovery(0.875, 0.5)
        0.375
    """
    return real - hard


def improvement_over_random(own: float, random: float) -> float:
    """IOR, in [-1, 1]; higher is better.

    Args:
        own: accuracy of a network trained on the set with labels of its own kind, a fraction.
        random: of one trained in the same way on as many random real images of each class.

    Example:
        >>> improvement_over_random(0.75, 0.5)
        0.25
    """
    return own - random


def label_robust_score(ior: float, hlr: float, *, w: float = 0.5) -> float:
    """LRS, in [0, 1]; higher is better.

    Args:
        ior: from :func:`improvement_over_random`.
        hlr: from :func:`hard_label_recovery`.
        w: weight of ``ior``, in [0, 1].

    Example:
        >>> round(label_robust_score(0.2, 0.2), 4)  # alpha = 0
        0.2689
        >>> label_robust_score(1.0, -1.0)
        1.0
    """
    return normalised(w * ior - (1 - w) * hlr)


def augmentation_robust_score(augmented: float, plain: float, *, g: float = 0.5) -> float:
    """ARS, in [0, 1]; higher is better.

    Args:
        augmented: IOR where training images are augmented.
        plain: IOR where they are not.
        g: weight of ``augmented``, in [0, 1].

    Example:
        >>> round(augmentation_robust_score(0.5, -0.5), 4)  # beta = 0
        0.2689
    """
    return normalised(g * augmented + (1 - g) * plain)


def scores(
    real: Sequence[float],
    hard: Sequence[float],
    own: tuple[Sequence[float], Sequence[float]],
    plain: tuple[Sequence[float], Sequence[float]],
) -> dict[str, dict[str, float | int]]:
    """Compute all four scores of a set, network by network, so that networks of one seed are compared.

    Args:
        real: accuracies of n networks trained on all real images, fractions.
        hard: on the set with hard labels.
        own: on the set with labels of its own kind, and on random real images.
        plain: the same two without augmentation.

    Returns:
        {"mean", "std", "n"} of "hlr", "ior", "lrs" and "ars" over the networks.

    Example:
        >>> found = scores([0.9, 0.8], [0.5, 0.6], ([0.5, 0.6], [0.25, 0.35]), ([0.5, 0.6], [0.5, 0.6]))
        >>> {name: round(score["mean"], 4) for name, score in found.items()}
        {'hlr': 0.3, 'ior': 0.25, 'lrs': 0.259, 'ars': 0.3256}
    """
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for whole, hard_one, own_one, random, plain_one, plain_random in zip(real, hard, *own, *plain, strict=True):
        hlr, ior = hard_label_recovery(whole, hard_one), improvement_over_random(own_one, random)
        found["hlr"].append(hlr)
        found["ior"].append(ior)
        found["lrs"].append(label_robust_score(ior, hlr))
        found["ars"].append(augmentation_robust_score(ior, improvement_over_random(plain_one, plain_random)))
    return {name: mean_and_std(torch.tensor(values, dtype=torch.float64)) for name, values in found.items()}


Labels = Literal["hard", "soft", "teacher"]
PLAIN = "not augmented"  # the column without augmentation
COLUMNS = ("hard", "soft", "teacher", PLAIN)
TEACHER_COST = 4 / 3  # of a step: a forward pass beside one and a backward pass, of two


def hard_labels(labels: Tensor) -> Tensor:
    """Return classes (N,) int64: hard labels themselves, of soft ones (N, K) the class of the largest value.

    Example:
        >>> hard_labels(torch.tensor([[0.4, 0.6], [0.9, 0.1]]))
        tensor([1, 0])
    """
    return labels if labels.ndim == 1 else labels.argmax(1)


@dataclass(frozen=True)
class RankedSet:
    """One set of a ranking.

    Attributes:
        name: as it was given.
        synthetic: the set.
        evaluation: trains on it, and on real images through its transform.
    """

    name: str
    synthetic: SyntheticSet
    evaluation: RankEvaluation

    @property
    def ema(self) -> bool:
        """Whether its averaged images are the ones that are scored."""
        return self.evaluation.settings.ema and self.synthetic.ema_images is not None

    @property
    def own(self) -> Labels:
        """The kind of its labels, by which it is compared with random images."""
        return "hard" if self.synthetic.labels.ndim == 1 else "soft"

    @property
    def counts(self) -> list[int]:
        """Images of each class, by hard labels."""
        classes = self.evaluation.data.num_classes
        return torch.bincount(hard_labels(self.synthetic.labels), minlength=classes).tolist()

    @property
    def learning_rates(self) -> list[float]:
        """Learning rates to choose from, rising: those of the settings, and the set's own step size."""
        listed, own = set(self.evaluation.settings.learning_rates), self.synthetic.learning_rate
        # Files hold float32, in which 0.1 is another number.
        if own is not None and not any(math.isclose(own, lr, rel_tol=1e-6) for lr in listed):
            listed.add(own)
        return sorted(listed)

    def columns(self) -> dict[str, tuple[Labels, bool]]:
        """Return label kind, and whether batches are augmented, of every column that it has."""
        kinds: dict[str, tuple[Labels, bool]] = {"hard": ("hard", True)}
        if self.own == "soft":
            kinds["soft"] = ("soft", True)
        return {**kinds, "teacher": ("teacher", True), PLAIN: (self.own, False)}

    def trainings(self) -> int:
        """Count networks that are trained, on the set and on random images; shared ones count for each set."""
        settings = self.evaluation.settings
        choosing = min(settings.lr_networks, settings.networks)
        return 2 * len(self.columns()) * (len(self.learning_rates) * choosing + settings.networks - choosing)

    def random_images(self, index: int) -> Images:
        """Draw the random real images that the index-th network of the base line learns."""
        seed = self.evaluation.settings.seed
        return random_images_like(self.evaluation.train, self.counts, seed, "rank", "random images", index)

    def _lessons(self, labels: Labels) -> dict[str, Callable[[int], Lesson]]:
        evaluation = self.evaluation
        images = self.synthetic.chosen(ema=self.ema).to(evaluation.device)
        stored = self.synthetic.training_labels().to(evaluation.device)
        own = Lesson(images, stored if labels == "soft" else hard_labels(stored))

        def on_set(index: int) -> Lesson:
            return own if labels != "teacher" else replace(own, teacher=evaluation.teachers[index])

        def on_random(index: int) -> Lesson:
            drawn = self.random_images(index)
            if labels == "soft":
                return evaluation.soft(drawn, index)
            return Lesson(*drawn, teacher=evaluation.teachers[index] if labels == "teacher" else None)

        return {"set": cache(on_set), "random": cache(on_random)}

    def score(self) -> dict[str, Any]:
        """Train what is left, and return everything that is known of the set; see docs/rank.md."""
        columns: dict[str, Any] = dict.fromkeys(COLUMNS)
        for column, (labels, augmented) in self.columns().items():
            sides = {
                side: self.evaluation.scored(lesson, self.learning_rates, augmented=augmented)
                for side, lesson in self._lessons(labels).items()
            }
            pairs = zip(sides["set"]["each"], sides["random"]["each"], strict=True)
            differences = torch.tensor([ours - random for ours, random in pairs], dtype=torch.float64)
            columns[column] = {
                "labels": labels,
                "augmented": augmented and bool(self.evaluation.augment),
                "teacher_at_evaluation": labels == "teacher",
                **sides,
                "difference": mean_and_std(differences),
            }

        def both(column: str) -> tuple[list[float], list[float]]:
            return columns[column]["set"]["each"], columns[column]["random"]["each"]

        real, one = self.evaluation.real, self.synthetic
        stored, trained_on = one.image_counts
        return {
            **scores(real["each"], columns["hard"]["set"]["each"], both(self.own), both(PLAIN)),
            "method": one.metadata.get("method"),
            "labels": one.label_description,
            "compared_by": self.own,
            "images": "averaged" if self.ema else "last",
            "images_stored": stored,
            "images_trained_on": trained_on,
            "images_per_class": self.counts,
            "teacher_at_evaluation": False,  # of the scores; the column "teacher" has one
            "step_size": one.learning_rate,
            "learning_rates": self.learning_rates,
            "columns": columns,
            "real": real,
            "held_out_seen": held_out_seen(one.metadata.get("dataset"), self.evaluation.data.describe()["dataset"]),
            "fingerprint": self._fingerprint(),
            "transform": one.transform.describe(),
        }

    def _fingerprint(self) -> str:
        own = Lesson(self.synthetic.chosen(ema=self.ema), self.synthetic.training_labels())
        return f"{own.identity['images']}-{own.identity['labels']}"


def _seconds_a_step(evaluation: RankEvaluation, images: Images) -> float:
    """Time SGD steps of one network on one batch."""
    batch = images.take(torch.arange(min(len(images.labels), evaluation.protocol(0.01).batch_size)))
    network = evaluation.fresh.build(0).to(evaluation.device)
    seconds = 0.0
    for epochs in (1, 3):  # the first one warms up
        began = time.perf_counter()
        train_fresh_networks([network], *batch, evaluation.protocol(0.01, epochs=epochs), compile=False)
        if evaluation.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / epochs
    return seconds


def cost(ranked: Iterable[RankedSet]) -> tuple[int, int, float]:
    """Count the trainings of a ranking, and estimate their seconds from a few steps of each size.

    Returns:
        Trainings on sets and random images, trainings on all real images, seconds; each if nothing was finished before.
    """
    small, large, seconds = 0, 0, 0.0
    evaluations: dict[int, RankEvaluation] = {}
    for one in ranked:
        evaluation = evaluations.setdefault(id(one.evaluation), one.evaluation)
        trainings, drawn = one.trainings(), one.random_images(0)
        with_teacher = trainings / len(one.columns()) * (TEACHER_COST - 1)
        steps = evaluation.settings.epochs * -(-len(drawn.labels) // evaluation.protocol(0.01).batch_size)
        seconds += (trainings + with_teacher) * steps * _seconds_a_step(evaluation, drawn)
        small += trainings
    for evaluation in evaluations.values():
        settings = evaluation.settings
        trainings = len(settings.learning_rates) * min(settings.lr_networks, settings.networks) + settings.networks
        count = len(evaluation.data.train.labels) + len(evaluation.data.val.labels)
        steps = evaluation.real_epochs * -(-count // evaluation.protocol(0.01).batch_size)
        seconds += trainings * steps * _seconds_a_step(evaluation, evaluation.train)
        large += trainings
    return small, large, seconds


KIND = "ranking_network"
REAL_EPOCHS = 60


@dataclass
class Lesson:
    """What one network learns.

    Attributes:
        images: (N, C, H, W).
        labels: (N,) classes or (N, K) probabilities.
        teacher: gives the labels of every augmented batch instead; None where the labels above are learned.
    """

    images: Tensor
    labels: Tensor
    teacher: nn.Module | None = None

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """Fingerprints of all that it consists of."""
        teacher = None if self.teacher is None else fingerprint(*self.teacher.state_dict().values())
        return {"images": fingerprint(self.images), "labels": fingerprint(self.labels), "teacher": teacher}


def real_epochs_for(images: int, batch_size: int) -> int:
    """Return epochs over all real images: 60, or as many as make 360 steps.

    Example:
        >>> [real_epochs_for(images, 256) for images in (50_000, 1437, 140)]
        [60, 60, 360]
    """
    return max(REAL_EPOCHS, -(-REAL_STEPS // -(-images // batch_size)))


def random_images_like(train: Images, counts: Sequence[int], *seed: int | str) -> Images:
    """Draw real images at random, class by class.

    Args:
        train: the real images to draw from.
        counts: images of each class, in label order.
        seed: decides which.

    Raises:
        InputError: if a class has fewer images.

    Example:
        >>> real = Images(torch.zeros(5, 1, 1, 1), torch.tensor([1, 0, 1, 0, 1]))
        >>> random_images_like(real, [1, 2], 0).labels
        tensor([0, 1, 1])
    """
    generator, chosen = make_generator(*seed), []
    for label, count in enumerate(counts):
        members = (train.labels == label).nonzero().squeeze(1)
        if count > len(members):
            raise InputError(
                f"a set has {count} images of class {label}, of which there are {len(members)} real ones that are not "
                "held out: no random images can be compared with it"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return train.take(torch.cat(chosen))


class RankEvaluation:
    """Trains and measures networks on the real images as one transform gives them.

    Args:
        data: the real images, set up.
        fresh: the network.
        settings: of the ranking.
        augment: of every batch, where there is augmentation.
        folder: of finished trainings.
        device: where networks are trained.

    Attributes:
        done: is called once for every training, finished earlier or now.
    """

    def __init__(
        self,
        data: DistillationDataModule,
        fresh: FreshNetworks,
        settings: RankSettings,
        augment: Augmentation,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.data, self.fresh, self.settings, self.augment = data, fresh, settings, augment
        self.folder, self.device = folder, device
        self.done: Callable[[], None] = lambda: None
        self._seen: set[str] = set()
        self._parts = PartsOnDevice(data, device)

    @cached_property
    def train(self) -> Images:
        """The real training images that are not held out, on the device."""
        return Images(*(part.to(self.device) for part in self.data.train))

    @cached_property
    def whole(self) -> Images:
        """All real training images, held-out ones included, on the device."""
        pairs = zip(self.data.train, self.data.val, strict=True)
        return Images(*(torch.cat(pair).to(self.device) for pair in pairs))

    @cached_property
    def _whole_lesson(self) -> Lesson:
        return Lesson(*self.whole)

    def protocol(self, lr: float, *, augmented: bool = True, epochs: int | None = None) -> EvaluationProtocol:
        """Return how networks are trained: SGD, as for the published numbers."""
        augment = self.augment if augmented else Augmentation("")
        return EvaluationProtocol(epochs or self.settings.epochs, lr, augment=augment)

    @property
    def real_epochs(self) -> int:
        """Epochs of networks that are trained on all real images."""
        count = len(self.data.train.labels) + len(self.data.val.labels)
        return self.settings.real_epochs or real_epochs_for(count, EvaluationProtocol().batch_size)

    def _name(self, lesson: Lesson, protocol: EvaluationProtocol, index: int) -> tuple[str, dict[str, Any]]:
        what = {
            **lesson.identity,
            "version": minor_version(),
            "data": self.data.describe(),
            "network": self.fresh.describe(),
            "protocol": asdict(protocol),
            "seed": self.settings.seed,
            "index": index,
        }
        text = json.dumps(what, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest(), json.loads(text)

    def trained(self, lesson: Lesson, protocol: EvaluationProtocol, index: int) -> nn.Module:
        """Train a network; those of one index have equal initial weights, batches and augmentation everywhere."""
        network = self.fresh.build(self.settings.seed, "fresh", index).to(self.device)
        losses = None if lesson.teacher is None else IndependentLosses(False, self.device, teacher=lesson.teacher)
        draws = derive_seed(self.settings.seed, "rank", index)
        options: dict[str, Any] = {"compile": False, "indices": [index], "losses": losses}
        train_fresh_networks([network], lesson.images, lesson.labels, protocol, seed=draws, **options)
        return network

    def measured(
        self, lesson: Lesson, protocol: EvaluationProtocol, index: int, *, keep: bool = False
    ) -> dict[str, float]:
        """Return accuracies of a trained network, fractions, "held_out" and "test"; trained once, then read.

        Args:
            lesson: what it learns.
            protocol: how.
            index: which network.
            keep: keep its weights too; see :meth:`network`.
        """
        name, what = self._name(lesson, protocol, index)
        file = self.folder / f"{name}.json"
        found: Any = read_json(file).get("accuracy")
        whole = isinstance(found, dict) and found.keys() == {"held_out", "test"}
        if not whole or (keep and not self._weights(name).is_file()):
            network = self.trained(lesson, protocol, index)
            parts = {"held_out": self._parts("val"), "test": self._parts("test")}
            found = {part: accuracies([network], *images)[0] for part, images in parts.items()}
            if keep:
                write_tensors(self._weights(name), network.state_dict(), kind=KIND, metadata=what)
            write_json(file, {"accuracy": found, "of": what})
        if name not in self._seen:
            self._seen.add(name)
            self.done()
        return dict(found)

    def _weights(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def network(self, lesson: Lesson, protocol: EvaluationProtocol, index: int) -> nn.Module:
        """Read a network that :meth:`measured` kept, in evaluation mode."""
        file = TensorFile(self._weights(self._name(lesson, protocol, index)[0]), kind=KIND)
        network = self.fresh.architecture()
        network.load_state_dict({name: file[name] for name in file.names})
        return network.to(self.device).eval()

    def choose(
        self, lesson: Callable[[int], Lesson], lrs: Sequence[float], protocol: Callable[[float], EvaluationProtocol]
    ) -> dict[str, Any]:
        """Choose a learning rate by the mean accuracy of a few networks on held-out training images.

        Returns:
            "lr", the first of the best, and "held_out", that accuracy by learning rate.
        """
        count = min(self.settings.lr_networks, self.settings.networks)
        held_out = {
            lr: sum(self.measured(lesson(index), protocol(lr), index)["held_out"] for index in range(count)) / count
            for lr in lrs
        }
        return {"lr": max(held_out, key=held_out.__getitem__), "held_out": {str(lr): a for lr, a in held_out.items()}}

    def scored(
        self, lesson: Callable[[int], Lesson], lrs: Sequence[float], *, augmented: bool = True
    ) -> dict[str, Any]:
        """Choose a learning rate on held-out images, then measure all networks on the test images.

        Args:
            lesson: what network i learns.
            lrs: learning rates to choose from.
            augmented: whether batches are.

        Returns:
            "lr", "held_out", "accuracy" (mean, std, n) and "each", fractions, after the last epoch.
        """

        def protocol(lr: float) -> EvaluationProtocol:
            return self.protocol(lr, augmented=augmented)

        chosen = self.choose(lesson, lrs, protocol)
        indices = range(self.settings.networks)
        each = [self.measured(lesson(index), protocol(chosen["lr"]), index)["test"] for index in indices]
        return {**chosen, "accuracy": mean_and_std(torch.tensor(each, dtype=torch.float64)), "each": each}

    @cached_property
    def real(self) -> dict[str, Any]:
        """Accuracies of networks that are trained on all real images, as of :meth:`scored`, and "epochs".

        The learning rate is chosen by networks that have not seen the held-out images; the networks that are measured,
        and are the teachers, have.
        """
        epochs, lrs = self.real_epochs, sorted(self.settings.learning_rates)

        def protocol(lr: float) -> EvaluationProtocol:
            return self.protocol(lr, epochs=epochs)

        part, whole = Lesson(*self.train), self._whole_lesson
        chosen = self.choose(lambda index: part, lrs, protocol)
        indices = range(self.settings.networks)
        each = [self.measured(whole, protocol(chosen["lr"]), index, keep=True)["test"] for index in indices]
        summary = mean_and_std(torch.tensor(each, dtype=torch.float64))
        return {**chosen, "epochs": epochs, "images": len(whole.labels), "accuracy": summary, "each": each}

    @cached_property
    def teachers(self) -> list[nn.Module]:
        """The networks that were trained on all real images; network i of anything is taught by the i-th."""
        protocol = self.protocol(self.real["lr"], epochs=self.real_epochs)
        return [self.network(self._whole_lesson, protocol, index) for index in range(self.settings.networks)]

    def soft(self, images: Images, index: int) -> Lesson:
        """Return images with the labels that the index-th teacher gives them as they are."""
        return Lesson(images.images, class_probabilities(self.teachers[index], images.images))


NOTES = (
    "Scores are fractions, mean ± population standard deviation over networks; sets are in the order of their LRS.",
    "HLR: accuracy that the set with hard labels lacks of that of all real images; lower is better.",
    "IOR: accuracy gained over as many random real images of each class, with labels of the same kind.",
    "LRS of HLR and IOR, ARS of IOR with and without augmentation: in [0, 1]; 0.269 is neither gained nor lost.",
    "Accuracies are on the test images after the last epoch, in %: the set / random real images.",
    "Learning rates, in brackets, are chosen on held-out training images, for each by itself.",
    "Teacher: its labels of every augmented batch, for the set and for random images alike.",
)


def in_order(results: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return names and results of the sets, the highest label-robust score first.

    Example:
        >>> [name for name, _ in in_order({"sets": {n: {"lrs": {"mean": v}} for n, v in [("a", 0.2), ("b", 0.3)]}})]
        ['b', 'a']
    """
    return sorted(results["sets"].items(), key=lambda item: -float(item[1]["lrs"]["mean"]))


def _score(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f} ± {value['std']:.3f}"


def _column(column: Mapping[str, Any] | None) -> str:
    if column is None:
        return "-"
    return " / ".join(f"{per_cent(column[side]['accuracy'])} ({column[side]['lr']:.3g})" for side in ("set", "random"))


def short_names(names: list[str]) -> dict[str, str]:
    """Name sets by the ends of their paths, as short as they differ.

    Example:
        >>> short_names(["runs/a/set.safetensors", "runs/b/set.safetensors"])
        {'runs/a/set.safetensors': 'a/set.safetensors', 'runs/b/set.safetensors': 'b/set.safetensors'}
    """
    parts = {name: name.replace("\\", "/").split("/") for name in names}
    for length in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(own[-length:]) for name, own in parts.items()}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


def markdown(results: Mapping[str, Any]) -> str:
    """Write the content of ``rank.md``."""
    ranked = in_order(results)
    scores = [["set", "labels", "images", *(name.upper() for name in SCORES), "networks"]]
    measured = [["set", *COLUMNS, "all real images"]]
    for name, one in ranked:
        cells = [_score(one[score]) for score in SCORES]
        scores.append([name, one["labels"], str(one["images_trained_on"]), *cells, str(one["lrs"]["n"])])
        real = f"{per_cent(one['real']['accuracy'])} ({one['real']['lr']:.3g})"
        measured.append([name, *(_column(one["columns"][column]) for column in COLUMNS), real])
    seen = [name for name, one in ranked if one["held_out_seen"]]
    notes = [*NOTES, *([f"Distilled from images that are held out here too: {', '.join(seen)}."] if seen else [])]
    below = "".join(f"- {note}\n" for note in notes)
    return f"{markdown_table(scores)}\n\n{markdown_table(measured)}\n\n{below}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy over images kept per class: sets, random real images beside them, and all real images as lines.

    Args:
        results: the content of ``rank.json``.
        path: of the PNG.
    """
    # Not pyplot, which keeps figures in a global state; not at the top, because it is slow.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = short_names(list(results["sets"]))
    marks = {"hard": "o", "soft": "s", "teacher": "D"}
    lines: dict[str, dict[str, Any]] = {}
    points = in_order(results)
    for index, (name, one) in enumerate(points):
        kept = one["images_trained_on"] / len(one["images_per_class"])
        for offset, (kind, mark) in enumerate(marks.items()):
            if (column := one["columns"][kind]) is None:
                continue
            own = kind == one["compared_by"]
            # Beside each other where sets are of one size.
            x = kept * 1.02 ** (index - (len(points) - 1) / 2) * 1.05 ** (offset - 1)
            for side, colour in (("set", f"C{index % 10}"), ("random", "0.6")):
                found = column[side]["accuracy"]
                style: dict[str, Any] = {"color": colour, "marker": mark, "capsize": 2, "linestyle": "none"}
                style |= {"markersize": 5} if own else {"markersize": 5, "markerfacecolor": "none"}
                style |= {"label": f"{names[name]}, {one['labels']} labels"} if own and side == "set" else {}
                axes.errorbar(x, 100 * found["mean"], yerr=100 * found["std"], **style)
        lines[str(one["transform"])] = one["real"]
    for real in lines.values():
        axes.axhline(100 * real["accuracy"]["mean"], color="black", linestyle="--", linewidth=0.8)
    axes.errorbar([], [], color="0.6", marker="o", linestyle="none", label="random real images, each beside its set")
    axes.plot([], [], color="black", linestyle="--", linewidth=0.8, label="all real images")
    axes.set_xscale("log")
    axes.set(xlabel="images kept per class", ylabel="test accuracy, %")
    sizes = sorted({one["images_trained_on"] / len(one["images_per_class"]) for _, one in points})
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_title("circles: hard labels, squares: soft, diamonds: by a teacher; filled: the set's own", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center")  # a place among the points may not be free
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


MEASURED_ON = "test images, after the last epoch; learning rates are chosen on held-out training images"


def prepare(files: Sequence[str], settings: RankSettings, data: RankData) -> list[RankedSet]:
    """Read everything, and refuse what cannot be ranked, before anything is trained.

    Args:
        files: the sets.
        settings: of the ranking.
        data: where the real images are.

    Raises:
        InputError: for files, sets or data that do not fit.
    """
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is not a folder; give another --out")
    sets = read_sets(files)
    augment = choose_augmentation(sets, settings)
    real = read_data(sets, data)
    fresh = choose_network(sets, settings, next(iter(real.values())).description().shape)
    folder = out / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluations: dict[int, RankEvaluation] = {}
    ranked = []
    for name, synthetic in sets.items():
        source = real[name]
        made = RankEvaluation(source, fresh, settings, augment, folder, device)
        ranked.append(RankedSet(name, synthetic, evaluations.setdefault(id(source), made)))
        ranked[-1].random_images(0)  # refuses a set that has more images of a class than there are real ones
    return ranked


def rank_sets(ranked: Sequence[RankedSet], *, progress: int | None = None) -> dict[str, Any]:
    """Train what is left, and return the content of ``rank.json``.

    Args:
        ranked: from :func:`prepare`.
        progress: show a bar over at most so many trainings; None shows none.
    """
    evaluations = {id(one.evaluation): one.evaluation for one in ranked}.values()
    found = {}
    with tqdm(total=progress, unit="training", dynamic_ncols=True, disable=progress is None) as bar:
        for evaluation in evaluations:
            evaluation.done = bar.update
        for one in ranked:
            bar.set_description(one.name)
            found[one.name] = one.score()
    first = ranked[0].evaluation
    settings = {key: value for key, value in asdict(first.settings).items() if key not in ("out", "threads")}
    return {
        "sets": found,
        "settings": {
            **settings,
            "real_epochs": first.real_epochs,
            "network": first.fresh.describe(),
            "augment": first.augment.plain(),
            "protocol": {
                key: value for key, value in asdict(first.protocol(1.0)).items() if key not in ("lr", "augment")
            },
            "dataset": first.data.describe()["dataset"],
        },
        "seeds": [derive_seed(first.settings.seed, "fresh", index) for index in range(first.settings.networks)],
        "measured_on": MEASURED_ON,
        "device": first.device.type,
        "versions": versions(),
    }


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd rank``."""
    parser = command_parser(RankSettings, "rank")
    parser.add_argument("sets", nargs="+", metavar="SET", help="files of synthetic sets")
    parser.add_class_arguments(RankData, "data")
    parsed = parser.parse_args(arguments).as_dict()
    settings = RankSettings(**{option.name: parsed[option.name] for option in fields(RankSettings)})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")
    ranked = prepare(parsed["sets"], settings, RankData(**parsed["data"]))
    with held(Path(settings.out)):
        _run(ranked, Path(settings.out))


def _run(ranked: Sequence[RankedSet], out: Path) -> None:
    """Rank sets, and write what was found."""
    settings = ranked[0].evaluation.settings
    small, large, seconds = cost(ranked)
    first = ranked[0].evaluation
    print(
        f"at most {small} trainings of {settings.epochs} epochs on sets and random images, and {large} of "
        f"{first.real_epochs} epochs on all real images: about {seconds / 60:.1f} min on this machine; those in "
        f"{first.folder} are not repeated",
        flush=True,
    )
    results = rank_sets(ranked, progress=small + large)
    table = markdown(results)
    write_json(out / "rank.json", results)
    with replacing(out / "rank.md") as part:
        part.write_text(table, encoding="utf-8")
    draw(results, out / "rank.png")
    print(f"\n{table}\nbest by LRS: {in_order(results)[0][0]}\nresults   {out}")
