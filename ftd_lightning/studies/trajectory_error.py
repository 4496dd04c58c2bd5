"""Figure 1 and Eq. 6-8 measured: how far a student drifts from its teacher, in weights and in loss on real images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence  # noqa: TC003 -- the command line reads signatures when it runs
from functools import partial
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from ftd_lightning.command_line import parse_command
from ftd_lightning.contracts import Images
from ftd_lightning.core.networks import student_networks
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore, check_compatible
from ftd_lightning.files.safetensors_io import replacing, versions, write_json
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.matching import chunked_permutations
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.trajectory_error import trajectory_errors
from ftd_lightning.functional.unroll import load_flat, unroll
from ftd_lightning.models.registry import recorded_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class TrajectoryErrorCurve(NamedTuple):
    """How far students drift from one teacher: lists of K numbers, one per segment.

    Convention: entry t belongs to the end of segment t, at teacher epoch ``epochs[t]``; see
    ``functional.trajectory_error`` for the numbering. Norms are Euclidean, over all weights. Losses are means over the
    real images, natural logarithm.

    Attributes:
        teacher: its number in the store.
        initial_loss: of the teacher at epoch 0.
        epochs: m, 2m, .. K m.
        teacher_loss: L(theta*), the grey line of Figure 1.
        evaluation: L(theta) - L(theta*) of the student that trains on the set from epoch 0 on.
        distillation: the same of students that start at the teacher's weights m epochs before.
        epsilon: ||epsilon_t||, accumulated error (Eq. 8).
        delta: ||delta_t||, matching error (Eq. 6).
        initialization: ||I_{t-1}||, initialization error (Eq. 7) that entered in segment t; 0 in the first.
        segment: ||theta*_{t,m} - theta*_{t,0}||, the distance that the teacher covers, as a scale for the others.
    """

    teacher: int
    initial_loss: float
    epochs: list[int]
    teacher_loss: list[float]
    evaluation: list[float]
    distillation: list[float]
    epsilon: list[float]
    delta: list[float]
    initialization: list[float]
    segment: list[float]


QUANTITIES = TrajectoryErrorCurve._fields[3:]


def inner_settings(synthetic: SyntheticSet, syn_steps: int | None, expert_epochs: int | None) -> tuple[int, int]:
    """Return n and m: as asked for, or else those that the set was distilled with.

    Raises:
        InputError: if the set does not record them, or for numbers below 1.
    """
    recorded = synthetic.metadata.get("settings", {})
    values = []
    for name, chosen in (("syn_steps", syn_steps), ("expert_epochs", expert_epochs)):
        value = recorded.get(name) if chosen is None else chosen
        if value is None:
            raise InputError(f"the set does not record its {name}: pass --{name.replace('_', '-')}")
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
        values.append(int(value))
    return values[0], values[1]


def check_set(synthetic: SyntheticSet, store: TrajectoryStore, expert_epochs: int) -> None:
    """Refuse a set that was not distilled for such teachers.

    What a set does not record, as an imported one may not, is not compared.

    Raises:
        InputError: for another network, data set or transform, teachers shorter than a segment, or a set without a
            step size.
    """
    recorded: dict[str, Any] = {
        key: synthetic.metadata[key] for key in ("network", "dataset") if key in synthetic.metadata
    }
    check_compatible(store, {**recorded, "transform": synthetic.transform.describe()})
    if expert_epochs > store.epochs:
        raise InputError(
            f"{store.path}: expert_epochs={expert_epochs} is asked for, but its teachers have {store.epochs} epochs"
        )
    if synthetic.step_size is None:
        raise InputError("this synthetic set has no learned step size, which a student needs")


@torch.no_grad()
def mean_loss(network: nn.Module, weights: Tensor, real: Images, *, batch_size: int = 1024) -> float:
    """Compute the mean cross entropy of a network with certain weights.

    Convention: the mode of the network is left as it is; it should be in training mode, as students are, because a
    trajectory holds no running statistics and BatchNorm then uses those of the batch. No augmentation.

    Args:
        network: receives the weights, and keeps its buffers.
        weights: (P,).
        real: labelled images on the network's device.
        batch_size: images per forward pass.
    """
    load_flat(network, weights)
    total = 0.0
    for images, labels in zip(real.images.split(batch_size), real.labels.split(batch_size), strict=True):
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        logits = functional_call(network, buffers, (images,))
        total += float(cross_entropy(logits, labels, reduction="sum"))
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

    The steps are those of distillation: plain SGD with the learned step size, n of them for m teacher epochs,
    mini-batches and augmentation as recorded in the set. All students of a segment see the same batches and
    augmentation, so that differences come from the weights alone.

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

    Returns:
        One curve per teacher.

    Raises:
        InputError: for a set and a store that do not fit, see :func:`check_set`, or a teacher that was not recorded.
        DivergenceError: if a student's weights do not stay finite.
    """
    n, m = inner_settings(synthetic, syn_steps, expert_epochs)
    check_set(synthetic, store, m)
    network = network.to(device).train()
    real = Images(real.images.to(device), real.labels.to(device))
    advance = _students(network, synthetic, n, ema=ema, seed=seed, device=device)
    curves = []
    with tqdm(total=len(teachers) * (store.epochs // m), desc="segments", disable=not progress, leave=False) as bar:
        for teacher in teachers:
            ends = _ends(store, teacher, m, device)
            loss = partial(mean_loss, network, real=real, batch_size=batch_size)
            curves.append(_curve(teacher, m, ends, partial(advance, teacher), loss, bar))
    return curves


def _students(
    network: nn.Module, synthetic: SyntheticSet, n: int, *, ema: bool, seed: int, device: torch.device | str
) -> Callable[[int, Tensor, int], Tensor]:
    """Return advance(teacher, weights, segment)."""
    images, labels = synthetic.chosen(ema=ema).to(device), synthetic.training_labels().to(device)
    assert synthetic.step_size is not None
    step_size = synthetic.step_size.to(device)
    augment = Augmentation.of(synthetic.metadata.get("augmentation") or "")
    batch_size = synthetic.metadata.get("settings", {}).get("syn_batch")

    def advance(teacher: int, weights: Tensor, segment: int) -> Tensor:
        order = make_generator(seed, "error batches", teacher, segment)
        batches = chunked_permutations(len(images), n, order, batch_size=batch_size)
        draws = derive_seed(seed, "error dsa", teacher, segment)
        return unroll(network, weights, images, labels, step_size, batches=batches, augment=augment or None, seed=draws)

    return advance


def _ends(store: TrajectoryStore, teacher: int, m: int, device: torch.device | str) -> Iterator[Tensor]:
    """Read the ends of a teacher's segments one at a time."""
    yield store.segment(teacher, 0, m).start.to(device)
    for start in range(0, store.epochs // m * m, m):
        yield store.segment(teacher, start, m).target.to(device)


def _curve(
    teacher: int,
    m: int,
    ends: Iterable[Tensor],
    advance: Callable[[Tensor, int], Tensor],
    loss: Callable[[Tensor], float],
    bar: Any,
) -> TrajectoryErrorCurve:
    rows: list[tuple[float, ...]] = []
    initial_loss = float("nan")
    for segment, error in enumerate(trajectory_errors(advance, ends)):
        if segment == 0:
            initial_loss = loss(error.start)
        norms = [error.accumulated.norm(), error.matching.norm(), error.initialization.norm()]
        if not all(bool(torch.isfinite(norm)) for norm in norms):
            raise DivergenceError(
                f"teacher {teacher}: the student's weights are not finite at epoch {segment * m + m}; "
                "the set's step size may be too large for its network"
            )
        teacher_loss = loss(error.target)
        differences = (loss(error.student) - teacher_loss, loss(error.fresh) - teacher_loss)
        rows.append((teacher_loss, *differences, *map(float, norms), float((error.target - error.start).norm())))
        bar.update()
    columns = [list(column) for column in zip(*rows, strict=True)]
    return TrajectoryErrorCurve(teacher, initial_loss, [m * (t + 1) for t in range(len(rows))], *columns)


def summarize(curves: Sequence[TrajectoryErrorCurve]) -> dict[str, dict[str, list[float]]]:
    """Average curves over teachers: mean and population standard deviation of every quantity, per epoch.

    Example:
        >>> one = TrajectoryErrorCurve(0, 2.0, [1], *([[1.0]] * 7))
        >>> summarize([one, one._replace(epsilon=[3.0])])["mean"]["epsilon"]
        [2.0]
    """
    both: dict[str, dict[str, list[float]]] = {"mean": {}, "std": {}}
    for name in QUANTITIES:
        columns = list(zip(*(getattr(curve, name) for curve in curves), strict=True))
        both["mean"][name] = [statistics.fmean(column) for column in columns]
        both["std"][name] = [statistics.pstdev(column) for column in columns]
    return both


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
