"""``ftd nas``: rank ConvNets by training them on a synthetic set, and compare with the ranking by real images.

One architecture after the other, each written down when it is done: the same command goes on after a kill.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ArgumentParser
from tqdm.auto import tqdm

from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.files import replacing, versions
from ftd_lightning.data.images import Images
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import STRATEGY
from ftd_lightning.studies.architecture_search import (
    DEPTHS,
    WIDTHS,
    Architecture,
    measure_architecture,
    nas_table,
    rank_correlations,
    sample_architectures,
    search_space,
    training_flops,
)
from ftd_lightning.training.evaluation_protocol import train_fresh_networks
from ftd_lightning.training.fresh_networks import FreshNetworks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIDES = ("proxy", "real")
NO_SETTING = ("root", "download", "on_device", "num_workers")  # of the data: they decide no number
PROBES = 5  # architectures whose speed the estimate of the time stands on


def search(
    out: str,
    architectures: int | None = None,
    real_architectures: int | None = None,
    depths: list[int] = list(DEPTHS),  # noqa: B006
    widths: list[int] = list(WIDTHS),  # noqa: B006
    networks: int = 1,
    epochs: int = 200,
    real_epochs: int = 200,
    lr: float | None = None,
    real_lr: float = 0.01,
    augment: str = STRATEGY,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Say what is searched; see :func:`main`, which adds the data.

    Args:
        out: folder of nas.json, nas.md and nas.png.
        architectures: how many of the space to draw; null takes all.
        real_architectures: how many of those to train on real images as well; null takes all.
        depths: of the ConvNets.
        widths: of the ConvNets.
        networks: of each architecture, trained together; their mean accuracy ranks it.
        epochs: over the synthetic set.
        real_epochs: over the real images.
        lr: on the synthetic set; null takes the step size that it brings.
        real_lr: on real images.
        augment: DSA strategy of both.
        seed: draws architectures, initialisations, batches and augmentation.
        threads: of the CPU; null leaves torch's own choice. Not part of what decides the numbers.
    """
    return dict(locals())


