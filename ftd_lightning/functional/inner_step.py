"""One inner step of a student and its adjoint, eager or compiled.

With ``g = grad_theta loss(theta, x)`` and ``lam`` the outer loss's gradient in the weights after the step, the step is
``theta - lr * g``, and its adjoint needs ``s = <g, lam>``: ``lam - lr * ds/dtheta``, ``ds/dx`` and ``ds/dy``.

Images are already augmented, so that the compiled program does not depend on which augmentation is drawn. A compiled
function cannot be differentiated twice; here each function is compiled whole, with the derivatives that ``torch.func``
takes inside it, and is never differentiated from outside.

In "bf16" autocast chooses the dtypes of the network's forward pass, and its derivatives of any order follow. Weights,
updates, the loss and sums over steps keep the dtype of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ftd_lightning.errors import InputError
from ftd_lightning.functional.compiling import Compile, compiled, compiles

if TYPE_CHECKING:
    from collections.abc import Callable

    Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

Precision = Literal["float32", "bf16"]
Wanted = tuple[bool, bool]  # whether to differentiate in images, and in labels
Derivatives = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class InnerStep(NamedTuple):
    """Step functions, eager or compiled, which take the network first; see :func:`inner_step`.

    ``forward`` and ``adjoint`` are a step of plain SGD; ``gradient`` and ``product`` serve other optimizers.
    """

    forward: Callable[..., Tensor]
    adjoint: Callable[..., Derivatives]
    gradient: Callable[..., Tensor]
    product: Callable[..., Derivatives]


# By network, because compiling takes longer than many steps. Networks are held weakly, and no value refers to its key.
_compiled: WeakKeyDictionary[nn.Module, dict[Any, InnerStep]] = WeakKeyDictionary()


def named_views(network: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """Split a vector of weights (P,) into views by a network's parameters; raises ValueError for another number P."""
    named = dict(network.named_parameters())
    total = sum(p.numel() for p in named.values())
    if flat.shape != (total,):
        raise ValueError(f"the weights have shape {tuple(flat.shape)}, the network takes ({total},)")
    parts = flat.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def student_loss(network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of a mini-batch at ``weights``, (P,)."""
    return cross_entropy(student_logits(network, weights, images), labels)


def student_loss_bf16(network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return :func:`student_loss` with the network under autocast."""
    given = images
    # The second derivative of a convolution in its weights is a convolution across the batch by kernels as large as the
    # feature map. oneDNN computes wrong ones in bf16 (AMX) for even batches below 16 and maps of 16 or 32 px.
    if images.device.type == "cpu" and len(images) in range(2, 16, 2):
        # BatchNorm's statistics would take in the image that is added.
        if any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in network.modules()):
            return student_loss(network, weights, images, labels)
        given = torch.cat([images, images[:1]])
    # Without a cache of casts: weights are new in every step.
    with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
        logits = student_logits(network, weights, given)
    return cross_entropy(logits[: len(images)].to(weights.dtype), labels)


LOSSES = {"float32": student_loss, "bf16": student_loss_bf16}


def loss_in(precision: Precision) -> Callable[..., Tensor]:
    """Return the student's loss in a precision; raises InputError for an unknown one."""
    if precision not in LOSSES:
        raise InputError(f"precision={precision!r} is unknown: choose from {list(LOSSES)}")
    return LOSSES[precision]


def student_logits(network: nn.Module, weights: Tensor, images: Tensor) -> Tensor:
    """Return logits (N, K) at ``weights``, (P,); the network's own weights and buffers are neither used nor changed."""
    # Copies, because BatchNorm updates the running statistics that it is passed.
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    logits: Tensor = functional_call(network, {**named_views(network, weights), **buffers}, (images,))
    return logits


@torch.no_grad()
def draws_random_numbers(network: nn.Module, images: Tensor, *, weights: Tensor | None = None) -> bool:
    """Run a network and return whether it drew from torch's global generators, as dropout and drop path do.

    Convention: the network is taken in the mode it is in; its buffers and the generators do not change.

    Args:
        network: any module that takes the images.
        images: (N, C, H, W); a few are enough.
        weights: (P,), to use instead of the network's own.
    """
    if weights is None:
        weights = torch.cat([p.reshape(-1) for p in network.parameters()])
    gpu = images.device if images.device.type == "cuda" else None

    def states() -> Tensor:
        return torch.cat([torch.get_rng_state(), *([] if gpu is None else [torch.cuda.get_rng_state(gpu)])])

    before = states()
    with torch.random.fork_rng(devices=[] if gpu is None else [gpu]):
        student_logits(network, weights, images)
        return not states().equal(before)


