"""The inner loop: n SGD steps of a student on the synthetic set, with its exact gradient.

With ``g_i = grad_theta loss(theta_i, x_i)`` and ``theta_{i+1} = theta_i - lr * g_i``, going backwards from
``lam_n = dL/dtheta_n``::

    s         = <g_i(theta_i, x_i), lam_{i+1}>       one step's graph, built and dropped
    dL/dlr   += -s
    dL/dx_i  += -lr * ds/dx_i
    lam_i     = lam_{i+1} - lr * ds/dtheta_i         a Hessian-vector product

The forward run keeps the weights of each step and nothing else, so activation memory is that of one step, whatever n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Iterator

Augment = Callable[[Tensor, torch.Generator], Tensor]
Unroll = Literal["adjoint", "graph"]


def flatten_parameters(network: nn.Module) -> Tensor:
    """Copy a network's weights into one vector.

    Returns:
        (P,), detached and sharing no memory with the network, in the order of ``network.parameters()``.

    Example:
        >>> flatten_parameters(nn.Linear(2, 3)).shape
        torch.Size([9])
    """
    # cat copies even for a single tensor, so that a snapshot never is a view of live weights.
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
        for parameter, value in zip(network.parameters(), _views(network, flat).values(), strict=True):
            parameter.copy_(value)


def _views(network: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    total = sum(p.numel() for p in named.values())
    if flat.shape != (total,):
        raise ValueError(f"the weights have shape {tuple(flat.shape)}, the network takes ({total},)")
    parts = flat.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def chunked_permutations(
    num_images: int, num_steps: int, generator: torch.Generator, *, batch_size: int | None = None
) -> list[Tensor]:
    """Draw the mini-batches of the inner steps: a random permutation cut into chunks, drawn anew when used up.

    Args:
        num_images: N, size of the synthetic set.
        num_steps: n, number of inner steps.
        generator: decides the permutations; a CPU generator.
        batch_size: images a step; None or >= N means all of them at every step. The last chunk of a permutation is
            smaller where N is no multiple of it.

    Returns:
        n int64 index tensors.

    Raises:
        ValueError: for a batch size below 1.

    Example:
        >>> [len(b) for b in chunked_permutations(5, 4, make_generator(0), batch_size=2)]
        [2, 2, 1, 2]
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if batch_size is None or batch_size >= num_images:
        return [torch.arange(num_images)] * num_steps

    def chunks() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(num_images, generator=generator).split(batch_size)

    return [chunk for _, chunk in zip(range(num_steps), chunks(), strict=False)]


class _Student(NamedTuple):
    """What every inner step shares."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    batches: Sequence[Tensor]
    augment: Augment | None
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        index = self.batches[step].to(self.images.device)
        return self.images[index], self.labels[index]

    def loss(self, weights: Tensor, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Cross entropy of one augmented mini-batch at ``weights``; the same step draws the same again."""
        if self.augment is not None:
            images = self.augment(images, make_generator(self.seed, "inner", step))
        # Buffers are given as copies: BatchNorm writes its running statistics into what it is given, and those of
        # the caller's network are not ours to move. In training mode the loss does not depend on them.
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        logits = functional_call(self.network, {**_views(self.network, weights), **buffers}, (images,))
        return cross_entropy(logits, labels)

    def gradient(self, weights: Tensor, images: Tensor, labels: Tensor, step: int, *, keep_graph: bool) -> Tensor:
        """g_i, (P,)."""
        loss = self.loss(weights, images, labels, step)
        return torch.autograd.grad(loss, weights, create_graph=keep_graph)[0]


class _Adjoint(torch.autograd.Function):
    """theta_n as a function of theta_0, images, labels and step size; backward as in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, student: _Student, start: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        student = student._replace(images=images.detach(), labels=labels.detach())
        weights, path = start.detach().clone(), []
        for step in range(len(student.batches)):
            path.append(weights)
            with torch.enable_grad():
                gradient = student.gradient(weights.requires_grad_(), *student.batch(step), step, keep_graph=False)
            weights = weights.detach() - lr.detach() * gradient
        ctx.student = student._replace(images=torch.empty(0), labels=torch.empty(0))
        # Saved through autograd: a synthetic set changed in place before backward is an error, no wrong gradient.
        ctx.save_for_backward(images, labels, lr, *path)
        return weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        images, labels, lr, *path = ctx.saved_tensors
        images, labels = images.detach(), labels.detach()
        student = ctx.student._replace(images=images, labels=labels)
        soft = ctx.needs_input_grad[3]
        grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
        grad_labels = torch.zeros_like(labels) if soft else None
        for step in reversed(range(len(student.batches))):
            weights = path[step].detach().requires_grad_()
            x, y = student.batch(step)
            inputs = [weights, x.requires_grad_(), *([y.requires_grad_()] if soft else [])]
            with torch.enable_grad():
                gradient = student.gradient(weights, x, y, step, keep_graph=True)
                s = torch.dot(gradient, adjoint)
                # An input that the gradient does not depend on has None for an entry, i.e. zero.
                parts = torch.autograd.grad(s, inputs, allow_unused=True, materialize_grads=True)
            index = student.batches[step].to(images.device)
            grad_lr -= s.detach()
            grad_images.index_add_(0, index, -lr * parts[1])
            if grad_labels is not None:
                grad_labels.index_add_(0, index, -lr * parts[2])
            adjoint = adjoint - lr * parts[0]
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
) -> Tensor:
    """Train a student for n plain SGD steps on the synthetic set, differentiably (A[grad L_S, n] of Eq. 5).

    Args:
        network: the architecture; its own weights and buffers are neither used nor changed.
        start: theta_0, (P,), in the order of ``network.parameters()``.
        images: (N, C, H, W).
        labels: (N,) int64 classes, or (N, K) probabilities.
        step_size: scalar tensor.
        batches: n index tensors into ``images``.
        augment: ``augment(batch, generator) -> batch``; called twice a step by "adjoint", with equal generators.
        seed: decides what the generators draw.
        method: "adjoint" or "graph"; both give the same numbers, up to rounding.

    Returns:
        theta_n, (P,), differentiable in start, images, step_size and soft labels ("adjoint": once).

    Raises:
        ValueError: for weights of another network, labels that do not fit the images, an unknown method, or a network
            with active dropout, whose second run would draw another mask.

    Convention: the network is taken in the mode it is in; training mode is what students are in. Call it outside
    autocast: the backward run is not under it, and would differentiate another function.

    Example:
        >>> net, lr = nn.Linear(1, 2, bias=False), torch.tensor(1.0)
        >>> unroll(net, torch.zeros(2), torch.ones(1, 1), torch.tensor([0]), lr, batches=[torch.tensor([0])])
        tensor([ 0.5000, -0.5000])
    """
    if method not in get_args(Unroll):
        raise ValueError(f"unroll {method!r} is unknown: choose from {list(get_args(Unroll))}")
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    _views(network, start)
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"dropout {name!r} is active: a student must be a function of its weights; set p to 0")
    student = _Student(network, images, labels, list(batches), augment, seed)
    # Without gradients there is no graph to keep, and the adjoint's forward run is the same numbers.
    if method == "adjoint" or not torch.is_grad_enabled():
        weights: Tensor = _Adjoint.apply(student, start, images, labels, step_size)
        return weights
    weights = start if start.requires_grad else start.detach().clone().requires_grad_()
    for step in range(len(student.batches)):
        weights = weights - step_size * student.gradient(weights, *student.batch(step), step, keep_graph=True)
    return weights
