"""The student's training on the synthetic set, and its exact gradient in the memory of one step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftd_lightning.errors import InputError
from ftd_lightning.functional.gsam import flatten
from ftd_lightning.functional.inner_optimizers import InnerSGD, at_step
from ftd_lightning.functional.inner_step import (
    InnerStep,
    Precision,
    draws_random_numbers,
    inner_step,
    loss_in,
    named_views,
)
from ftd_lightning.functional.seeding import make_generator, to_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ftd_lightning.functional.compiling import Compile
    from ftd_lightning.functional.inner_optimizers import InnerOptimizer, State

Augment = Callable[[Tensor, torch.Generator], Tensor]

# The modes (of all modules) in which a network was seen to be a function of its weights.
_functions: WeakKeyDictionary[nn.Module, set[tuple[bool, ...]]] = WeakKeyDictionary()


class Student(NamedTuple):
    """A network, its mini-batches, and the functions that train it on them."""

    network: nn.Module
    batches: Sequence[Tensor]
    augment: Augment | None
    seed: int
    functions: InnerStep
    optimizer: InnerOptimizer

    def augmented(self, images: Tensor, step: int) -> Tensor:
        """Augment the mini-batch of a step; a repeated step draws the same augmentation."""
        return images if self.augment is None else self.augment(images, make_generator(self.seed, "inner", step))

    def advance(
        self, step: int, weights: Tensor, state: State, images: Tensor, labels: Tensor, step_size: Tensor
    ) -> tuple[Tensor, State, tuple[Tensor, ...]]:
        """Make a step without gradient; return weights and state after it, and what :class:`Adjoint` keeps of it."""
        index, lr = self.batches[step], at_step(step_size, step).detach()
        x, y = self.augmented(images.detach()[index], step), labels.detach()[index]
        if self.optimizer.is_plain:
            return self.functions.forward(self.network, weights, x, y, lr), (), (weights,)
        gradient = self.functions.gradient(self.network, weights, x, y)
        return *self.optimizer.step(weights, gradient, state, lr, step + 1), (weights, gradient, *state)


def require_function(network: nn.Module, weights: Tensor, images: Tensor, index: Tensor) -> None:
    """Refuse a network that draws random numbers, once per network and mode."""
    mode = tuple(module.training for module in network.modules())
    seen = _functions.setdefault(network, set())
    if mode not in seen:
        if draws_random_numbers(network, images.detach()[index], weights=weights.detach()):
            name = type(network).__name__
            raise InputError(
                f"{name} draws random numbers (dropout, drop path): a student must be a function of its weights"
            )
        seen.add(mode)


class Adjoint(torch.autograd.Function):
    """theta_n as a function of the weights after ``done`` steps, images, labels, step size(s) and optimizer state.

    With ``path`` all of theta_{done+1} ... theta_n, (n - done, P): the adjoint adds the outer gradient of each.

    Plain SGD has a separate branch, because its step and its adjoint are one compiled function each, update included.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Student,
        done: int,
        path: bool,
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        step_sizes: Tensor,
        *state: Tensor,
    ) -> Tensor:
        """Run the steps and keep the weights before each."""
        weights = start.detach().clone()
        ctx.student, ctx.done, ctx.path, ctx.states = student, done, path, len(state)
        saved, after = list(state), []
        for step in range(done, len(student.batches)):
            weights, state, kept = student.advance(step, weights, state, images, labels, step_sizes)
            saved += kept
            after.append(weights)
        # Saved through autograd, so that a set changed in place before backward is an error, not a wrong gradient.
        ctx.save_for_backward(images, labels, step_sizes, *saved)
        return torch.stack(after) if path else weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        """Go through the steps backwards."""
        images, labels, step_sizes, *path = (saved.detach() for saved in ctx.saved_tensors)
        initial, path = path[: ctx.states], path[ctx.states :]
        student, done, want = ctx.student, ctx.done, ctx.needs_input_grad[4:6]
        adjoint = outer[-1].clone() if ctx.path else outer
        grad_images, grad_labels = (
            torch.zeros_like(t) if w else None for t, w in zip((images, labels), want, strict=True)
        )
        grad_sizes = torch.zeros_like(step_sizes)
        of_state: State = tuple(torch.zeros_like(value) for value in initial)
        kept = len(path) // max(1, len(student.batches) - done)
        for step in reversed(range(done, len(student.batches))):
            weights, *rest = path[(step - done) * kept :][:kept]
            index, lr = student.batches[step], at_step(step_sizes, step)
            raw = images[index].requires_grad_(want[0])
            with torch.enable_grad():
                x = student.augmented(raw, step)
            batch = (student.network, weights, x.detach(), labels[index])
            if student.optimizer.is_plain:
                s, adjoint, in_x, in_labels = student.functions.adjoint(*batch, adjoint, lr, want)
                in_lr, scale = -s, -lr
            else:
                through, gamma, in_lr, *of_before = _through_optimizer(
                    student.optimizer, step + 1, (weights, *rest), lr, (adjoint, *of_state)
                )
                _, in_weights, in_x, in_labels = student.functions.product(*batch, gamma, want)
                adjoint, of_state, scale = through + in_weights, tuple(of_before), torch.ones_like(lr)
            at_step(grad_sizes, step).add_(in_lr)
            # The augmentation is differentiated once, here. One that ignores its images has no gradient.
            if grad_images is not None and x.requires_grad:
                (in_raw,) = torch.autograd.grad(x, raw, in_x, allow_unused=True, materialize_grads=True)
                grad_images.index_add_(0, index, scale * in_raw)
            if grad_labels is not None:
                grad_labels.index_add_(0, index, scale * in_labels)
            if ctx.path and step > done:
                adjoint = adjoint + outer[step - done - 1]
        return None, None, None, adjoint, grad_images, grad_labels, grad_sizes, *of_state


