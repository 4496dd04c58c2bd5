"""Figure 1 and Eq. 6-8 measured: how far a student drifts from its teacher, in weights and in loss on real images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ftd_lightning.command_line import parse_command
from ftd_lightning.contracts import Images
from ftd_lightning.core.networks import student_networks
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore, check_compatible
from ftd_lightning.files.safetensors_io import read_json, versions, write_json
from ftd_lightning.files.schema import markdown_table
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.matching import chunked_permutations
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.trajectory_error import trajectory_errors
from ftd_lightning.functional.unroll import load_flat, unroll
from ftd_lightning.studies.plots import write_plot

if TYPE_CHECKING:
    from collections.abc import Iterator


class TrajectoryErrorCurve(NamedTuple):
    """How far students drift from one teacher: lists of numbers, one for each segment t of m epochs.

    Convention: entry t belongs to the end of segment t; ``functional.trajectory_error`` has the numbering. Norms are
    Euclidean, over all weights. Losses are means over the real images, natural logarithm.
    """

    teacher: int  # its number in the store
    initial_loss: float  # of the teacher at epoch 0
    epochs: list[int]  # m, 2m, ...
    teacher_loss: list[float]  # L(theta*), the grey line of Figure 1
    evaluation: list[float]  # L(theta) - L(theta*) of the student that trains on the set from epoch 0 on
    distillation: list[float]  # the same of students that start at the teacher's weights m epochs before
    epsilon: list[float]  # ||epsilon_t||, accumulated error (Eq. 8)
    delta: list[float]  # ||delta_t||, matching error (Eq. 6)
    initialization: list[float]  # ||I_{t-1}||, initialization error (Eq. 7) that entered in segment t; 0 in the first
    segment: list[float]  # ||theta*_{t,m} - theta*_{t,0}||, the distance that the teacher covers


QUANTITIES = TrajectoryErrorCurve._fields[3:]


@torch.no_grad()
def mean_loss(network: nn.Module, weights: Tensor, real: Images, *, batch_size: int = 1024) -> float:
    """Compute the mean cross entropy of a network with certain weights, without augmentation, in training mode.

    A trajectory holds no running statistics, so BatchNorm uses those of the batch.
    """
    load_flat(network, weights)
    total = 0.0
    for images, labels in zip(real.images.split(batch_size), real.labels.split(batch_size), strict=True):
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        total += float(cross_entropy(functional_call(network, buffers, (images,)), labels, reduction="sum"))
    return total / len(real.labels)


@torch.no_grad()
def measure_trajectory_error(
    synthetic: SyntheticSet,
    store: TrajectoryStore,
    real: Images,
    network: nn.Module,
    *,
    teachers: Sequence[int] = (0,),
    syn_steps: int | None = None,
    expert_epochs: int | None = None,
    ema: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
    progress: bool = False,
) -> list[TrajectoryErrorCurve]:
    """Train students on a synthetic set along recorded teachers and compare them at every m-th epoch.

    The steps are those of distillation: plain SGD with the learned step size, n of them for m teacher epochs, mini-
    batches and augmentation as recorded in the set. All students of a segment see the same batches and augmentation, so
    that differences come from the weights alone.

    Args:
        synthetic: the set.
        store: its teachers, or others of the same network, data set and transform.
        real: images that the loss is measured on, transformed as the teachers saw them.
        network: the teachers' architecture; serves as a workspace, moved to ``device`` and put into training mode.
        teachers: their numbers.
        syn_steps: n; None takes the set's.
        expert_epochs: m; None takes the set's. Epochs beyond the last whole segment are left out.
        ema: use the averaged images.
        seed: decides mini-batches and augmentation.
        device: where to compute.
        batch_size: real images per forward pass.
        progress: show a progress bar.
    """
    settings = synthetic.metadata.get("settings", {})
    n, m = syn_steps or settings.get("syn_steps"), expert_epochs or settings.get("expert_epochs")
    if not n or not m:
        raise InputError("the set does not record its inner loop: pass --syn-steps and --expert-epochs")
    recorded: dict[str, Any] = {key: synthetic.metadata.get(key) for key in ("network", "dataset")}
    recorded["transform"] = synthetic.transform.describe()
    check_compatible(store, {key: value for key, value in recorded.items() if value is not None})
    if m > store.epochs:
        raise InputError(f"{store.path}: expert_epochs={m} is asked for, but its teachers have {store.epochs} epochs")
    if synthetic.step_size is None:
        raise InputError("this synthetic set has no learned step size, which a student needs")
    network = network.to(device).train()
    real = Images(*(part.to(device) for part in real))
    images, labels = synthetic.chosen(ema=ema).to(device), synthetic.training_labels().to(device)
    step_size = synthetic.step_size.to(device)
    augment = Augmentation.of(synthetic.metadata.get("augmentation") or "") or None

    def ends(teacher: int) -> Iterator[Tensor]:
        yield store.segment(teacher, 0, m).start.to(device)
        for start in range(0, store.epochs // m * m, m):
            yield store.segment(teacher, start, m).target.to(device)

    def curve(teacher: int) -> TrajectoryErrorCurve:
        def advance(weights: Tensor, segment: int) -> Tensor:
            order = make_generator(seed, "error batches", teacher, segment)
            batches = chunked_permutations(len(images), n, order, batch_size=settings.get("syn_batch"))
            draws = derive_seed(seed, "error dsa", teacher, segment)
            return unroll(network, weights, images, labels, step_size, batches=batches, augment=augment, seed=draws)

        loss = partial(mean_loss, network, real=real, batch_size=batch_size)
        rows: list[tuple[float, ...]] = []
        initial_loss = loss(next(ends(teacher)))
        for segment, error in enumerate(trajectory_errors(advance, ends(teacher))):
            parts = (error.accumulated, error.matching, error.initialization, error.target - error.start)
            norms = [float(part.norm()) for part in parts]
            if not all(map(math.isfinite, norms)):
                where = f"teacher {teacher}: the student's weights are not finite at epoch {segment * m + m}"
                raise DivergenceError(f"{where}; the set's step size may be too large for its network")
            teacher_loss = loss(error.target)
            rows.append((teacher_loss, loss(error.student) - teacher_loss, loss(error.fresh) - teacher_loss, *norms))
            bar.update()
        columns = [list(column) for column in zip(*rows, strict=True)]
        return TrajectoryErrorCurve(teacher, initial_loss, [m * (t + 1) for t in range(len(rows))], *columns)

    with tqdm(total=len(teachers) * (store.epochs // m), desc="segments", disable=not progress, leave=False) as bar:
        return [curve(teacher) for teacher in teachers]


def summarize(curves: Sequence[TrajectoryErrorCurve]) -> dict[str, dict[str, list[float]]]:
    """Average curves over teachers: mean and population standard deviation of every quantity, per epoch."""
    columns = {name: list(zip(*(getattr(curve, name) for curve in curves), strict=True)) for name in QUANTITIES}
    return {
        "mean": {name: [statistics.fmean(values) for values in column] for name, column in columns.items()},
        "std": {name: [statistics.pstdev(values) for values in column] for name, column in columns.items()},
    }


def real_images(store: TrajectoryStore, file: Path, dataset: str | None, root: str) -> DistillationDataModule:
    """Read the real images as the teachers saw them, through the set's transform."""
    recorded = store.metadata.get("dataset")
    described: dict[str, Any] = recorded if isinstance(recorded, dict) else {"name": recorded}
    chosen = ("val_fraction", "test_fraction", "classes", "max_per_class", "seed", "image_size")
    options = {key: described[key] for key in chosen if described.get(key) is not None}
    dataset = dataset or described["name"]
    if not dataset:
        raise InputError(f"{store.path}: its teachers do not name their data set: give --dataset")
    data = DistillationDataModule(dataset, root, synthetic=str(file), **options)
    data.setup()
    check_compatible(store, data.describe())
    return data


