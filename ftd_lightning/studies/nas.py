"""Architecture search with a synthetic set as proxy (Sec. 4.4, Table 5): the space, a measurement, the correlation."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torchmetrics.functional.regression import spearman_corrcoef
from tqdm.auto import tqdm

from ftd_lightning.bounds import check_bounds
from ftd_lightning.command_line import OneLineErrors
from ftd_lightning.contracts import Images
from ftd_lightning.core.evaluation import EvaluationProtocol, accuracies, mean_and_std, train_fresh_networks
from ftd_lightning.core.networks import NetworkFactory
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import fingerprint, replacing, versions, write_json
from ftd_lightning.files.schema import markdown_table
from ftd_lightning.functional.augment import STRATEGY, Augmentation
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.models.convnet import Activation, Pooling
from ftd_lightning.models.layers import Norm
from ftd_lightning.shipped_configs import with_config_files, with_home
from ftd_lightning.studies.fits import held, kept, minor_version
from ftd_lightning.studies.plots import write_plot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEPTHS, WIDTHS = (1, 2, 3, 4), (32, 64, 128, 256)
TOPS = (5, 10, 20)
SIDES = {"proxy": "synthetic set", "real": "real images"}


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
    """List the ConvNets of Table 5: depth x width x 3 activations x 5 norms x 3 poolings, 720 in all."""
    choices = (get_args(kind) for kind in (Activation, Norm, Pooling))
    return [Architecture(*options) for options in itertools.product(depths, widths, *choices)]


def sample_architectures(space: Sequence[Architecture], count: int | None, *, seed: int) -> list[Architecture]:
    """Draw some without replacement, in the space's order; None takes all. A smaller draw is part of a larger one."""
    if count is None:
        return list(space)
    if not 2 <= count <= len(space):
        raise InputError(f"{count} architectures are asked for, the space has {len(space)}: ask for 2 to {len(space)}")
    drawn = torch.randperm(len(space), generator=make_generator(seed, "architectures"))[:count]
    return [space[index] for index in sorted(drawn.tolist())]


def rank_correlations(
    proxy: Sequence[float], real: Sequence[float], *, tops: Sequence[int] = TOPS
) -> dict[str, float | None]:
    """Correlate two rankings of the same architectures (Spearman), over the best ones and over all.

    Convention: the top k are the k best *by the real data*, as the paper's question is how well the proxy orders good
    architectures; the paper does not say whose top it takes. Equal accuracies share their mean rank.

    Returns:
        {"top 5": .., "all": ..}, in [-1, 1]; None where all accuracies of one side are equal. A k that is not below the
        number of architectures is left out.
    """
    ours, theirs = torch.tensor(proxy, dtype=torch.float64), torch.tensor(real, dtype=torch.float64)
    best = theirs.argsort(descending=True, stable=True)
    result: dict[str, float | None] = {}
    for name, count in [*((f"top {k}", k) for k in tops if k < len(best)), ("all", len(best))]:
        a, b = ours[best[:count]], theirs[best[:count]]
        tied = bool((a == a[0]).all() or (b == b[0]).all())
        result[name] = None if tied else float(spearman_corrcoef(a, b))
    return result


def nas_table(results: Mapping[str, Any]) -> str:
    """Format correlations and times as a Markdown table."""
    lines = [["trained on", "architectures", *results["correlation"], "minutes"]]
    for side, title in SIDES.items():
        values = [value if side == "proxy" else 1.0 for value in results["correlation"].values()]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append([title, str(results["compared"]), *cells, f"{results['minutes'][side]:.1f}"])
    note = "Accuracy on the test images makes both rankings, as in the paper; top k: the k best by real images."
    return f"{markdown_table(lines)}\n\n{note}"


