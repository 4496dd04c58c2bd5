"""Losses and gradients of the networks of a teacher or an evaluation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy

from ftd_lightning.errors import InputError
from ftd_lightning.functional.compiling import Compile, compiled, compiles
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.gsam import direction_of, flatten, gsam_perturbation, perturbation_of, unflatten
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.optim import frozen_running_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ftd_lightning.functional.augment import Augmentation
    from ftd_lightning.optim import GSAM


def loss_and_gradients(network: nn.Module, images: Tensor, labels: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Compute a network's cross entropy, logits (N, K) and gradients, as one function to compile.

    The weights take the place of the network's parameters that require gradients, in their order. Its buffers (running
    statistics) are read only: last, every buffer is returned as the forward pass leaves it.
    """
    names = [name for name, p in network.named_parameters() if p.requires_grad]

    def loss(weights: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        state = {**dict(zip(names, weights, strict=True)), **buffers}
        logits = functional_call(network, state, (images,))
        return cross_entropy(logits, labels), (logits, list(buffers.values()))

    gradients, (value, (logits, buffers)) = grad_and_value(loss, has_aux=True)(weights)
    return value, logits, *gradients, *buffers


def _at_own_weights(network: nn.Module, images: Tensor, labels: Tensor, *weights: Tensor) -> tuple[Tensor | None, ...]:
    """Do the same eagerly at the network's own parameters; buffers change in place."""
    with torch.enable_grad():
        logits = network(images)
        loss = cross_entropy(logits, labels)
    with torch.autocast(images.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss.detach(), logits.detach(), *gradients


class _OneByOne(torch.autograd.Function):
    """Several losses, each with its gradients computed at once: one network's activations at a time."""

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Callable[[], Any]], *weights: Tensor) -> Tensor:
        results = [step() for step in steps]
        ctx.owners = [index for index, (_, *gradients) in enumerate(results) for _ in gradients]
        ctx.save_for_backward(*(gradient for _, *gradients in results for gradient in gradients))
        return torch.stack([loss for loss, *_ in results])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factors = upstream[0].unbind()
        pairs = zip(ctx.saved_tensors, ctx.owners, strict=True)
        return None, *(None if gradient is None else gradient * factors[owner] for gradient, owner in pairs)


class CompiledPass:
    """Computes a network's loss and logits, and sets the gradients of its weights.

    Compiled, forward and backward pass are one function of the weights. A batch of another size than ``full_batch``
    (None: the first one's), the last of an epoch, would be compiled separately, and is passed eagerly.
    """

    def __init__(
        self,
        network: nn.Module,
        compile: Compile,  # noqa: A002
        device: torch.device,
        full_batch: int | None = None,
    ) -> None:
        self.network = network
        self.full_batch = full_batch
        self._has_statistics = bool(batch_norms(network))
        self._compiles = compiles(compile, device)
        self._run = compiled(loss_and_gradients, compile=compile, device=device)

    def __call__(
        self, images: Tensor, labels: Tensor, *, perturbed: bool, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Pass a batch, set the gradients of all weights, and return loss and logits (N, K), both detached.

        Where weights are ``perturbed``, running statistics are left alone. ``backward`` runs a backward pass, eagerly.
        """
        if self.full_batch is None:
            self.full_batch = len(labels)
        if not self._compiles or len(labels) != self.full_batch:
            freezes = perturbed and self._has_statistics
            with frozen_running_statistics(self.network) if freezes else nullcontext():
                logits = self.network(images)
                loss = cross_entropy(logits, labels)
            backward(loss)
            return loss.detach(), logits.detach()
        weights = [p for p in self.network.parameters() if p.requires_grad]
        with torch.no_grad():
            loss, logits, *results = self._run(self.network, images, labels, *weights)
            for weight, gradient in zip(weights, results, strict=False):
                weight.grad = gradient
            if not perturbed:
                for buffer, value in zip(self.network.buffers(), results[len(weights) :], strict=True):
                    buffer.copy_(value)
        return loss, logits


def gsam_update(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    settings: tuple[float, float, bool, float, float],
    *state: Tensor,
) -> tuple[Tensor, ...]:
    """Compute a whole step of GSAM over plain SGD, both gradients and the update, as one function to compile.

    Args:
        network: see :func:`loss_and_gradients`.
        images: (N, C, H, W).
        labels: (N,).
        lr: learning rate, a scalar.
        settings: rho, alpha, adaptive, momentum and weight decay, which become part of the program.
        state: the weights, and with momentum their momentum buffers.

    Returns:
        Loss, logits (N, K), the new state as a vector each, and every buffer as the first pass leaves it.
    """
    rho, alpha, adaptive, momentum, weight_decay = settings
    weights = state[: sum(p.requires_grad for p in network.parameters())]
    count, vector = len(weights), flatten(weights)
    loss, logits, *first = loss_and_gradients(network, images, labels, *weights)
    direction = flatten(first[:count])
    if rho > 0:
        perturbed = vector + perturbation_of(direction, vector if adaptive else None, rho=rho)
        _, _, *second = loss_and_gradients(network, images, labels, *unflatten(perturbed, weights))
        direction = direction_of(direction, flatten(second[:count]), alpha=alpha)
    if weight_decay:
        direction = direction + weight_decay * vector
    if momentum:
        direction = momentum * flatten(state[count:]) + direction
    moved = (vector - lr * direction, *([direction] if momentum else []))
    return loss, logits, *moved, *first[count:]


class CompiledStep:
    """Takes a step of GSAM over plain SGD by one compiled function, on a GPU one CUDA graph.

    It is a closure for ``GSAM.step``: it moves the weights itself and leaves no gradients, so that the optimizer has
    nothing left to do. Eagerly, and for batches of another size than ``full_batch``, use :class:`CompiledPass`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: GSAM,
        device: torch.device,
        full_batch: int,
    ) -> None:
        self.network, self.optimizer, self.full_batch = network, optimizer, full_batch
        self._run = compiled(gsam_update, compile="cuda_graphs", device=device)
        self._lr: Tensor | None = None
        self._rate = 0.0

    @staticmethod
    def takes(optimizer: GSAM) -> bool:
        """Return whether the optimizer is one that :func:`gsam_update` computes."""
        base, (group, *others) = optimizer.base_optimizer, optimizer.param_groups
        other = others or optimizer.reduce or any(group.get(key) for key in ("nesterov", "dampening", "maximize"))
        return type(base) is torch.optim.SGD and not other

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Step on a batch; return loss and logits (N, K) at the weights before."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state
        weights: list[Tensor] = [p for p in self.network.parameters() if p.requires_grad]
        if self._lr is None or group["lr"] != self._rate:  # on the device, so that a new rate compiles nothing
            self._rate = group["lr"]
            self._lr = torch.full_like(weights[0].flatten()[0], self._rate)
        momenta: list[Tensor] = []
        if group["momentum"]:
            for weight in weights:
                if state[weight].get("momentum_buffer") is None:
                    state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            momenta = [state[weight]["momentum_buffer"] for weight in weights]
        settings = tuple(group[key] for key in ("rho", "alpha", "adaptive", "momentum", "weight_decay"))
        loss, logits, *results = self._run(self.network, images, labels, self._lr, settings, *weights, *momenta)
        for tensors in (weights, momenta)[: 1 + bool(momenta)]:
            torch._foreach_copy_(tensors, unflatten(results.pop(0), tensors))
        for buffer, value in zip(self.network.buffers(), results, strict=True):
            buffer.copy_(value)
        return loss, logits


