"""Architecture search with a synthetic set as proxy (Sec. 4.4, Table 5): the space, a measurement, the correlation."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from jsonargparse import ArgumentParser
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.regression import spearman_corrcoef
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import Images
from ftd_lightning.core.evaluation import EvaluationProtocol, accuracy, mean_and_std, train_fresh_networks
from ftd_lightning.core.networks import FreshNetworks
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import fingerprint, read_json, replacing, versions, write_json
from ftd_lightning.functional.augment import STRATEGY, Augmentation
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.models.convnet import Activation, Pooling
from ftd_lightning.models.layers import Norm
from ftd_lightning.shipped_configs import with_config_files
from ftd_lightning.studies.fits import held, minor_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ftd_lightning.contracts import DataSource


DEPTHS, WIDTHS = (1, 2, 3, 4), (32, 64, 128, 256)
TOPS = (5, 10, 20)


class Architecture(NamedTuple):
    """A ConvNet of the space."""

    depth: int
    width: int
    activation: str
    norm: str
    pooling: str

    @property
    def name(self) -> str:
        """Its options, joined by "-"."""
        return "-".join(map(str, self))


def search_space(depths: Sequence[int] = DEPTHS, widths: Sequence[int] = WIDTHS) -> list[Architecture]:
    """List the ConvNets of Table 5: depth x width x 3 activations x 5 norms x 3 poolings, 720 in all.

    Example:
        >>> len(search_space()), search_space()[0].name
        (720, '1-32-sigmoid-none-none')
    """
    choices = (get_args(kind) for kind in (Activation, Norm, Pooling))
    return [Architecture(*options) for options in itertools.product(depths, widths, *choices)]


def sample_architectures(space: Sequence[Architecture], count: int | None, *, seed: int) -> list[Architecture]:
    """Draw some without replacement, in the space's order; None takes all. A smaller draw is part of a larger one.

    Raises:
        InputError: for more than there are, or fewer than 2, which have no rank.

    Example:
        >>> len(sample_architectures(search_space(), 36, seed=0))
        36
    """
    if count is None:
        return list(space)
    if not 2 <= count <= len(space):
        raise InputError(f"{count} architectures are asked for, the space has {len(space)}: ask for 2 to {len(space)}")
    drawn = torch.randperm(len(space), generator=make_generator(seed, "architectures"))[:count]
    return [space[index] for index in sorted(drawn.tolist())]


def training_flops(network: nn.Module, image: Tensor) -> int:
    """Count the floating-point operations that training takes for one image: three forward passes.

    Args:
        network: any.
        image: (1, C, H, W).

    Example:
        >>> import torch
        >>> training_flops(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))
        48
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return 3 * int(counter.get_total_flops())


def rank_correlations(
    proxy: Sequence[float], real: Sequence[float], *, tops: Sequence[int] = TOPS
) -> dict[str, float | None]:
    """Correlate two rankings of the same architectures (Spearman), over the best ones and over all.

    Convention: the top k are the k best *by the real data*, as the paper's question is how well the proxy orders good
    architectures; the paper does not say whose top it takes. Equal accuracies share their mean rank.

    Args:
        proxy: accuracy of each when trained on the synthetic set.
        real: accuracy of each when trained on real images.
        tops: values of k; those above the number of architectures are left out.

    Returns:
        {"top 5": .., "all": ..}, in [-1, 1]; None where all accuracies of one side are equal.

    Example:
        >>> correlations = rank_correlations([0.1, 0.3, 0.2, 0.4], [0.5, 0.6, 0.7, 0.8], tops=[2])
        >>> {top: round(value, 3) for top, value in correlations.items()}
        {'top 2': 1.0, 'all': 0.8}
    """
    ours, theirs = torch.tensor(proxy, dtype=torch.float64), torch.tensor(real, dtype=torch.float64)
    best = theirs.argsort(descending=True, stable=True)
    counts = {f"top {k}": k for k in tops if k < len(best)} | {"all": len(best)}
    result: dict[str, float | None] = {}
    for name, count in counts.items():
        a, b = ours[best[:count]], theirs[best[:count]]
        tied = bool((a == a[0]).all() or (b == b[0]).all())
        result[name] = None if tied else float(spearman_corrcoef(a, b))
    return result


