"""The inner loop: n steps of a student on the synthetic set, with its exact gradient; see :mod:`.adjoint`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from ftd_lightning.functional.adjoint import OptimizerAdjoint, PlainAdjoint
from ftd_lightning.functional.inner_optimizers import InnerSGD
from ftd_lightning.functional.inner_step import inner_step, named_views, student_loss
from ftd_lightning.functional.student import Augment, Student, require_function, step_size_of
from ftd_lightning.functional.to_device import to_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ftd_lightning.functional.compiling import Compile
    from ftd_lightning.functional.inner_optimizers import InnerOptimizer, State

Unroll = Literal["adjoint", "graph"]


def flatten_parameters(network: nn.Module) -> Tensor:
    """Copy a network's weights into one vector.

    Returns:
        (P,), detached and sharing no memory with the network, in the order of ``network.parameters()``.

    Example:
        >>> flatten_parameters(nn.Linear(2, 3)).shape
        torch.Size([9])
    """
    # cat copies even a single tensor, so that a snapshot is never a view of live weights.
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def load_flat(network: nn.Module, flat: Tensor) -> None:
    """Copy a vector of weights into a network, in place; the inverse of :func:`flatten_parameters`.

    Args:
        network: receives the weights.
        flat: (P,).

    Raises:
        ValueError: if P is not the network's number of weights.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> load_flat(net, torch.zeros(9)); bool(net.weight.eq(0).all())
        True
    """
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), named_views(network, flat).values(), strict=True):
            parameter.copy_(value)


def unroll(
    network: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    *,
    batches: Sequence[Tensor],
    augment: Augment | None = None,
    seed: int = 0,
    method: Unroll = "adjoint",
    compile: Compile = "auto",  # noqa: A002
    optimizer: InnerOptimizer = InnerSGD(),  # noqa: B008  frozen
    skip: int = 0,
) -> Tensor:
    """Train a student for n steps on the synthetic set, differentiably (A[grad L_S, n] of Eq. 5).

    Args:
        network: the architecture; its own weights and buffers are neither used nor changed.
        start: theta_0, (P,), in the order of ``network.parameters()``.
        images: (N, C, H, W).
        labels: (N,) int64 classes, or (N, K) probabilities.
        step_size: a scalar tensor, or (n,), one for each step.
        batches: n index tensors into ``images``.
        augment: ``augment(batch, generator) -> batch``; "adjoint" calls it twice per step, with equal generators.
        seed: decides what the generators draw.
        method: "adjoint" or "graph"; results are the same up to rounding.
        compile: whether "adjoint" compiles its steps: True, False, "auto" (on a GPU only), or "cuda_graphs" (also
            replays CUDA graphs on a GPU). Compilation happens once per network and shape of the mini-batch; if it
            fails, there is one warning and the steps run eagerly.
        optimizer: plain SGD, or one with a state: ``InnerSGD`` with momentum or weight decay, ``InnerAdam``.
        skip: the first s of the steps run without gradient (truncation); the optimizer's state is carried over them.

    Returns:
        theta_n, (P,), differentiable in images, step_size, soft labels ("adjoint": once) and, without ``skip``, start.

    Raises:
        ValueError: for weights of another network, labels that do not fit the images, step sizes that do not fit the
            batches, a ``skip`` that is no number of steps, or an unknown method or setting.
        InputError: (a ValueError) for a network that draws random numbers: dropout, drop path. The adjoint repeats each
            step and would draw other numbers. The first call for a network and mode runs the network once to see.

    Convention: the network is taken in the mode it is in; students are in training mode. Call it outside autocast: the
    backward pass would not be under it, and would differentiate another function.

    Example:
        >>> net, lr = nn.Linear(1, 2, bias=False), torch.tensor(1.0)
        >>> unroll(net, torch.zeros(2), torch.ones(1, 1), torch.tensor([0]), lr, batches=[torch.tensor([0])])
        tensor([ 0.5000, -0.5000])
    """
    if method not in get_args(Unroll):
        raise ValueError(f"unroll {method!r} is unknown: choose from {list(get_args(Unroll))}")
    if not 0 <= skip <= len(batches):
        raise ValueError(f"skip={skip} is no number of the {len(batches)} steps")
    # The full graph is differentiated twice, which a compiled function cannot be.
    compile = compile if method == "adjoint" else False  # noqa: A001
    student = _student(network, start, images, labels, batches=batches, augment=augment, seed=seed, compile=compile)
    check_step_size(step_size, len(batches))
    state = optimizer.initial(start.detach())
    if skip:
        *_, (start, state) = itertools.islice(_run(student, optimizer, start, images, labels, step_size), skip)
    # Without gradients there is no graph to keep, and the adjoint's forward pass computes the same numbers.
    if method == "adjoint" or not torch.is_grad_enabled():
        weights: Tensor
        if optimizer.is_plain:
            weights = PlainAdjoint.apply(student, skip, start, images, labels, step_size)
        else:
            weights = OptimizerAdjoint.apply(student, (optimizer, skip), start, images, labels, step_size, *state)
        return weights
    weights = start if start.requires_grad else start.detach().clone().requires_grad_()
    for step in range(skip, len(batches)):
        index = student.batches[step]
        loss = student_loss(network, weights, student.augmented(images[index], step), labels[index])
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights, state = optimizer.step(weights, gradient, state, step_size_of(step_size, step), step + 1)
    return weights


@torch.no_grad()
def roll_out(
    network: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    *,
    batches: Sequence[Tensor],
    augment: Augment | None = None,
    seed: int = 0,
    compile: Compile = "auto",  # noqa: A002
    optimizer: InnerOptimizer = InnerSGD(),  # noqa: B008  frozen
) -> Iterator[Tensor]:
    """Train a student as :func:`unroll` does, without gradient, and yield its weights after every step.

    Args: as for :func:`unroll`.

    Yields:
        theta_1, ..., theta_n, (P,) each; nothing is kept.

    Example:
        >>> net, lr = nn.Linear(1, 2, bias=False), torch.tensor(1.0)
        >>> batches = [torch.tensor([0])]
        >>> list(roll_out(net, torch.zeros(2), torch.ones(1, 1), torch.tensor([0]), lr, batches=batches))
        [tensor([ 0.5000, -0.5000])]
    """
    student = _student(network, start, images, labels, batches=batches, augment=augment, seed=seed, compile=compile)
    check_step_size(step_size, len(batches))
    for weights, _ in _run(student, optimizer, start, images, labels, step_size):
        yield weights


@torch.no_grad()
def _run(
    student: Student, optimizer: InnerOptimizer, start: Tensor, images: Tensor, labels: Tensor, step_size: Tensor
) -> Iterator[tuple[Tensor, State]]:
    """Yield weights and the optimizer's state after every step, detached."""
    weights, state, network = start.detach(), optimizer.initial(start.detach()), student.network
    for step in range(len(student.batches)):
        x, y = student.batch(step, images, labels)
        lr = step_size_of(step_size, step).detach()
        if optimizer.is_plain:
            weights = student.step.forward(network, weights, x, y, lr)
        else:
            gradient = student.step.gradient(network, weights, x, y)
            weights, state = optimizer.step(weights, gradient, state, lr, step + 1)
        yield weights, state


def check_step_size(step_size: Tensor, steps: int) -> None:
    """Refuse step sizes that are neither one for all steps nor one for each.

    Raises:
        ValueError: for other shapes.
    """
    if tuple(step_size.shape) not in ((), (steps,)):
        raise ValueError(f"step_size has shape {tuple(step_size.shape)}: one for all, or one for each of {steps} steps")


def _student(
    network: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    batches: Sequence[Tensor],
    augment: Augment | None,
    seed: int,
    compile: Compile,  # noqa: A002
) -> Student:
    """Check what belongs together, and move the batches' indices to the images."""
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    named_views(network, start)
    step_functions = inner_step(network, device=start.device, compile=compile)
    unique = list({id(batch): batch for batch in batches}.values())  # full batches are one and the same tensor
    together = to_device(torch.cat(unique), images.device) if unique else torch.empty(0)  # in one copy
    moved = dict(zip(map(id, unique), together.split([len(batch) for batch in unique]), strict=True))
    student = Student(network, [moved[id(batch)] for batch in batches], augment, seed, step_functions)
    if batches:
        require_function(network, start, images, student.batches[0])
    return student
