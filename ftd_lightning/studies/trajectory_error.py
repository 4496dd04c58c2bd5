"""Figure 1 and Eq. 6-8 measured: how far a student drifts from its teacher, in weights and in loss on real images."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ftd_lightning.contracts import Images
from ftd_lightning.data.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.mini_batches import chunked_permutations
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.trajectory_error import trajectory_errors
from ftd_lightning.functional.unroll import load_flat, unroll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ftd_lightning.data.synthetic_set import SyntheticSet


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
