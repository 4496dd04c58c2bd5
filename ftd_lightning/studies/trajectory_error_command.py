"""``ftd trajectory-error SET STORE``: Figure 1 of the paper and the errors of Eq. 6-8, as JSON, PNG, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from pathlib import Path  # noqa: TC003
from typing import Any, Literal

import torch
from torch.utils.tensorboard import SummaryWriter

from ftd_lightning.command_line import parse_command
from ftd_lightning.data import DistillationDataModule, SyntheticSet, TrajectoryStore, check_compatible
from ftd_lightning.data.files import replacing, versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.errors import InputError
from ftd_lightning.models.registry import recorded_network
from ftd_lightning.studies.trajectory_error import (
    QUANTITIES,
    check_set,
    inner_settings,
    measure_trajectory_error,
    summarize,
)
from ftd_lightning.training.fresh_networks import student_networks

KIND = "trajectory_error"
RECORDED = ("val_fraction", "max_per_class", "seed", "image_size")  # of the teachers' data
TAGS = {
    "evaluation": "loss_difference/evaluation",
    "distillation": "loss_difference/distillation",
    "teacher_loss": "loss/teacher",
    "epsilon": "norm/epsilon_accumulated",
    "delta": "norm/delta_matching",
    "initialization": "norm/I_initialization",
    "segment": "norm/teacher_segment",
}


def real_images(store: TrajectoryStore, file: Path, dataset: str | None, root: str) -> DistillationDataModule:
    """Read the real images as the teachers saw them, through the set's transform.

    Raises:
        InputError: for a data set other than the teachers', or a set that does not fit it.
    """
    recorded = store.metadata.get("dataset")
    described = recorded if isinstance(recorded, dict) else {"name": recorded}
    name = dataset or described.get("name")
    if not name:
        raise InputError(f"{store.path}: its teachers do not name their data set: give --dataset")
    options: dict[str, Any] = {key: described[key] for key in RECORDED if key in described}
    data = DistillationDataModule(dataset=name, root=root, synthetic=str(file), **options)
    data.prepare_data()
    data.setup()
    check_compatible(store, data.describe())
    return data


def read_curve(path: Path) -> dict[str, Any]:
    """Read a ``curve.json``.

    Raises:
        InputError: for a file that is missing or is something else.
    """
    try:
        curve: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if curve["kind"] != KIND:
            raise KeyError(KIND)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: a curve.json of ftd trajectory-error is needed here") from error
    return curve


def table(curve: dict[str, Any], *, rows: int = 10) -> str:
    """Format a curve as a table of about ``rows`` epochs at most, the last one included.

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


def draw(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw curves as in Figure 1, with the norms of the errors below.

    The teacher of the first one is grey, on a second axis. Bands are one standard deviation over teachers.
    """
    # Imported here because it is slow; not pyplot, which keeps figures in a global state.
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


def trajectory_error(
    set_file: Path,
    store_folder: Path,
    *,
    dataset: str | None = None,
    root: str = "data",
    teachers: int = 1,
    on: Literal["test", "train"] = "test",
    ema: bool = False,
    syn_steps: int | None = None,
    expert_epochs: int | None = None,
    output: Path | None = None,
    against: Sequence[Path] = (),
    seed: int = 0,
) -> None:
    """Measure how far a student on a synthetic set drifts from its teachers (Figure 1, Eq. 6-8).

    Args:
        set_file: the synthetic set.
        store_folder: folder of the teachers' trajectories.
        dataset: data set of the real images; by default the one that the teachers name.
        root: folder of the data sets.
        teachers: average over so many, from the first.
        on: real images that the losses are measured on; the test images in Figure 1.
        ema: use the set's averaged images.
        syn_steps: inner steps per segment; by default the set's.
        expert_epochs: teacher epochs per segment; by default the set's.
        output: by default a folder trajectory_error beside the set.
        against: a curve.json to draw beside it.
        seed: of mini-batches and augmentation.

    Raises:
        InputError: for a set, a store or a file that does not fit; nothing is written then.
        DivergenceError: if a student's weights do not stay finite.
    """
    others = [read_curve(path) for path in against]
    folder = output or set_file.parent / KIND
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is no folder, give another --output")
    synthetic, store = SyntheticSet.load(set_file), TrajectoryStore(store_folder)
    n, m = inner_settings(synthetic, syn_steps, expert_epochs)
    check_set(synthetic, store, m)
    if not 1 <= teachers <= len(store):
        raise InputError(f"{store.path}: {teachers} teachers are asked for, {len(store)} are recorded")
    synthetic.chosen(ema=ema)
    recorded_network(store.metadata["network"], store.path, "pass it to measure_trajectory_error as network")
    real = real_images(store, set_file, dataset, root).part(on)
    curves = measure_trajectory_error(
        synthetic,
        store,
        real,
        student_networks(store).build(0),
        teachers=range(teachers),
        syn_steps=n,
        expert_epochs=m,
        ema=ema,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=True,
    )
    curve = {
        "kind": KIND,
        "method": synthetic.metadata.get("method", "set"),
        "on": on,
        "ema": ema,
        "syn_steps": n,
        "expert_epochs": m,
        "seed": seed,
        "epochs": curves[0].epochs,
        **summarize(curves),
        "each": [curve._asdict() for curve in curves],
        "set": synthetic.metadata,
        "teachers": store.metadata,
        "versions": versions(),
    }
    write(curve, others, folder)
    print(table(curve))
    print(f"{folder / 'curve.json'}, curve.png and TensorBoard scalars are written")


def write(curve: dict[str, Any], others: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write a curve as JSON, as PNG (with others beside it) and as TensorBoard scalars."""
    write_json(folder / "curve.json", curve)
    with replacing(folder / "curve.png") as part:
        draw([curve, *others], part)
    # purge_step: TensorBoard forgets the curve that an earlier run left in this folder.
    with SummaryWriter(str(folder), purge_step=0) as board:
        for name, tag in TAGS.items():
            for epoch, value in zip(curve["epochs"], curve["mean"][name], strict=True):
                board.add_scalar(f"trajectory_error/{tag}", value, epoch)


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd trajectory-error``."""
    trajectory_error(**parse_command(trajectory_error, "trajectory-error", arguments))