@dataclass(frozen=True)
class SearchSettings:
    """Settings of an architecture search.

    Args:
        out: folder of nas.json, nas.md, nas.png, and of finished trainings (evaluations).
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

    def __post_init__(self) -> None:
        check_bounds(SearchSettings, vars(self))


def search(settings: SearchSettings, data: DistillationDataModule) -> dict[str, Any]:
    """Train every architecture on the synthetic set and on real images of ``data``; return the content of ``nas.json``.

    The two sides draw different initialisations and augmentation, so that chance does not correlate them.
    """
    synthetic = data.training_set()
    if synthetic is None:
        raise InputError("a search needs a synthetic set to stand for the real images: give data.synthetic")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    augment = Augmentation(settings.augment)
    lr = settings.lr or synthetic.learning_rate or 0.01
    proxy = Images(synthetic.chosen(ema=data.hparams["ema"]), synthetic.training_labels())
    images = {side: Images(*(t.to(device) for t in part)) for side, part in (("proxy", proxy), ("real", data.train))}
    protocols = {
        "proxy": EvaluationProtocol(settings.epochs, lr, augment=augment),
        "real": EvaluationProtocol(settings.real_epochs, settings.real_lr, augment=augment),
    }
    prints = {"proxy": fingerprint(*proxy), "real": None}  # the description of the data names the real images

    def measured(side: str, one: Architecture) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            began = time.perf_counter()
            fresh = NetworkFactory("convnet", one._asdict(), data.description().shape)
            seed = (settings.seed, side, one.name)
            built = [fresh.build(*seed, index).to(device) for index in range(settings.networks)]
            # Not compiled: each architecture would be compiled anew for a few hundred steps.
            draws = derive_seed(*seed, "training")
            train_fresh_networks(built, *images[side], protocols[side], seed=draws, compile=False)
            found = mean_and_std(torch.tensor(accuracies(built, *data.part("test"))))
            return {**found, "seconds": round(time.perf_counter() - began, 3)}

        identity = {
            "version": minor_version(),
            "data": data.describe(),
            "set": prints[side],
            "architecture": one.name,
            "protocol": asdict(protocols[side]),
            "networks": settings.networks,
            "seed": [settings.seed, side],
        }
        return kept(Path(settings.out) / "evaluations", identity, make)

    space = search_space(settings.depths, settings.widths)
    drawn = sample_architectures(space, settings.architectures, seed=settings.seed)
    also_real = sample_architectures(drawn, settings.real_architectures, seed=settings.seed)
    jobs = [(side, one) for one in drawn for side in SIDES if side == "proxy" or one in also_real]
    results: dict[str, dict[str, Any]] = {one.name: {} for one in drawn}
    for side, one in (bar := tqdm(jobs, unit="training", dynamic_ncols=True)):
        bar.set_description(f"{one.name} on the {SIDES[side]}")
        results[one.name][side] = measured(side, one)
    both = {one.name: results[one.name] for one in also_real}
    accuracy = {side: [sides[side]["mean"] for sides in both.values()] for side in SIDES}
    recorded = {key: value for key, value in asdict(settings).items() if key != "out"}
    best = max(both, key=lambda name: float(both[name]["proxy"]["mean"]))
    return {
        "correlation": rank_correlations(accuracy["proxy"], accuracy["real"]),
        "minutes": {side: round(sum(sides[side]["seconds"] for sides in both.values()) / 60, 2) for side in SIDES},
        "compared": len(both),
        "of": len(space),
        "epochs": {side: protocol.epochs for side, protocol in protocols.items()},
        "measured_on": "test images, by which both rankings and the choices below are made",
        "chosen": {"architecture": best, "real": both[best]["real"]["mean"], "best": max(accuracy["real"])},
        "settings": {**recorded, "data": data.describe(), "set": {"images": prints["proxy"], **synthetic.metadata}},
        "measured": results,
        "versions": versions(),
    }


def draw(results: Mapping[str, Any], axes: Any) -> None:
    """Draw accuracy on the synthetic set over accuracy on real images, one point an architecture."""
    both = [sides for sides in results["measured"].values() if sides.keys() == SIDES.keys()]
    axes.scatter(*([100 * sides[side]["mean"] for sides in both] for side in ("real", "proxy")), s=14)
    axes.set(xlabel="test accuracy, trained on real images, %", ylabel="trained on the synthetic set, %")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd nas``."""
    parser = OneLineErrors(prog="ftd nas", description=__doc__, default_env=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_class_arguments(SearchSettings, as_group=False)
    parser.add_class_arguments(DistillationDataModule, "data")
    parsed = with_home(parser.parse_args(with_config_files(arguments)[0]).as_dict())
    settings = SearchSettings(**{option.name: parsed[option.name] for option in fields(SearchSettings)})
    torch.set_float32_matmul_precision("high")
    out = Path(settings.out)
    with held(out):
        results = search(settings, DistillationDataModule(**parsed["data"]))
        table, chosen = nas_table(results), results["chosen"]
        write_json(out / "nas.json", results, indent=1)
        with replacing(out / "nas.md") as part:
            part.write_text(table + "\n", encoding="utf-8")
        write_plot(out / "nas.png", partial(draw, results), size=(5, 4.5))
    print(f"\n{table}\n\nbest by the synthetic set: {chosen['architecture']}")
    print(f"trained on real images {100 * chosen['real']:.1f} %, the best of all {100 * chosen['best']:.1f} %")
    print(f"results   {out}")
