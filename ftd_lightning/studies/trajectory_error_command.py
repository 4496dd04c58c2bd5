"""``ftd trajectory-error SET STORE``: Figure 1 of the paper and the errors of Eq. 6-8, as JSON, PNG, TensorBoard."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ftd_lightning.data import DistillationDataModule, SyntheticSet, TrajectoryStore, check_compatible
from ftd_lightning.data.files import replacing, versions
from ftd_lightning.errors import InputError
from ftd_lightning.studies.trajectory_error import (
    QUANTITIES,
    check_set,
    inner_settings,
    measure_trajectory_error,
    summarize,
)
from ftd_lightning.training.fresh_networks import student_networks

if TYPE_CHECKING:
    from collections.abc import Sequence

KIND = "trajectory_error"
TAGS = {
    "evaluation": "loss_difference/evaluation",
    "distillation": "loss_difference/distillation",
    "teacher_loss": "loss/teacher",
    "epsilon": "norm/epsilon_accumulated",
    "delta": "norm/delta_matching",
    "initialization": "norm/I_initialization",
    "segment": "norm/teacher_segment",
}


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    words = argparse.ArgumentParser(
        prog="ftd trajectory-error",
        description="Measure how far a student on a synthetic set drifts from its teachers (Figure 1, Eq. 6-8).",
    )
    words.add_argument("set", type=Path, help="file of the synthetic set")
    words.add_argument("store", type=Path, help="folder of the teachers' trajectories")
    words.add_argument("--dataset", help="data set of the real images; by default the one that the teachers name")
    words.add_argument("--root", default="data", help="folder of the data sets")
    words.add_argument("--teachers", type=int, default=1, metavar="K", help="average over the first K teachers")
    words.add_argument(
        "--on",
        choices=("test", "train"),
        default="test",
        help="real images of the losses; Figure 1's are the test images",
    )
    words.add_argument("--ema", action="store_true", help="the set's averaged images")
    words.add_argument("--syn-steps", type=int, metavar="N", help="inner steps a segment; by default the set's own")
    words.add_argument("--expert-epochs", type=int, metavar="M", help="teacher epochs a segment; by default the set's")
    words.add_argument("--output", type=Path, metavar="DIR", help="by default a folder trajectory_error beside the set")
    words.add_argument(
        "--against", type=Path, action="append", default=[], metavar="CURVE", help="a curve.json to draw beside it"
    )
    words.add_argument("--seed", type=int, default=0, help="of mini-batches and augmentation")
    return words


def real_images(store: TrajectoryStore, file: Path, dataset: str | None, root: str) -> DistillationDataModule:
    """Read the real images as the teachers saw them, through the set's own transform.

    Raises:
        InputError: for a data set that is not the teachers', or a set that does not fit it.
    """
    recorded = store.metadata.get("dataset")
    seen = recorded if isinstance(recorded, dict) else {"name": recorded}
    name = dataset or seen.get("name")
    if not name:
        raise InputError(f"{store.path}: its teachers do not name their data set: give --dataset")
    known = set(inspect.signature(DistillationDataModule).parameters) - {"dataset"}
    options: dict[str, Any] = {key: value for key, value in seen.items() if key in known}
    data = DistillationDataModule(dataset=name, root=root, synthetic=str(file), **options)
    data.prepare_data()
    data.setup()
    check_compatible(store, data.describe())
    return data


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Do the work and give what ``curve.json`` holds."""
    synthetic, store = SyntheticSet.load(options.set), TrajectoryStore(options.store)
    n, m = inner_settings(synthetic, options.syn_steps, options.expert_epochs)
    check_set(synthetic, store, m)
    if not 1 <= options.teachers <= len(store):
        raise InputError(f"{store.path}: {options.teachers} teachers are asked for, {len(store)} are recorded")
    synthetic.chosen(ema=options.ema)
    data = real_images(store, options.set, options.dataset, options.root)
    curves = measure_trajectory_error(
        synthetic,
        store,
        getattr(data, options.on),
        student_networks(store, None, None, data).build(0),
        teachers=range(options.teachers),
        syn_steps=n,
        expert_epochs=m,
        ema=options.ema,
        seed=options.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=True,
    )
    return {
        "kind": KIND,
        "method": synthetic.metadata.get("method", "set"),
        "on": options.on,
        "ema": options.ema,
        "syn_steps": n,
        "expert_epochs": m,
        "seed": options.seed,
        "epochs": curves[0].epochs,
        **summarize(curves),
        "each": [curve._asdict() for curve in curves],
        "set": synthetic.metadata,
        "teachers": store.metadata,
        "versions": versions(),
    }