# Pixel values of a batch up to which one backward pass for all networks is the faster one.
SMALL_BATCH = 4096


class IndependentLosses:
    """Computes the cross entropies of networks on one batch, which each sees under its own augmentation.

    A network's numbers do not depend on the networks beside it. Each one's backward pass follows its forward pass, so
    that the memory of activations is one network's, whatever their number; only for tiny batches, where it is faster,
    do all share one graph.

    Args:
        compile: True, False, or "auto": on a GPU only. The augmentation stays outside; networks of one architecture
            share the compiled function.
        device: of the networks.
        rho: take each gradient at the worst point of a ball of this radius around the network's weights (SAM; "MTT +
            flat minimum", Sec. 4.3), on the same augmented batch. 0: at the weights.

    Raises:
        InputError: for an unknown setting of ``compile``, or a radius that is negative or not finite.
    """

    def __init__(self, compile: Compile, device: torch.device, *, rho: float = 0.0) -> None:  # noqa: A002
        if not 0 <= rho < float("inf"):
            raise InputError(f"rho={rho} must be 0 or a positive number")
        self.rho = rho
        self._compiles = compiles(compile, device)
        self._run = compiled(loss_and_gradients, compile=compile, device=device, eager=_at_own_weights)

    def __call__(
        self,
        networks: Sequence[nn.Module],
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int],
        augment: Augmentation,
    ) -> Tensor:
        """Compute the losses of n networks, (n,), differentiable in their weights.

        The images (N, C, H, W), with labels (N,) or (N, K), are augmented anew for each network, by its own seed.
        """
        if not self.rho and not self._compiles and images.numel() <= SMALL_BATCH:
            batches = [augment(images, make_generator(seed)) for seed in seeds]
            return torch.stack([cross_entropy(one(x), labels) for one, x in zip(networks, batches, strict=True)])

        def step(network: nn.Module, seed: int, weights: list[nn.Parameter]) -> Any:
            x = augment(images, make_generator(seed))
            loss, _, *rest = self._run(network, x, labels, *weights)
            gradients, buffers = rest[: len(weights)], rest[len(weights) :]
            for buffer, value in zip(network.buffers(), buffers, strict=False):  # the eager function returns none
                buffer.copy_(value)
            if self.rho:
                gradients = self._at_worst_point(network, x, labels, weights, gradients)
            return loss, *gradients

        weights = [[p for p in network.parameters() if p.requires_grad] for network in networks]
        steps = [partial(step, *own) for own in zip(networks, seeds, weights, strict=True)]
        losses: Tensor = _OneByOne.apply(steps, *(p for own in weights for p in own))
        return losses

    def _at_worst_point(
        self, network: nn.Module, images: Tensor, labels: Tensor, weights: list[nn.Parameter], gradients: Sequence[Any]
    ) -> list[Tensor | None]:
        """Return the gradients at the perturbed weights for those at the weights."""
        known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        before = [w.detach().clone() for w in weights]
        for weight, change in zip(weights, gsam_perturbation(weights, known, rho=self.rho), strict=True):
            weight.add_(change)
        with frozen_running_statistics(network):
            found = self._run(network, images, labels, *weights)[2 : 2 + len(weights)]
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
        return list(found)