def _gradient(loss_of: Loss, network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    weights = weights.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(network, weights, images, labels)
    return torch.autograd.grad(loss, weights)[0]


def _product(
    loss_of: Loss, network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, gamma: Tensor, want: Wanted
) -> Derivatives:
    inputs = [t.detach().requires_grad_(w) for t, w in zip((weights, images, labels), (True, *want), strict=True)]
    with torch.enable_grad():
        loss = loss_of(network, *inputs)
        gradient = torch.autograd.grad(loss, inputs[0], create_graph=True)[0]
        s = torch.dot(gradient, gamma)
        # Zeros for an input that the gradient does not depend on.
        leaves = [t for t in inputs if t.requires_grad]
        parts = torch.autograd.grad(s, leaves, allow_unused=True, materialize_grads=True)
    return _derivatives(s.detach(), parts, want)


def _derivatives(s: Tensor, parts: tuple[Tensor, ...], want: Wanted) -> Derivatives:
    """Put None where images or labels, the second and third of the parts, were not asked for."""
    return s, parts[0], parts[1] if want[0] else None, parts[-1] if want[1] else None


# The same two functions for the compiler; in eager mode torch.func takes a quarter longer than torch.autograd.


def _gradient_func(loss_of: Loss, network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda w: loss_of(network, w, images, labels))(weights)
    return gradient


def _product_func(
    loss_of: Loss, network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, gamma: Tensor, want: Wanted
) -> Derivatives:
    def inner(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.dot(_gradient_func(loss_of, network, weights, images, labels), gamma)
        return s, s

    argnums = (0, *(number for number, wanted in enumerate(want, 1) if wanted))
    parts, s = torch.func.grad(inner, argnums=argnums, has_aux=True)(weights, images, labels)
    return _derivatives(s, parts, want)


def _functions(loss: Loss, gradient_of: Callable[..., Tensor], product_of: Callable[..., Derivatives]) -> InnerStep:
    """Add a plain step and its adjoint: one function each, so that the compiler fuses the update too."""

    def gradient(*batch: Any) -> Tensor:
        return gradient_of(loss, *batch)

    def product(*arguments: Any) -> Derivatives:
        return product_of(loss, *arguments)

    def forward(network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        return weights - lr * gradient(network, weights, images, labels)

    def adjoint(
        network: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, lam: Tensor, lr: Tensor, want: Wanted
    ) -> Derivatives:
        s, in_weights, in_images, in_labels = product(network, weights, images, labels, lam, want)
        return s, lam - lr * in_weights, in_images, in_labels

    return InnerStep(forward, adjoint, gradient, product)


EAGER = {name: _functions(loss, _gradient, _product) for name, loss in LOSSES.items()}
COMPILABLE = {name: _functions(loss, _gradient_func, _product_func) for name, loss in LOSSES.items()}


def inner_step(
    network: nn.Module,
    *,
    device: torch.device,
    compile: Compile = "auto",  # noqa: A002
    precision: Precision = "float32",
) -> InnerStep:
    """Return the step functions of a network, to be called with gradients disabled; compiled ones are kept.

    Returns:
        ``forward(network, weights, images, labels, lr)`` returns the next weights, (P,);
        ``adjoint(network, weights, images, labels, lam, lr, want)`` returns ``s``, the adjoint of ``weights``, ds/dx
        and ds/dy, each None unless the pair ``want`` asks for it. ``gradient(network, weights, images, labels)``
        returns g, (P,); ``product(network, weights, images, labels, gamma, want)`` returns ``s = <g, gamma>``,
        ds/dtheta, ds/dx and ds/dy.
    """
    loss_in(precision)  # refuses an unknown one
    if not compiles(compile, device):
        return EAGER[precision]
    steps = _compiled.setdefault(network, {})
    key = (device, compile == "cuda_graphs", precision)
    if key not in steps:
        pairs = zip(COMPILABLE[precision], EAGER[precision], strict=True)
        steps[key] = InnerStep(*(compiled(f, compile=compile, device=device, eager=eager) for f, eager in pairs))
    return steps[key]
