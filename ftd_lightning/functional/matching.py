"""The matching loss of a segment, and the mini-batches of its inner steps."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.functional.unroll import roll_out
from ftd_lightning.functional.unroll import unroll as unroll_student

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from ftd_lightning.functional.compiling import Compile
    from ftd_lightning.functional.inner_step import Precision
    from ftd_lightning.functional.unroll import Augment, Unroll


def chunked_permutations(
    num_images: int, num_steps: int, generator: torch.Generator, *, batch_size: int | None = None
) -> list[Tensor]:
    """Draw the mini-batches of the inner steps: a random permutation split into chunks, drawn anew when used up.

    Args:
        num_images: N, size of the synthetic set.
        num_steps: n, number of inner steps.
        generator: decides the permutations; a CPU generator.
        batch_size: images per step; None or >= N means all of them at every step. The last chunk of a permutation is
            smaller where N is not a multiple of it.

    Returns:
        n int64 index tensors.

    Example:
        >>> [len(b) for b in chunked_permutations(5, 4, torch.Generator(), batch_size=2)]
        [2, 2, 1, 2]
    """
    if batch_size is None or batch_size >= num_images:
        return [torch.arange(num_images)] * num_steps

    def chunks() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(num_images, generator=generator).split(batch_size)

    return [chunk for _, chunk in zip(range(num_steps), chunks(), strict=False)]


class SegmentRule(Protocol):
    """The hooks of ``rules.MatchingRule``, described there, that change the loss of a segment."""

    @property
    def name(self) -> str: ...  # noqa: D102

    def begin(self, start: Tensor, target: Tensor, generator: torch.Generator) -> Tensor: ...  # noqa: D102

    def distance(self, student: Tensor, target: Tensor) -> Tensor | None: ...  # noqa: D102

    def compared(self, student: Tensor, noise: Tensor) -> Tensor: ...  # noqa: D102

    def keep(self, student: Tensor, start: Tensor, target: Tensor) -> Tensor | None: ...  # noqa: D102


class Match(NamedTuple):
    """The matching loss of a segment, a scalar, and the number of inner steps that were unrolled."""

    loss: Tensor
    steps: int


def normalized_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Divide the student's squared distance from the target by the teacher's squared displacement.

    ``||theta_n - theta*_{t+m}||^2 / ||theta*_t - theta*_{t+m}||^2``, summed over all parameters.

    Convention: 1 for a student that did not move, 0 for one that arrived; inf or nan if ``start`` equals ``target``.

    Args:
        student: theta_n, (P,).
        start: theta*_t, (P,).
        target: theta*_{t+m}, (P,).

    Example:
        >>> normalized_distance(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([2.0, 0.0]))
        tensor(0.2500)
    """
    return (student - target).square().sum() / (start - target).square().sum()


