"""The inner loop: n SGD steps of a student on the synthetic set, with its exact gradient.

With ``g_i = grad_theta loss(theta_i, x_i)`` and ``theta_{i+1} = theta_i - lr * g_i``, going backwards from
``lam_n = dL/dtheta_n``::

    s         = <g_i(theta_i, x_i), lam_{i+1}>       the graph of one step, built and freed
    dL/dlr   += -s
    dL/dx_i  += -lr * ds/dx_i
    lam_i     = lam_{i+1} - lr * ds/dtheta_i         a Hessian-vector product

The adjoint stores only the weights at each inner step, so activation memory is that of one step, whatever n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftd_lightning.errors import InputError
from ftd_lightning.functional.inner_step import (
    InnerStep,
    draws_random_numbers,
    inner_step,
    named_views,
    student_loss,
)
from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ftd_lightning.functional.compiling import Compile

Augment = Callable[[Tensor, torch.Generator], Tensor]
Unroll = Literal["adjoint", "graph"]

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# The modes (of all modules) in which a network was seen to be a function of its weights.
_functions: WeakKeyDictionary[nn.Module, set[tuple[bool, ...]]] = WeakKeyDictionary()


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


class _Student(NamedTuple):
    """What all inner steps have in common."""

    network: nn.Module
    batches: Sequence[Tensor]
    augment: Augment | None
    seed: int
    step: InnerStep

    def augmented(self, images: Tensor, step: int) -> Tensor:
        """Augment the mini-batch of a step; a repeated step draws the same augmentation."""
        return images if self.augment is None else self.augment(images, make_generator(self.seed, "inner", step))

    def after(self, step: int, weights: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        """Return the weights after a step, detached."""
        index = self.batches[step]
        x = self.augmented(images.detach()[index], step)
        return self.step.forward(self.network, weights, x, labels.detach()[index], lr.detach())


class _Adjoint(torch.autograd.Function):
    """theta_n as a function of theta_0, images, labels and step size; backward as in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, student: _Student, start: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        weights, path = start.detach().clone(), []
        for step in range(len(student.batches)):
            path.append(weights)
            weights = student.after(step, weights, images, labels, lr)
        ctx.student = student
        # Saved through autograd, so that a set changed in place before backward is an error, not a wrong gradient.
        ctx.save_for_backward(images, labels, lr, *path)
        return weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        images, labels, lr, *path = (saved.detach() for saved in ctx.saved_tensors)
        student, soft = ctx.student, ctx.needs_input_grad[3]
        grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
        grad_labels = torch.zeros_like(labels) if soft else None
        for step in reversed(range(len(student.batches))):
            index = student.batches[step]
            raw = images[index].requires_grad_()
            with torch.enable_grad():
                x = student.augmented(raw, step)
            s, adjoint, in_x, in_labels = student.step.adjoint(
                student.network, path[step], x.detach(), labels[index], adjoint, lr, soft
            )
            grad_lr -= s
            # The augmentation is differentiated once, here. One that ignores its images has no gradient.
            if x.requires_grad:
                (in_raw,) = torch.autograd.grad(x, raw, in_x, allow_unused=True, materialize_grads=True)
                grad_images.index_add_(0, index, -lr * in_raw)
            if grad_labels is not None:
                grad_labels.index_add_(0, index, -lr * in_labels)
        return None, adjoint, grad_images, grad_labels, grad_lr


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
) -> Tensor:
    """Train a student for n plain SGD steps on the synthetic set, differentiably (A[grad L_S, n] of Eq. 5).

    Args:
        network: the architecture; its own weights and buffers are neither used nor changed.
        start: theta_0, (P,), in the order of ``network.parameters()``.
        images: (N, C, H, W).
        labels: (N,) int64 classes, or (N, K) probabilities.
        step_size: scalar tensor.
        batches: n index tensors into ``images``.
        augment: ``augment(batch, generator) -> batch``; "adjoint" calls it twice per step, with equal generators.
        seed: decides what the generators draw.
        method: "adjoint" or "graph"; results are the same up to rounding.
        compile: whether "adjoint" compiles its steps: True, False, "auto" (on a GPU only), or "cuda_graphs" (also
            replays CUDA graphs on a GPU). Compilation happens once per network and shape of the mini-batch; if it
            fails, there is one warning and the steps run eagerly.

    Returns:
        theta_n, (P,), differentiable in start, images, step_size and soft labels ("adjoint": once).

    Raises:
        ValueError: for weights of another network, labels that do not fit the images, or an unknown method or setting.
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
    # The full graph is differentiated twice, which a compiled function cannot be.
    compile = compile if method == "adjoint" else False  # noqa: A001
    student = _student(network, start, images, labels, batches=batches, augment=augment, seed=seed, compile=compile)
    # Without gradients there is no graph to keep, and the adjoint's forward pass computes the same numbers.
    if method == "adjoint" or not torch.is_grad_enabled():
        weights: Tensor = _Adjoint.apply(student, start, images, labels, step_size)
        return weights
    weights = start if start.requires_grad else start.detach().clone().requires_grad_()
    for step, batch in enumerate(student.batches):
        loss = student_loss(network, weights, student.augmented(images[batch], step), labels[batch])
        weights = weights - step_size * torch.autograd.grad(loss, weights, create_graph=True)[0]
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
    weights = start
    for step in range(len(student.batches)):
        weights = student.after(step, weights, images, labels, step_size)
        yield weights


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
) -> _Student:
    """Check what belongs together, and move the batches' indices to the images."""
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    named_views(network, start)
    step_functions = inner_step(network, device=start.device, compile=compile)
    # Each index once: a copy from pageable memory makes the host wait, and full batches are one and the same tensor.
    moved = {id(batch): batch.to(images.device, non_blocking=True) for batch in batches}
    student = _Student(network, [moved[id(batch)] for batch in batches], augment, seed, step_functions)
    if batches:
        _require_function(network, start, images, student.batches[0])
    return student


def _require_function(network: nn.Module, weights: Tensor, images: Tensor, index: Tensor) -> None:
    """Refuse a network that draws random numbers; once per network and mode, on the first mini-batch."""
    for name, module in network.named_modules():
        if isinstance(module, DROPOUT) and module.training and module.p > 0:
            raise InputError(f"dropout {name!r} is active: a student must be a function of its weights; set p to 0")
    mode = tuple(module.training for module in network.modules())
    seen = _functions.setdefault(network, set())
    if mode not in seen:
        if draws_random_numbers(network, images.detach()[index], weights=weights.detach()):
            raise InputError(
                f"{type(network).__name__} draws random numbers (dropout, drop path): a student must be a function of "
                "its weights; switch that off"
            )
        seen.add(mode)
