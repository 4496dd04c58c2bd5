"""One inner step of a student and its adjoint, eager or compiled.

With ``g = grad_theta loss(theta, x)`` and ``lam`` the outer loss's gradient in the weights after the step, the step is
``theta - lr * g``, and its adjoint needs ``s = <g, lam>``: ``lam - lr * ds/dtheta``, ``ds/dx`` and ``ds/dy``.

Images come augmented, so that what is drawn among augmentations is no part of the compiled program. A compiled
function cannot be differentiated twice; compiling the whole of each function, with the derivatives that ``torch.func``
takes inside it, asks for no derivative from outside.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ftd_lightning.functional.compiling import Compile, Compiled, compiled, compiles

if TYPE_CHECKING:
    from collections.abc import Callable

Adjoint = tuple[Tensor, Tensor, Tensor, Tensor | None]


class InnerStep(NamedTuple):
    """The two functions of one network, which is their first argument."""

    forward: Callable[..., Tensor]
    adjoint: Callable[..., Adjoint]


# By network, as compiling takes longer than many steps; held weakly, and what is kept does not hold the network.
_compiled: WeakKeyDictionary[nn.Module, dict[Any, InnerStep]] = WeakKeyDictionary()


def named_views(network: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """Cut a vector of weights into views of the shapes of a network's parameters.

    Args:
        network: has the names and shapes; not changed.
        flat: (P,), in the order of ``network.parameters()``.

    Raises:
        ValueError: if P is not the network's number of weights.

    Example:
        >>> named_views(nn.Linear(2, 1), torch.arange(3.0))
        {'weight': tensor([[0., 1.]]), 'bias': tensor([2.])}
    """
    named = dict(network.named_parameters())
    total = sum(p.numel() for p in named.values())
    if flat.shape != (total,):
        raise ValueError(f"the weights have shape {tuple(flat.shape)}, the network takes ({total},)")
    parts = flat.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def student_loss(network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of one mini-batch at ``weights``, (P,); a scalar.

    Example:
        >>> round(float(student_loss(nn.Linear(1, 2), torch.zeros(4), torch.ones(1, 1), torch.tensor([0]))), 3)
        0.693
    """
    # Buffers are given as copies: BatchNorm writes its running statistics into what it is given, and those of
    # the caller's network are not ours to move. In training mode the loss does not depend on them.
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    logits = functional_call(network, {**named_views(network, weights), **buffers}, (images,))
    return cross_entropy(logits, labels)


def _forward(network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
    weights = weights.detach().requires_grad_()
    with torch.enable_grad():
        loss = student_loss(network, weights, images, labels)
    return weights.detach() - lr * torch.autograd.grad(loss, weights)[0]


def _adjoint(
    network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, adjoint: Tensor, lr: Tensor, soft: bool
) -> Adjoint:
    inputs = [t.detach().requires_grad_() for t in (weights, images, *([labels] if soft else []))]
    with torch.enable_grad():
        loss = student_loss(network, inputs[0], inputs[1], inputs[2] if soft else labels)
        gradient = torch.autograd.grad(loss, inputs[0], create_graph=True)[0]
        s = torch.dot(gradient, adjoint)
        # An input that the gradient does not depend on has None for an entry, i.e. zero.
        parts = torch.autograd.grad(s, inputs, allow_unused=True, materialize_grads=True)
    return s.detach(), adjoint - lr * parts[0], parts[1], parts[2] if soft else None


# The same two for the compiler; in eager mode torch.func takes a quarter longer than torch.autograd.


def _forward_func(network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda w: student_loss(network, w, images, labels))(weights)
    return weights - lr * gradient


def _adjoint_func(
    network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, adjoint: Tensor, lr: Tensor, soft: bool
) -> Adjoint:
    def inner(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(lambda w: student_loss(network, w, images, labels))(weights)
        s = torch.dot(gradient, adjoint)
        return s, s

    argnums = (0, 1, 2) if soft else (0, 1)
    parts, s = torch.func.grad(inner, argnums=argnums, has_aux=True)(weights, images, labels)
    return s, adjoint - lr * parts[0], parts[1], parts[2] if soft else None


def inner_step(
    network: nn.Module,
    *,
    device: torch.device,
    compile: Compile = "auto",  # noqa: A002
    cuda_graphs: bool = False,
) -> InnerStep:
    """Give the step of a network and its adjoint; compiled ones are those of earlier calls.

    Args:
        network: the architecture.
        device: where the step's tensors are.
        compile: True, False, or "auto": on a GPU only.
        cuda_graphs: record CUDA graphs, if compiled and on a GPU.

    Returns:
        ``forward(network, weights, images, labels, lr)`` gives the next weights, (P,);
        ``adjoint(network, weights, images, labels, lam, lr, soft)`` gives ``s``, the adjoint of ``weights``, ds/dx, and
        ds/dy if ``soft``, else None. Both are to be called without gradients.

    Raises:
        InputError: for an unknown setting of ``compile``.

    Example:
        >>> net, zero = nn.Linear(1, 2, bias=False), torch.zeros(2)
        >>> step = inner_step(net, device=torch.device("cpu"))
        >>> step.forward(net, zero, torch.ones(1, 1), torch.tensor([0]), torch.tensor(1.0))
        tensor([ 0.5000, -0.5000])
    """
    if not compiles(compile, device):
        return InnerStep(_forward, _adjoint)
    kept = _compiled.setdefault(network, {})
    key = (device, cuda_graphs)
    if key not in kept:
        build = partial(compiled, compile=True, device=device, cuda_graphs=cuda_graphs)
        kept[key] = InnerStep(build(_forward_func, eager=_forward), build(_adjoint_func, eager=_adjoint))
    return kept[key]


def compile_seconds(network: nn.Module) -> float:
    """Seconds that the first calls of a network's compiled steps took, compilation included; 0 if none is compiled.

    To be shown, and left out of a throughput.

    Example:
        >>> compile_seconds(nn.Linear(1, 2))
        0.0
    """
    functions = [function for step in _compiled.get(network, {}).values() for function in step]
    return sum((function.compile_seconds for function in functions if isinstance(function, Compiled)), 0.0)