def _through_optimizer(
    optimizer: InnerOptimizer, count: int, before: tuple[Tensor, ...], lr: Tensor, outer: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Pull the outer gradients in weights and state after a step back to weights, gradient, step size and state."""
    weights, gradient, lr, *state = (leaf.detach().requires_grad_() for leaf in (*before[:2], lr, *before[2:]))
    with torch.enable_grad():
        after, states = optimizer.step(weights, gradient, tuple(state), lr, count)
    leaves = (weights, gradient, lr, *state)
    return torch.autograd.grad([after, *states], leaves, outer, allow_unused=True, materialize_grads=True)


Unroll = Literal["adjoint", "graph"]


def flatten_parameters(network: nn.Module) -> Tensor:
    """Copy a network's weights into one vector (P,), detached, in the order of ``network.parameters()``."""
    # It copies even a single tensor, so that a snapshot is never a view of live weights.
    return flatten([p.detach() for p in network.parameters()])


def load_flat(network: nn.Module, flat: Tensor) -> None:
    """Copy a vector of weights (P,) into a network, in place; the inverse of :func:`flatten_parameters`."""
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
    path: bool = False,
    precision: Precision = "float32",
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
            replays CUDA graphs on a GPU); see ``compiled``.
        optimizer: plain SGD, or one with a state: ``InnerSGD`` with momentum or weight decay, ``InnerAdam``.
        skip: number of first steps without gradient (truncation); the optimizer's state is carried over them.
        path: return the weights after every step that is differentiated, for losses on each of them.
        precision: "float32" (the dtype of the weights), or "bf16": the network's forward and backward passes and
            Hessian-vector products under autocast, and weights, steps and sums in the dtype of the weights.

    Returns:
        theta_n, (P,), differentiable in images, step_size, soft labels, a momentum that is a tensor ("adjoint": once)
        and, without ``skip``, start. With ``path`` theta_{skip+1} ... theta_n, (n - skip, P).

    Raises:
        ValueError: for weights of another network, or labels, step sizes or a ``skip`` that do not fit.
        InputError: (a ValueError) for an unknown ``precision``, and for a network that draws random numbers (dropout,
            drop path), which differ when the adjoint repeats a step. The first call for a network and mode runs the
            network once to see.

    Convention: the network is taken in the mode it is in; students are in training mode. Call it outside autocast,
    which does not cover the backward pass; ``precision`` does.

    Example:
        >>> net, lr = nn.Linear(1, 2, bias=False), torch.tensor(1.0)
        >>> unroll(net, torch.zeros(2), torch.ones(1, 1), torch.tensor([0]), lr, batches=[torch.tensor([0])])
        tensor([ 0.5000, -0.5000])
    """
    if method not in get_args(Unroll):
        raise ValueError(f"unroll {method!r} is unknown: choose from {list(get_args(Unroll))}")
    if not 0 <= skip <= len(batches):
        raise ValueError(f"skip={skip} must lie in 0 to {len(batches)}, the number of steps")
    # The full graph is differentiated twice, which a compiled function cannot be.
    compile = compile if method == "adjoint" else False  # noqa: A001
    student = _student(network, start, images, labels, step_size, batches, augment, seed, compile, optimizer, precision)
    state = optimizer.initial(start.detach())
    if skip:
        *_, (start, state) = itertools.islice(_run(student, start, images, labels, step_size), skip)
    # Without gradients there is no graph to keep, and the adjoint's forward pass computes the same numbers.
    if method == "adjoint" or not torch.is_grad_enabled():
        adjoint: Tensor = Adjoint.apply(student, skip, path, start, images, labels, step_size, *state)
        return adjoint
    weights = start if start.requires_grad else start.detach().clone().requires_grad_()
    after = []
    for step in range(skip, len(batches)):
        index = student.batches[step]
        loss = loss_in(precision)(network, weights, student.augmented(images[index], step), labels[index])
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights, state = optimizer.step(weights, gradient, state, at_step(step_size, step), step + 1)
        after.append(weights)
    return torch.stack(after) if path else weights


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
    precision: Precision = "float32",
) -> Iterator[Tensor]:
    """Train a student as :func:`unroll` does, without gradient, and yield its weights after every step.

    Arguments are those of :func:`unroll`; the weights theta_1, ..., theta_n are (P,) each.
    """
    student = _student(network, start, images, labels, step_size, batches, augment, seed, compile, optimizer, precision)
    for weights, _ in _run(student, start, images, labels, step_size):
        yield weights


@torch.no_grad()
def _run(
    student: Student, start: Tensor, images: Tensor, labels: Tensor, step_size: Tensor
) -> Iterator[tuple[Tensor, State]]:
    """Yield weights and the optimizer's state after every step, detached."""
    weights, state = start.detach(), student.optimizer.initial(start.detach())
    for step in range(len(student.batches)):
        weights, state, _ = student.advance(step, weights, state, images, labels, step_size)
        yield weights, state


def _student(
    network: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    batches: Sequence[Tensor],
    augment: Augment | None,
    seed: int,
    compile: Compile,  # noqa: A002
    optimizer: InnerOptimizer,
    precision: Precision,
) -> Student:
    """Check what belongs together, and move the batches' indices to the images."""
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    if tuple(step_size.shape) not in ((), (len(batches),)):
        raise ValueError(
            f"step_size has shape {tuple(step_size.shape)}: one for all, or one for each of {len(batches)} steps"
        )
    named_views(network, start)  # refuses weights of another network
    functions = inner_step(network, device=start.device, compile=compile, precision=precision)
    unique = list({id(batch): batch for batch in batches}.values())  # full batches are one and the same tensor
    together = to_device(torch.cat(unique), images.device) if unique else torch.empty(0)  # in one copy
    moved = dict(zip(map(id, unique), together.split([len(batch) for batch in unique]), strict=True))
    student = Student(network, [moved[id(batch)] for batch in batches], augment, seed, functions, optimizer)
    if batches:
        require_function(network, start, images, student.batches[0])
    return student