def read_curve(path: Path) -> dict[str, Any]:
    """Read a ``curve.json``.

    Raises:
        InputError: for a file that is not there or is something else.
    """
    try:
        curve: dict[str, Any] = json.loads(path.read_text())
        if curve["kind"] != KIND:
            raise KeyError(KIND)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: a curve.json of ftd trajectory-error is needed here") from error
    return curve


def table(curve: dict[str, Any], *, rows: int = 10) -> str:
    """Lay a curve out, at most about ``rows`` epochs and always the last.

    Example:
        >>> values = {name: [0.5, 1.5] for name in QUANTITIES}
        >>> print(table({"epochs": [2, 4], "mean": values, "std": values, "on": "train"}).splitlines()[-1])
            4    1.5000        1.5000      1.5000     1.500     1.500     1.500     1.500
    """
    last = len(curve["epochs"]) - 1
    stride = -(-len(curve["epochs"]) // rows)
    lines = [f"epoch   teacher  {'L(student) - L(teacher)':>24}   |epsilon|   |delta|       |I| |segment|"]
    lines.append(f"           loss    evaluation  distillation   {'(' + curve['on'] + ' images)'}")
    for index in sorted({*range(last, -1, -stride), last}):
        v = {name: curve["mean"][name][index] for name in QUANTITIES}
        lines.append(
            f"{curve['epochs'][index]:>5}{v['teacher_loss']:>10.4f}{v['evaluation']:>14.4f}{v['distillation']:>12.4f}"
            f"{v['epsilon']:>10.3f}{v['delta']:>10.3f}{v['initialization']:>10.3f}{v['segment']:>10.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: for what does not fit; nothing is written then.
        DivergenceError: if a student's weights do not stay finite.
    """
    options = parser().parse_args(arguments)
    others = [read_curve(path) for path in options.against]
    folder = options.output or options.set.parent / KIND
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is no folder, give another --output")
    curve = measure(options)
    with replacing(folder / "curve.json") as part:
        part.write_text(json.dumps(curve, indent=2, allow_nan=False) + "\n")
    with replacing(folder / "curve.png") as part:
        draw([curve, *others], part)
    # purge_step: TensorBoard forgets the curve that an earlier run left in this folder.
    with SummaryWriter(str(folder), purge_step=0) as board:
        for name, tag in TAGS.items():
            for epoch, value in zip(curve["epochs"], curve["mean"][name], strict=True):
                board.add_scalar(f"trajectory_error/{tag}", value, epoch)
    print(table(curve))
    print(f"{folder / 'curve.json'}, curve.png and TensorBoard scalars are written")


def draw(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw curves in the manner of Figure 1, with the norms of the errors below.

    The first one's teacher is in grey, on an axis of its own. Bands are one standard deviation over teachers.
    """
    # Only here: loading it takes a moment, and its pyplot would keep figures in a global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    grey = above.twinx()
    first = curves[0]
    grey.plot(first["epochs"], first["mean"]["teacher_loss"], color="0.6", label=f"teacher of {first['method']}")
    above.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    grey.set_ylabel("L(teacher)", color="0.5")
    grey.tick_params(axis="y", colors="0.5")
    for index, curve in enumerate(curves):
        name, epochs = curve["method"] + (" EMA" if curve["ema"] else ""), curve["epochs"]
        for kind, style in (("evaluation", "-"), ("distillation", "--")):
            mean, std = curve["mean"][kind], curve["std"][kind]
            above.plot(epochs, mean, style, color=f"C{index}", label=f"{name}, {kind}")
            if len(curve["each"]) > 1:
                low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
                above.fill_between(epochs, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        for kind, symbol, style in (("epsilon", "ε", "-"), ("delta", "δ", "--"), ("initialization", "I", ":")):
            below.plot(epochs, curve["mean"][kind], style, color=f"C{index}", label=f"{name}, ‖{symbol}‖")
    where = {curve["on"] for curve in curves}
    above.set_ylabel(f"L(student) - L(teacher), {' and '.join(sorted(where))} images")
    below.set_ylabel("norm of the error")
    below.set_xlabel("teacher epoch")
    handles = [above.get_legend_handles_labels(), grey.get_legend_handles_labels()]
    above.legend([h for part in handles for h in part[0]], [name for part in handles for name in part[1]], fontsize=8)
    below.legend(fontsize=8, ncols=len(curves))
    figure.savefig(path, format="png", dpi=120)
