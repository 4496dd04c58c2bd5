"""``ftd rank``: score sets by DD-Ranking's four scores (Li et al., 2025), against random and all real images."""

from __future__ import annotations

import inspect
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.command_line import command_parser
from ftd_lightning.contracts import Images
from ftd_lightning.core.evaluation import (
    REAL_STEPS,
    EvaluationProtocol,
    accuracies,
    mean_and_std,
    train_fresh_networks,
)
from ftd_lightning.core.networks import NetworkFactory
from ftd_lightning.core.results import held_out_seen
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.coresets import class_probabilities
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, replacing, versions, write_json, write_tensors
from ftd_lightning.files.schema import markdown_table, per_cent
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.models.description import same_network
from ftd_lightning.models.registry import recorded_network
from ftd_lightning.shipped_configs import with_home
from ftd_lightning.studies.fits import held, kept, minor_version
from ftd_lightning.studies.tables import BUDGET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from ftd_lightning.contracts import ImageShape


SCORES = ("hlr", "ior", "lrs", "ars")
PLAIN = "not augmented"
COLUMNS = ("hard", "soft", PLAIN)
SIDES = ("set", "random")
KIND = "ranking_network"
SPLIT = {"val_fraction", "max_per_class", "seed"}  # may differ between sets
CHOICE = ("image_size", "test_fraction", "classes", "max_per_class", "seed")
DATA_OPTIONS = {"root", "dataset", *CHOICE, *SPLIT, "download", "cache_dir", "skip_broken"}


@dataclass(frozen=True)
class RankSettings:
    """Score synthetic sets against random real images and all real images, by DD-Ranking's four scores.

    Options --data.* that are not given are those that the sets agree on, or else the defaults below.

    Args:
        out: folder of rank.json, rank.md, and of finished trainings (evaluations).
        networks: trained on everything that is compared; each mean and standard deviation is over them.
        epochs: over a set, and over as many random real images.
        real_epochs: over all real images; null: 60, or more where that is less than 360 steps.
        learning_rates: to choose from on held-out training images, beside the set's own step size.
        lr_networks: how many of the networks choose a learning rate by their mean held-out accuracy.
        network: a name or import path; null takes that of the sets.
        network_options: its arguments, where ``network`` is given.
        augment: DSA strategy, "" for none; null takes that of the sets that have one.
        ema: use the averaged images of sets that have them.
        seed: draws random real images, initialisations, batches and augmentation.
    """

    out: str = "runs/rank"
    networks: int = 5
    epochs: int = 1000
    real_epochs: int | None = None
    learning_rates: Sequence[float] = (0.001, 0.01, 0.1)
    lr_networks: int = 2
    network: str | None = None
    network_options: dict[str, Any] | None = None
    augment: str | None = None
    ema: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(RankSettings, vars(self))
        if self.network_options is not None and self.network is None:
            raise InputError("RankSettings: network_options are those of a network: give network as well")


def normalised(value: Tensor) -> Tensor:
    """Map weighted differences of accuracies in [-1, 1] to scores in [0, 1]."""
    return (value.exp() - math.exp(-1)) / (math.e - math.exp(-1))


def scores(real: Sequence[float], columns: Mapping[str, Any], own: str) -> dict[str, dict[str, float | int]]:
    """Compute the four scores of a set, network by network, so that networks of one seed are compared.

    Hard-label recovery HLR = real - hard, in [-1, 1], lower is better. Improvement over random IOR = own - random, in
    [-1, 1], higher is better. With :func:`normalised` n, in [0, 1], higher is better: the label-robust score
    LRS = n(IOR / 2 - HLR / 2), the augmentation-robust score ARS = n(IOR / 2 + IOR without augmentation / 2).

    Args:
        real: accuracies of networks trained on all real images, fractions.
        columns: accuracies by column, side and "each".
        own: the column of the set's kind of labels, "hard" or "soft".
    """

    def each(column: str, side: str) -> Tensor:
        return torch.tensor(columns[column][side]["each"], dtype=torch.float64)

    hlr = torch.tensor(real, dtype=torch.float64) - each("hard", "set")
    ior, without = (each(column, "set") - each(column, "random") for column in (own, PLAIN))
    lrs, ars = normalised(0.5 * ior - 0.5 * hlr), normalised(0.5 * ior + 0.5 * without)
    return {name: mean_and_std(values) for name, values in zip(SCORES, (hlr, ior, lrs, ars), strict=True)}