def measure_architecture(
    architecture: Architecture,
    data: DataSource,
    images: Images,
    protocol: EvaluationProtocol,
    *,
    side: str,
    networks: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train networks of one architecture together on images and measure them on the test images.

    Args:
        architecture: what to build.
        data: set up; gives shapes and test images.
        images: synthetic or real ones to train on, on the device.
        protocol: of the training.
        side: name of what they are, "proxy" or "real": both draw initialisations and augmentation of their own, so that
            chance does not correlate them.
        networks: how many, trained together.
        seed: decides initialisations, batches and augmentation.
        device: where to train.

    Returns:
        {"mean", "std", "n", "seconds"}.
    """
    began = time.perf_counter()
    fresh = FreshNetworks("convnet", architecture._asdict(), data.description().shape)
    built = [fresh.build(seed, side, architecture.name, index).to(device) for index in range(networks)]
    draws = derive_seed(seed, side, architecture.name, "training")
    # Not compiled: each architecture would be compiled anew for a few hundred steps.
    train_fresh_networks(built, *images, protocol, seed=draws, compile=False)
    test = [part.to(device) for part in data.part("test")]
    accuracies = torch.tensor([accuracy(network, *test) for network in built])
    return {**mean_and_std(accuracies), "seconds": round(time.perf_counter() - began, 3)}


def nas_table(results: Mapping[str, Any]) -> str:
    """Lay correlations and times out as a Markdown table.

    Example:
        >>> print(nas_table({"correlation": {"all": 0.5}, "minutes": {"proxy": 2.0, "real": 9.0}, "compared": 4}))
        | trained on | architectures | all | minutes |
        | --- | --- | --- | --- |
        | synthetic set | 4 | 0.50 | 2.0 |
        | real images | 4 | 1.00 | 9.0 |
        <BLANKLINE>
        Accuracy on the test images makes both rankings, as in the paper; top k: the k best by real images.
    """
    tops = list(results["correlation"])
    lines = [["trained on", "architectures", *tops, "minutes"], ["---"] * (len(tops) + 3)]
    for name, side, values in (
        ("synthetic set", "proxy", list(results["correlation"].values())),
        ("real images", "real", [1.0] * len(tops)),
    ):
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append([name, str(results["compared"]), *cells, f"{results['minutes'][side]:.1f}"])
    note = "Accuracy on the test images makes both rankings, as in the paper; top k: the k best by real images."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


SIDES = ("proxy", "real")
PROBES = 5  # architectures whose speed the estimate of the time stands on


@dataclass(frozen=True)
class SearchSettings:
    """What an architecture search consists of.

    Args:
        out: folder of nas.json, nas.md and nas.png.
        architectures: how many of the space to draw; null takes all.
        real_architectures: how many of those to train on real images as well; null takes all.
        depths: of the ConvNets.
        widths: of the ConvNets.
        networks: of each architecture, trained together; their mean accuracy ranks it.
        epochs: over the synthetic set.
        real_epochs: over the real images.
        lr: on the synthetic set; null takes the set's step size.
        real_lr: on real images.
        augment: DSA strategy of both.
        seed: draws architectures, initialisations, batches and augmentation.
        threads: of the CPU; null leaves torch's own choice. They decide no number.

    Raises:
        InputError: for numbers out of range.
    """

    out: str
    architectures: int | None = None
    real_architectures: int | None = None
    depths: list[int] = field(default_factory=lambda: list(DEPTHS))
    widths: list[int] = field(default_factory=lambda: list(WIDTHS))
    networks: int = 1
    epochs: int = 200
    real_epochs: int = 200
    lr: float | None = None
    real_lr: float = 0.01
    augment: str = STRATEGY
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_bounds(SearchSettings, vars(self))


class Search:
    """A search in progress: its settings, the images of both sides, and what has been measured.

    Args:
        settings: of the search.
        data: its real images and the synthetic set.

    Raises:
        InputError: for data without a synthetic set, or a folder that holds a search with other settings.
    """

    def __init__(self, settings: SearchSettings, data: DistillationDataModule) -> None:
        self.settings, self.data = settings, data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data.prepare_data()
        data.setup()
        synthetic = data.synthetic_set
        if synthetic is None:
            raise InputError("a search needs a synthetic set to stand for the real images: give data.synthetic")
        parts = {
            "proxy": (synthetic.chosen(ema=data.hparams["ema"]), synthetic.training_labels()),
            "real": data.train,
        }
        self.images = {side: Images(*(t.to(self.device) for t in part)) for side, part in parts.items()}
        step_size = 0.01 if synthetic.step_size is None else float(synthetic.step_size.mean())
        augment = Augmentation(settings.augment)
        self.protocols = {
            "proxy": EvaluationProtocol(settings.epochs, settings.lr or step_size, augment=augment),
            "real": EvaluationProtocol(settings.real_epochs, settings.real_lr, augment=augment),
        }
        space = search_space(settings.depths, settings.widths)
        drawn = sample_architectures(space, settings.architectures, seed=settings.seed)
        also_real = sample_architectures(drawn, settings.real_architectures, seed=settings.seed)
        self.jobs = [(side, one) for one in drawn for side in SIDES if side == "proxy" or one in also_real]
        self.file = Path(settings.out) / "nas.json"
        self.identity = {
            **{key: value for key, value in asdict(settings).items() if key not in ("out", "threads")},
            "version": minor_version(),
            "data": data.describe(),
            "set": {"images": fingerprint(*self.images["proxy"]), **synthetic.metadata},
        }
        self.measured: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        recorded = read_json(self.file)
        settings, measured = recorded.get("settings"), recorded.get("measured")
        if not isinstance(settings, dict) or not isinstance(measured, dict):
            return {}
        wanted = json.loads(json.dumps(self.identity))  # as JSON holds it: lists for tuples
        different = sorted(key for key in wanted if settings.get(key) != wanted[key])
        if different:
            raise InputError(f"{self.file}: of a search with another {', '.join(different)}; give another out")
        return measured

    def left(self) -> list[tuple[str, Architecture]]:
        """Return what has not been measured yet."""
        return [(side, one) for side, one in self.jobs if side not in self.measured.get(one.name, {})]

    def steps(self, side: str) -> int:
        """Count the SGD steps of one training on a side."""
        protocol = self.protocols[side]
        return protocol.epochs * -(-len(self.images[side].labels) // protocol.batch_size)

    def cost(self, jobs: Sequence[tuple[str, Architecture]]) -> tuple[float, float]:
        """Count the operations of jobs, and estimate their seconds from a few steps of a few architectures."""
        sample = self.images["proxy"].images[:1].cpu()
        flops = {one: training_flops(self._build(one).eval(), sample) for _, one in jobs}
        by_size = sorted(flops, key=flops.__getitem__)
        probes = {by_size[round(i * (len(by_size) - 1) / max(1, PROBES - 1))] for i in range(PROBES)}
        total, seconds = 0.0, 0.0
        for side in SIDES:
            of_side = [one for measured_on, one in jobs if measured_on == side]
            if not of_side:
                continue
            batch = min(self.protocols[side].batch_size, len(self.images[side].labels))
            times = {one: self._seconds_a_step(self._build(one).to(self.device), side, batch) for one in probes}
            # Linear in the operations between what was measured: a constant for the kernels' launch, a rate beyond.
            x = torch.tensor([[1.0, flops[one] * batch] for one in times], dtype=torch.float64)
            y = torch.tensor(list(times.values()), dtype=torch.float64)[:, None]
            scale = x.abs().max(0).values
            constant, rate = (torch.linalg.lstsq(x / scale, y, driver="gelsd").solution[:, 0] / scale).tolist()
            for one in of_side:
                images = self.protocols[side].epochs * len(self.images[side].labels) * self.settings.networks
                total += flops[one] * images
                step = max(constant + rate * flops[one] * batch, min(times.values()) / 2)
                seconds += step * self.steps(side) * self.settings.networks
        return total, seconds

    def _build(self, one: Architecture) -> torch.nn.Module:
        return FreshNetworks("convnet", one._asdict(), self.data.description().shape).build(0)

    def _seconds_a_step(self, network: torch.nn.Module, side: str, batch: int) -> float:
        images, labels = (part[:batch] for part in self.images[side])
        times = []
        for epochs in (1, 3):
            began = time.perf_counter()
            protocol = replace(self.protocols[side], epochs=epochs)
            train_fresh_networks([network], images, labels, protocol, compile=False)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return times[1] / 3  # the first one warmed up

    def run(self) -> dict[str, Any]:
        """Measure what is left and return the results."""
        for side, one in (bar := tqdm(self.left(), unit="training", dynamic_ncols=True)):
            bar.set_description(f"{one.name} on {'the synthetic set' if side == 'proxy' else 'real images'}")
            self.measured.setdefault(one.name, {})[side] = measure_architecture(
                one,
                self.data,
                self.images[side],
                self.protocols[side],
                side=side,
                networks=self.settings.networks,
                seed=self.settings.seed,
                device=self.device,
            )
            self.write({})
        return self.write(self.results())

    def results(self) -> dict[str, Any]:
        """Correlate the architectures that both sides have."""
        both = {name: sides for name, sides in self.measured.items() if set(sides) == set(SIDES)}
        proxy, real = ([sides[side]["mean"] for sides in both.values()] for side in SIDES)
        spent = {side: sum(sides[side]["seconds"] for sides in both.values()) / 60 for side in SIDES}
        best = max(both, key=lambda name: both[name]["proxy"]["mean"])
        return {
            "correlation": rank_correlations(proxy, real),
            "minutes": {side: round(minutes, 2) for side, minutes in spent.items()},
            "compared": len(both),
            "of": len(search_space(self.settings.depths, self.settings.widths)),
            "epochs": {side: protocol.epochs for side, protocol in self.protocols.items()},
            "measured_on": "test images, by which both rankings and the choices below are made",
            "chosen": {"architecture": best, "real": both[best]["real"]["mean"], "best": max(real)},
        }

    def write(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write everything, atomically."""
        everything = {**results, "settings": self.identity, "measured": self.measured, "versions": versions()}
        write_json(self.file, everything, indent=1)
        return everything


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy on the synthetic set over accuracy on real images, one point an architecture."""
    import matplotlib  # not at the top: only the last step takes it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    both = [sides for sides in results["measured"].values() if set(sides) == set(SIDES)]
    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    real, proxy = ([100 * sides[side]["mean"] for sides in both] for side in ("real", "proxy"))
    axes.scatter(real, proxy, s=14)
    axes.set(xlabel="test accuracy, trained on real images, %", ylabel="trained on the synthetic set, %")
    correlations = {top: "-" if value is None else f"{value:.2f}" for top, value in results["correlation"].items()}
    axes.set_title(", ".join(f"{top}: {value}" for top, value in correlations.items()), fontsize=10)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd nas``."""
    parser = ArgumentParser(prog="ftd nas", description=__doc__, default_env=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_class_arguments(SearchSettings, as_group=False)
    parser.add_class_arguments(DistillationDataModule, "data")
    parsed = parser.parse_args(with_config_files(arguments)[0]).as_dict()
    settings = SearchSettings(**{option.name: parsed[option.name] for option in fields(SearchSettings)})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")
    with held(Path(settings.out)):
        _run(settings, DistillationDataModule(**parsed["data"]))


def _run(settings: SearchSettings, data: DistillationDataModule) -> None:
    """Search, and write what was found."""
    search = Search(settings, data)
    left = search.left()
    if left:
        operations, seconds = search.cost(left)
        whole = f"{len(search.jobs)} trainings of {len({one for _, one in search.jobs})} architectures"
        print(f"{whole}, {len(left)} left: {operations:.2g} operations, about {seconds / 60:.1f} min on this machine")
    results = search.run()
    out = Path(settings.out)
    table = nas_table(results)
    with replacing(out / "nas.md") as part:
        part.write_text(table + "\n", encoding="utf-8")
    draw(results, out / "nas.png")
    chosen = results["chosen"]
    print(f"\n{table}\n\nbest by the synthetic set: {chosen['architecture']}")
    print(f"trained on real images {100 * chosen['real']:.1f} %, the best of all {100 * chosen['best']:.1f} %")
    print(f"results   {out}")