def table(curve: dict[str, Any], *, rows: int = 10) -> str:
    """Format a curve as a table of about ``rows`` epochs at most, the last one included."""
    epochs = curve["epochs"]
    head = ["L(teacher)", "L(student) - L(teacher), evaluation", "the same, distillation"]
    lines = [["epoch", *head, "norm of epsilon", "of delta", "of I", "of the segment"]]
    for index in sorted(range(len(epochs) - 1, -1, -max(1, len(epochs) // rows))):
        values = [curve["mean"][name][index] for name in QUANTITIES]
        lines.append([str(epochs[index]), *(f"{value:.4f}" for value in values)])
    return markdown_table(lines)


def draw(curves: Sequence[dict[str, Any]], axes: Any) -> None:
    """Draw curves as in Figure 1, the first one's teacher in grey on a second axis, and norms of the errors below."""
    figure = axes.figure
    axes.remove()
    above, below = figure.subplots(2, 1, sharex=True)
    grey, first = above.twinx(), curves[0]
    grey.plot(first["epochs"], first["mean"]["teacher_loss"], color="0.6", label=f"teacher of {first['method']}")
    grey.set_ylabel("L(teacher)", color="0.5")
    above.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    for index, curve in enumerate(curves):
        name, epochs = curve["method"] + (" EMA" if curve["ema"] else ""), curve["epochs"]
        for kind, style in (("evaluation", "-"), ("distillation", "--")):
            mean, std = torch.tensor(curve["mean"][kind]), torch.tensor(curve["std"][kind])
            above.plot(epochs, mean, style, color=f"C{index}", label=f"{name}, {kind}")
            above.fill_between(epochs, mean - std, mean + std, color=f"C{index}", alpha=0.15, linewidth=0)
        for kind, symbol, style in (("epsilon", "ε", "-"), ("delta", "δ", "--"), ("initialization", "I", ":")):
            below.plot(epochs, curve["mean"][kind], style, color=f"C{index}", label=f"{name}, ‖{symbol}‖")
    above.set_ylabel(f"L(student) - L(teacher), {' and '.join(sorted({curve['on'] for curve in curves}))} images")
    below.set(xlabel="teacher epoch", ylabel="norm of the error")
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(curves))


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
    out: Path | None = None,
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
        out: by default a folder trajectory_error beside the set.
        against: a curve.json to draw beside it.
        seed: of mini-batches and augmentation.
    """
    others = [read_json(path) for path in against]
    for path, found in zip(against, others, strict=True):
        if found.get("kind") != "trajectory_error":
            raise InputError(f"{path}: is no curve.json of ftd trajectory-error")
    folder = out or set_file.parent / "trajectory_error"
    synthetic, store = SyntheticSet.load(set_file), TrajectoryStore(store_folder)
    curves = measure_trajectory_error(
        synthetic,
        store,
        real_images(store, set_file, dataset, root).part(on),
        student_networks(store).build(0),
        teachers=range(teachers),
        syn_steps=syn_steps,
        expert_epochs=expert_epochs,
        ema=ema,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=True,
    )
    curve = {
        "kind": "trajectory_error",
        "method": synthetic.metadata.get("method", "set"),
        "on": on,
        "ema": ema,
        "syn_steps": syn_steps or synthetic.metadata["settings"]["syn_steps"],
        "expert_epochs": curves[0].epochs[0],
        "seed": seed,
        "epochs": curves[0].epochs,
        **summarize(curves),
        "each": [curve._asdict() for curve in curves],
        "set": synthetic.metadata,
        "teachers": store.metadata,
        "versions": versions(),
    }
    write_json(folder / "curve.json", curve)
    write_plot(folder / "curve.png", partial(draw, [curve, *others]), size=(7, 8))
    print(f"{table(curve)}\nresults   {folder}")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd trajectory-error``."""
    trajectory_error(**parse_command(trajectory_error, "trajectory-error", arguments))