def pruned_distance(student: Tensor, start: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Measure the normalized distance over the parameters that are kept (the loss of DPD).

    ``sum_K (theta_n - theta*_{t+m})^2 / sum_K (theta*_t - theta*_{t+m})^2``: one mask for numerator and denominator.

    Convention: with nothing dropped this is ``normalized_distance``, bit for bit. If the teacher did not move any of
    the kept parameters, the denominator is its displacement in all of them.

    Args:
        student: theta_n, (P,).
        start: theta*_t, (P,).
        target: theta*_{t+m}, (P,).
        keep: (P,) bool, e.g. from ``DropLargest.keep``.
    """
    # Zeros for dropped parameters, instead of shorter vectors: no synchronisation, and the same order of sums.
    movement = (start - target).square()
    kept = torch.where(keep, movement, 0.0).sum()
    denominator = torch.where(kept > 0, kept, movement.sum())
    return torch.where(keep, (student - target).square(), 0.0).sum() / denominator


def trajectory_matching_loss(
    network: nn.Module,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    *,
    batches: Sequence[Tensor],
    augment: Augment | None = None,
    seed: int = 0,
    unroll: Unroll = "adjoint",
    rules: Sequence[SegmentRule] = (),
    compile: Compile = "auto",  # noqa: A002
    precision: Precision = "float32",
) -> Tensor:
    """Unroll a student from the teacher's weights on the synthetic set and measure where it ends (Eq. 4-5).

    Args:
        network: the architecture; its own weights and buffers are neither used nor changed.
        start: theta*_t, (P,), in the order of ``network.parameters()``.
        target: theta*_{t+m}, (P,).
        images: (N, C, H, W), standardised or whitened as those of the teachers.
        labels: (N,) int64 classes, or (N, K) probabilities.
        step_size: the inner learning rate, a scalar tensor > 0.
        batches: one index tensor into ``images`` per inner step; n is their number. See ``chunked_permutations``.
        augment: ``augment(batch, generator) -> batch``, differentiable and random only through the generator; see
            ``Augmentation``.
        seed: decides what the generators draw; inner step i always draws the same.
        unroll: "adjoint" (exact gradient, memory of one step) or "graph" (keeps the graph of all steps).
        rules: variants of the loss, applied in order, e.g. ``RobustStart`` or ``DropLargest``; see ``MatchingRule``.
        compile: whether "adjoint" compiles its steps; see ``unroll``.
        precision: of the steps, "float32" or "bf16"; see ``unroll``.

    Returns:
        A scalar, differentiable in ``images`` and ``step_size`` (and in ``start`` and soft ``labels``).

    Raises:
        ValueError: for weights of another network, labels that do not fit the images, a network that draws random
            numbers, an unknown ``unroll``, ``compile`` or ``precision``, or rules that exclude each other.
    """
    options: dict[str, Any] = {"unroll": unroll, "augment": augment, "seed": seed, "compile": compile}
    options |= {"batches": batches, "rules": rules, "precision": precision}
    found = match(network, start, target, images, labels, step_size, **options)
    return found.loss


def match(
    network: nn.Module,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    *,
    batches: Sequence[Tensor],
    rules: Sequence[SegmentRule] = (),
    seed: int = 0,
    unroll: Unroll = "adjoint",
    **options: Any,
) -> Match:
    """Compute :func:`trajectory_matching_loss`, with the same arguments, and count the steps that were unrolled."""
    if target.shape != start.shape:
        raise ValueError(f"the target has shape {tuple(target.shape)}, the start {tuple(start.shape)}")
    begins = [start]
    for rule in rules:
        begins.append(rule.begin(begins[-1], target, make_generator(seed, rule.name)))
    noises = [begin - before for before, begin in itertools.pairwise(begins)]

    def compared(student: Tensor) -> Tensor:
        for rule, noise in zip(rules, noises, strict=True):
            student = rule.compared(student, noise)
        return student

    arguments = (network, begins[-1], images, labels, step_size)
    chooses = [rule for rule in rules if rule.distance(start, target) is not None]
    if len(chooses) > 1:
        raise ValueError(f"rules: {' and '.join(rule.name for rule in chooses)} each choose the step: give one of them")
    if chooses:
        steps = roll_out(*arguments, batches=batches, seed=seed, **options)
        batches = batches[: closest([chooses[0].distance(compared(weights), target) for weights in steps])]
    end = compared(unroll_student(*arguments, batches=batches, seed=seed, method=unroll, **options))
    masks = [mask for rule in rules if (mask := rule.keep(end.detach(), start, target)) is not None]
    if not masks:
        return Match(normalized_distance(end, start, target), len(batches))
    return Match(pruned_distance(end, start, target, torch.stack(masks).all(0)), len(batches))


def closest(distances: Sequence[Tensor | None]) -> int:
    """Return the number, from 1, of the step of the smallest distance, the last of equal ones; NaN is infinite."""
    measured = torch.stack([distance for distance in distances if distance is not None])
    measured = measured.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return int((measured == measured.min()).nonzero()[-1, 0]) + 1