class Search:
    """A search under way: what is asked for, the images of both sides, and what is measured so far."""

    def __init__(self, settings: dict[str, Any], data: DistillationDataModule) -> None:
        self.settings, self.data = settings, data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data.prepare_data()
        data.setup()
        synthetic = data.synthetic_set
        if synthetic is None:
            raise InputError("a search needs a synthetic set to stand for the real images: give data.synthetic")
        parts = {
            "proxy": (synthetic.chosen(ema=data.hparams["ema"]), synthetic.labels),
            "real": (data.train.pictures, data.train.labels),
        }
        self.images = {side: Images(*(t.to(self.device) for t in part)) for side, part in parts.items()}
        step_size = 0.01 if synthetic.step_size is None else float(synthetic.step_size)
        self.lr = {"proxy": settings["lr"] or step_size, "real": settings["real_lr"]}
        self.epochs = {"proxy": settings["epochs"], "real": settings["real_epochs"]}
        space = search_space(settings["depths"], settings["widths"])
        drawn = sample_architectures(space, settings["architectures"], seed=settings["seed"])
        also_real = sample_architectures(drawn, settings["real_architectures"], seed=settings["seed"])
        self.jobs = [(side, one) for one in drawn for side in SIDES if side == "proxy" or one in also_real]
        self.file = Path(settings["out"]) / "nas.json"
        self.identity = {
            **{key: value for key, value in settings.items() if key not in ("out", "threads")},
            "data": {key: value for key, value in data.hparams.items() if key not in NO_SETTING},
            "set": synthetic.metadata,
        }
        self.measured: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.file.is_file():
            return {}
        found = json.loads(self.file.read_text())
        # As JSON holds it: lists for tuples.
        wanted = json.loads(json.dumps(self.identity))
        different = sorted(key for key in wanted if found["settings"].get(key) != wanted[key])
        if different:
            raise InputError(f"{self.file}: of a search with another {', '.join(different)}; give another out")
        return dict(found["measured"])

    def left(self) -> list[tuple[str, Architecture]]:
        """What is still to be measured."""
        return [(side, one) for side, one in self.jobs if side not in self.measured.get(one.name, {})]

    def steps(self, side: str) -> int:
        """SGD steps of one training on a side, of batches of 256."""
        return self.epochs[side] * -(-len(self.images[side].labels) // 256)

    def cost(self, jobs: Sequence[tuple[str, Architecture]]) -> tuple[float, float]:
        """Count the operations of jobs, and estimate their seconds from a few steps of a few architectures."""
        sample = self.images["proxy"].pictures[:1].cpu()
        flops = {one: training_flops(self._build(one).eval(), sample) for _, one in jobs}
        by_size = sorted(flops, key=flops.__getitem__)
        probes = {by_size[round(i * (len(by_size) - 1) / max(1, PROBES - 1))] for i in range(PROBES)}
        total, seconds = 0.0, 0.0
        for side in SIDES:
            of_side = [one for part, one in jobs if part == side]
            if not of_side:
                continue
            batch = min(256, len(self.images[side].labels))
            times = {one: self._seconds_a_step(self._build(one).to(self.device), side, batch) for one in probes}
            # Linear in the operations between what was measured: a constant for the kernels' launch, a rate beyond.
            x = torch.tensor([[1.0, flops[one] * batch] for one in times], dtype=torch.float64)
            y = torch.tensor(list(times.values()), dtype=torch.float64)[:, None]
            scale = x.abs().max(0).values
            constant, rate = (torch.linalg.lstsq(x / scale, y, driver="gelsd").solution[:, 0] / scale).tolist()
            for one in of_side:
                images = self.epochs[side] * len(self.images[side].labels) * self.settings["networks"]
                total += flops[one] * images
                step = max(constant + rate * flops[one] * batch, min(times.values()) / 2)
                seconds += step * self.steps(side) * self.settings["networks"]
        return total, seconds

    def _build(self, one: Architecture) -> torch.nn.Module:
        return FreshNetworks("convnet", one._asdict(), self.data).build(0)

    def _seconds_a_step(self, network: torch.nn.Module, side: str, batch: int) -> float:
        pictures, labels = (part[:batch] for part in self.images[side])
        times = []
        for epochs in (1, 3):
            began = time.perf_counter()
            strategy = self.settings["augment"]
            train_fresh_networks([network], pictures, labels, epochs=epochs, lr=0.0, strategy=strategy, compile=False)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return times[1] / 3  # the first one warmed up

    def run(self) -> dict[str, Any]:
        """Measure what is left, and give the results."""
        for side, one in (bar := tqdm(self.left(), unit="training", dynamic_ncols=True)):
            bar.set_description(f"{one.name} on {'the synthetic set' if side == 'proxy' else 'real images'}")
            self.measured.setdefault(one.name, {})[side] = measure_architecture(
                one,
                self.data,
                self.images[side],
                side=side,
                networks=self.settings["networks"],
                epochs=self.epochs[side],
                lr=self.lr[side],
                augment=self.settings["augment"],
                seed=self.settings["seed"],
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
            "of": len(search_space(self.settings["depths"], self.settings["widths"])),
            "epochs": self.epochs,
            "measured_on": "test images, by which both rankings and the choices below are made",
            "chosen": {"architecture": best, "real": both[best]["real"]["mean"], "best": max(real)},
        }

    def write(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write everything, atomically."""
        everything = {**results, "settings": self.identity, "measured": self.measured, "versions": versions()}
        with replacing(self.file) as part:
            part.write_text(json.dumps(everything, indent=1) + "\n")
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
    found = {top: "-" if value is None else f"{value:.2f}" for top, value in results["correlation"].items()}
    axes.set_title(", ".join(f"{top}: {value}" for top, value in found.items()), fontsize=10)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = ArgumentParser(prog="ftd nas", description=__doc__, default_env=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(search)
    parser.add_class_arguments(DistillationDataModule, "data")
    given = parser.parse_args(list(arguments))
    settings = {key: value for key, value in given.as_dict().items() if key not in ("config", "data")}
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision("high")
    work = Search(settings, DistillationDataModule(**given.data.as_dict()))
    left = work.left()
    if left:
        operations, seconds = work.cost(left)
        whole = f"{len(work.jobs)} trainings of {len({one for _, one in work.jobs})} architectures"
        print(f"{whole}, {len(left)} left: {operations:.2g} operations, about {seconds / 60:.1f} min on this machine")
    results = work.run()
    out = Path(settings["out"])
    table = nas_table(results)
    with replacing(out / "nas.md") as part:
        part.write_text(table + "\n")
    draw(results, out / "nas.png")
    chosen = results["chosen"]
    print(f"\n{table}\n\nbest by the synthetic set: {chosen['architecture']}")
    print(f"trained on real images {100 * chosen['real']:.1f} %, the best of all {100 * chosen['best']:.1f} %")
    print(f"results   {out}")