@dataclass
class RankedSet:
    """One set of a ranking, and all real images (``whole``) through its transform, to train and measure networks on."""

    name: str
    synthetic: SyntheticSet
    data: DistillationDataModule
    whole: Images
    fresh: NetworkFactory
    settings: RankSettings
    augment: Augmentation

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = Path(self.settings.out) / "evaluations"
        # Averaged images where they are asked for.
        ema = self.settings.ema and self.synthetic.ema_images is not None
        self.own = Images(self.synthetic.chosen(ema=ema), self.synthetic.training_labels())
        self.kind = "hard" if self.own.labels.ndim == 1 else "soft"
        self.hard_labels = self.own.labels if self.kind == "hard" else self.own.labels.argmax(1)
        self.counts: list[int] = self.hard_labels.bincount(minlength=self.data.num_classes).tolist()

    @property
    def columns(self) -> dict[str, str]:
        """Its columns, and the kind of labels in each."""
        return {"hard": "hard", self.kind: self.kind, PLAIN: self.kind}

    @property
    def learning_rates(self) -> list[float]:
        """Learning rates to choose from, rising: those of the settings, and the set's own step size."""
        listed, own = self.settings.learning_rates, self.synthetic.learning_rate
        # Files hold float32, in which 0.1 is another number.
        extra = [] if own is None or any(math.isclose(own, lr, rel_tol=1e-6) for lr in listed) else [own]
        return sorted({*listed, *extra})

    def random_images(self, index: int) -> Images:
        """Draw as many real images of each class, none of them held out, for the index-th network to learn."""
        train, chosen = self.data.train, []
        generator = make_generator(self.settings.seed, "rank", "random images", index)
        for label, count in enumerate(self.counts):
            members = (train.labels == label).nonzero().squeeze(1)
            if count > len(members):
                raise InputError(f"{self.name}: has {count} images of class {label}, real ones are {len(members)}")
            chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
        return train.take(torch.cat(chosen))

    def lessons(self, labels: str, side: str) -> list[Images]:
        """Return the images that each network learns, of the set or random ones, with labels of a kind."""
        count = self.settings.networks
        if side == "set":
            return [Images(self.own.images, self.own.labels if labels == "soft" else self.hard_labels)] * count
        drawn = [self.random_images(index) for index in range(count)]
        if labels == "hard":
            return drawn
        pairs = zip(drawn, self.teachers, strict=True)
        return [Images(one.images, class_probabilities(teacher, one.images)) for one, teacher in pairs]

    def protocol(self, lr: float, *, augmented: bool = True, real: bool = False) -> EvaluationProtocol:
        """Return how networks are trained: SGD, as for the published numbers."""
        protocol = EvaluationProtocol(self.settings.epochs, lr, augment=self.augment if augmented else Augmentation(""))
        if not real:
            return protocol
        steps = -(-len(self.whole.labels) // protocol.batch_size)
        return replace(protocol, epochs=self.settings.real_epochs or max(60, -(-REAL_STEPS // steps)))

    def measured(self, lesson: Images, protocol: EvaluationProtocol, index: int) -> dict[str, Any]:
        """Return accuracies of a trained network, fractions, "val" (held out) and "test"; trained once, then read.

        Networks of one index have equal initial weights, batches and augmentation everywhere.
        """
        seed = self.settings.seed
        identity = {
            "lesson": fingerprint(*lesson),
            "version": minor_version(),
            "data": self.data.describe(),
            "network": [self.fresh.describe(), self.fresh.backbone],
            "protocol": asdict(protocol),
            "seed": seed,
            "index": index,
        }

        def make() -> dict[str, Any]:
            network = self.fresh.build(seed, "fresh", index).to(self.device)
            images, labels = (tensor.to(self.device) for tensor in lesson)
            draws = derive_seed(seed, "rank", index)
            train_fresh_networks([network], images, labels, protocol, seed=draws, compile=False, indices=[index])
            parts = {"val": self.data.val, "test": self.data.test}
            found: dict[str, Any] = {name: accuracies([network], *part)[0] for name, part in parts.items()}
            if lesson is self.whole:
                weights = network.state_dict()
                found["weights"] = f"{fingerprint(*weights.values())}.safetensors"
                write_tensors(self.folder / found["weights"], weights, kind=KIND, metadata={})
            return found

        return kept(self.folder, identity, make)

    def scored(
        self, protocols: Sequence[EvaluationProtocol], choosing: Sequence[Images], final: Sequence[Images] | None = None
    ) -> dict[str, Any]:
        """Choose a learning rate by the mean held-out accuracy of a few networks, then measure all on test images.

        Of equally good learning rates the first is taken. ``final`` are the lessons of the networks that are measured.
        """
        few = list(enumerate(choosing))[: self.settings.lr_networks]
        held_out = [
            sum(self.measured(lesson, protocol, index)["val"] for index, lesson in few) / len(few)
            for protocol in protocols
        ]
        chosen = protocols[held_out.index(max(held_out))]
        each = [self.measured(lesson, chosen, index)["test"] for index, lesson in enumerate(final or choosing)]
        found = {str(protocol.lr): value for protocol, value in zip(protocols, held_out, strict=True)}
        return {"lr": chosen.lr, "held_out": found, "accuracy": _summary(each), "each": each}

    @cached_property
    def real(self) -> dict[str, Any]:
        """Accuracies of networks that are trained on all real images: as of :meth:`scored`, "epochs" and "images".

        Networks that have not seen the held-out images choose the learning rate; those that are measured have.
        """
        protocols = [self.protocol(lr, real=True) for lr in sorted(self.settings.learning_rates)]
        count = self.settings.networks
        found = self.scored(protocols, [self.data.train] * count, [self.whole] * count)
        return {**found, "epochs": protocols[0].epochs, "images": len(self.whole.labels)}

    @cached_property
    def teachers(self) -> list[nn.Module]:
        """The networks that were trained on all real images; the i-th labels the random images of network i."""
        protocol = self.protocol(self.real["lr"], real=True)
        networks = [self.fresh.architecture() for _ in range(self.settings.networks)]
        for index, network in enumerate(networks):
            file = TensorFile(self.folder / self.measured(self.whole, protocol, index)["weights"], kind=KIND)
            network.load_state_dict(file.with_prefix(""))
        return [network.to(self.device).eval() for network in networks]

    def score(self, bar: tqdm[Any]) -> dict[str, Any]:
        """Train what is left, and return everything that is known of the set; see docs/rank.md."""
        columns: dict[str, Any] = dict.fromkeys(COLUMNS)
        for column, labels in self.columns.items():
            protocols = [self.protocol(lr, augmented=column != PLAIN) for lr in self.learning_rates]
            sides = {}
            for side in SIDES:
                sides[side] = self.scored(protocols, self.lessons(labels, side))
                bar.update()
            differences = [a - b for a, b in zip(*(found["each"] for found in sides.values()), strict=True)]
            columns[column] = {"labels": labels, **sides, "difference": _summary(differences)}
        one, protocol = self.synthetic, self.protocol(1.0)
        return {
            **scores(self.real["each"], columns, self.kind),
            "method": one.metadata.get("method"),
            "labels": one.label_description,
            "compared_by": self.kind,
            "images": "averaged" if self.own.images is one.ema_images else "last",
            **one.budget(),
            "evaluation_steps": protocol.epochs * -(-len(one.images) // protocol.batch_size),
            "images_per_class": self.counts,
            "step_size": one.learning_rate,
            "learning_rates": self.learning_rates,
            "columns": columns,
            "real": self.real,
            "held_out_seen": held_out_seen(one.metadata.get("dataset"), self.data.describe()["dataset"]),
            "fingerprint": "-".join(map(fingerprint, self.own)),
            "transform": one.transform.describe(),
        }


def _summary(values: Sequence[float]) -> dict[str, float | int]:
    return mean_and_std(torch.tensor(values, dtype=torch.float64))


def read_data(
    sets: Mapping[str, SyntheticSet], given: Mapping[str, Any]
) -> dict[str, tuple[DistillationDataModule, Images]]:
    """Read the real images through the transform of each set, or refuse the set; sets of one transform share them."""
    described = [one.metadata.get("dataset") or {} for one in sets.values()]
    described = [one if isinstance(one, dict) else {"name": one} for one in described]  # a name alone
    recorded = [one for one in described if one] or [{}]
    agreed = {key: value for key, value in recorded[0].items() if all(one.get(key) == value for one in recorded)}
    options: dict[str, Any] = {key: agreed[key] for key in CHOICE if key in agreed}
    options |= {"val_fraction": agreed.get("val_fraction") or 0.1, "dataset": recorded[0].get("name"), **given}
    if options["dataset"] is None:
        raise InputError(f"{next(iter(sets))}: does not name its data set: give --data.dataset")
    by_transform: dict[str, tuple[DistillationDataModule, Images]] = {}
    found = {}
    for (name, own), one in zip(sets.items(), described, strict=True):
        transform = json.dumps([own.transform.describe(), own.class_names, own.images.shape[1:]])
        if transform not in by_transform:
            data = DistillationDataModule(synthetic=str(Path(name).resolve()), **options)  # "random" is no file
            if not len(data.val.labels):
                raise InputError("ftd rank chooses learning rates on held-out images: give --data.val_fraction above 0")
            by_transform[transform] = data, Images(*map(torch.cat, zip(data.train, data.val, strict=True)))
        found[name] = data, _ = by_transform[transform]
        here = data.description().dataset
        if differ := [key for key in (here.keys() & one.keys()) - SPLIT if here[key] != one[key]]:
            raise InputError(f"{name}: was made of other images than those here (another {', '.join(differ)})")
    return found


def agreed(named: Mapping[str, Any], option: str, same: Callable[[Any, Any], bool]) -> tuple[str, Any]:
    """Return the first set that names a network or an augmentation, and that; refuse sets that name another."""
    (first, chosen), *others = named.items()
    for name, other in others:
        if not same(chosen, other):
            raise InputError(f"{name}: names another {option} than {first}: give --{option} for all")
    return first, chosen


def choose_network(sets: Mapping[str, SyntheticSet], settings: RankSettings, shape: ImageShape) -> NetworkFactory:
    """Return the network to score by: the given one, or that of the sets, which have to agree."""
    network, options = settings.network, settings.network_options
    if network is None:
        named = {name: one.metadata["network"] for name, one in sets.items() if "network" in one.metadata}
        if not named:
            raise InputError(f"{next(iter(sets))}: does not name its network: give --network")
        images = shape._asdict()
        first, chosen = agreed(named, "network", lambda a, b: same_network({**a, **images}, {**b, **images}))
        network, options = recorded_network(chosen, first, "give --network")
    return NetworkFactory(network, options, shape)


def prepare(files: Sequence[str], settings: RankSettings, data: Mapping[str, Any]) -> list[RankedSet]:
    """Read sets and real images, of ``data`` before the sets' own options; refuse early what cannot be ranked."""
    sets = {name: SyntheticSet.load(name) for name in files}
    augment = Augmentation() if settings.augment is None else Augmentation(settings.augment)
    named = {name: Augmentation.of(one.metadata.get("augmentation") or "") for name, one in sets.items()}
    if settings.augment is None and any(named.values()):
        _, augment = agreed({name: own for name, own in named.items() if own}, "augment", operator.eq)
    real = read_data(sets, data)
    fresh = choose_network(sets, settings, real[files[0]][0].description().shape)
    ranked = [RankedSet(name, one, *real[name], fresh, settings, augment) for name, one in sets.items()]
    for one in ranked:
        one.random_images(0)  # refuses more images of a class than there are real ones
    return ranked


def rank_sets(ranked: Sequence[RankedSet], *, progress: bool = False) -> dict[str, Any]:
    """Train what is left, and return the content of ``rank.json``."""
    found, first = {}, ranked[0]
    total = sum(len(SIDES) * len(one.columns) for one in ranked)
    with tqdm(total=total, unit="column", dynamic_ncols=True, disable=not progress) as bar:
        for one in ranked:
            bar.set_description(one.name)
            found[one.name] = one.score(bar)
    settings = {key: value for key, value in asdict(first.settings).items() if key != "out"}
    protocol = {key: value for key, value in asdict(first.protocol(1.0)).items() if key not in ("lr", "augment")}
    resolved = {"real_epochs": first.real["epochs"], "network": first.fresh.describe(), "protocol": protocol}
    resolved |= {"augment": first.augment.plain(), "dataset": first.data.describe()["dataset"]}
    return {
        "sets": found,
        "settings": {**settings, **resolved},
        "seeds": [derive_seed(first.settings.seed, "fresh", index) for index in range(first.settings.networks)],
        "measured_on": "test images, after the last epoch; learning rates are chosen on held-out training images",
        "device": first.device.type,
        "versions": versions(),
    }


NOTES = """
- Scores: fractions, mean ± population standard deviation over networks; sets are in the order of their LRS. HLR is
  better when lower; LRS and ARS are in [0, 1], 0.269 is neither gained nor lost.
- Accuracies: on the test images after the last epoch, in %, the set / random real images; in brackets the learning
  rate, chosen on held-out training images.
"""


def in_order(results: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return names and results of the sets, the highest label-robust score first."""
    return sorted(results["sets"].items(), key=lambda item: -float(item[1]["lrs"]["mean"]))


def markdown(results: Mapping[str, Any]) -> str:
    """Write the content of ``rank.md``."""
    ranked = in_order(results)
    budget = BUDGET if any(one.get("decoder") for _, one in ranked) else {}
    scores = [["set", "labels", "images", *budget.values(), *(name.upper() for name in SCORES), "networks"]]
    measured = [["set", *COLUMNS, "all real images"]]

    def cell(found: Mapping[str, Any]) -> str:
        return f"{per_cent(found['accuracy'])} ({found['lr']:.3g})"

    for name, one in ranked:
        values = [f"{one[score]['mean']:.3f} ± {one[score]['std']:.3f}" for score in SCORES]
        stored = [f"{one[key]:,}" for key in budget]
        scores.append([name, one["labels"], str(one["images_trained_on"]), *stored, *values, str(one["lrs"]["n"])])
        columns = [one["columns"][name] for name in COLUMNS]
        cells = [" / ".join(cell(column[side]) for side in SIDES) if column else "-" for column in columns]
        measured.append([name, *cells, cell(one["real"])])
    seen = ", ".join(name for name, one in ranked if one["held_out_seen"])
    seen = f"- Distilled from images that are held out here too: {seen}.\n" if seen else ""
    return f"{markdown_table(scores)}\n\n{markdown_table(measured)}\n{NOTES}{seen}"


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd rank``."""
    parser = command_parser(RankSettings, "rank")
    parser.add_argument("sets", nargs="+", metavar="SET", help="files of synthetic sets")
    skipped = inspect.signature(DistillationDataModule).parameters.keys() - DATA_OPTIONS
    parser.add_class_arguments(DistillationDataModule, "data", skip=skipped)
    given = with_home(parser.parse_args(arguments, defaults=False).as_dict())
    files, data = given.pop("sets"), given.pop("data", {})
    settings = RankSettings(**given)
    out = Path(settings.out)
    torch.set_float32_matmul_precision("high")
    ranked = prepare(files, settings, data)
    with held(out):
        results = rank_sets(ranked, progress=True)
        table = markdown(results)
        write_json(out / "rank.json", results)
        with replacing(out / "rank.md") as part:
            part.write_text(table, encoding="utf-8")
    print(f"\n{table}\nbest by LRS: {in_order(results)[0][0]}\nresults   {out}")
