"""Optimizers of the inner loop, as differentiable functions of weights, gradient, state and step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

State = tuple["Tensor", ...]


def at_step(values: Tensor, step: int) -> Tensor:
    """Return the value of a step, a scalar, from one for all or one for each."""
    return values[step] if values.ndim else values


class InnerOptimizer:
    """The base of inner optimizers: frozen dataclasses with two pure functions on flat vectors.

    The adjoint of a step follows from :meth:`step` by automatic differentiation.
    """

    @property
    def is_plain(self) -> bool:
        """Whether a step is ``theta - lr * g`` and nothing else."""
        return False

    def initial(self, weights: Tensor) -> State:
        """Return the state before the first step at ``weights``, (P,): tensors, possibly none.

        Gradients arrive at these tensors: a number that is learned may be one of them, which all steps pass on.
        """
        raise NotImplementedError

    def step(self, weights: Tensor, gradient: Tensor, state: State, lr: Tensor, count: int) -> tuple[Tensor, State]:
        """Return the weights and the state after a step, differentiable in all tensors.

        Args:
            weights: theta, (P,).
            gradient: of the student's loss at theta, (P,).
            state: as the last step returned it.
            lr: the step size, a scalar.
            count: number of this step, from 1.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class InnerSGD(InnerOptimizer):
    """SGD as in ``torch.optim.SGD``, without dampening: ``v' = mu v + g + wd theta``, ``theta' = theta - lr v'``.

    Args:
        momentum: mu, in [0, 1); or a tensor that gradients arrive at: a scalar, or (n,), one for each step.
        weight_decay: wd, >= 0.

    Raises:
        InputError: (a ValueError) for numbers out of range.

    Example:
        >>> weights, (velocity,) = InnerSGD(momentum=0.5).step(
        ...     torch.ones(1), torch.ones(1), (torch.ones(1),), torch.tensor(0.1), 2
        ... )
        >>> weights, velocity
        (tensor([0.8500]), tensor([1.5000]))
    """

    momentum: float | Tensor = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        learned = isinstance(self.momentum, torch.Tensor)  # its values may be on a GPU, which a check would wait for
        check_bounds(InnerSGD, {"weight_decay": self.weight_decay} if learned else vars(self))

    @property
    def is_plain(self) -> bool:
        """Whether there is neither momentum nor weight decay."""
        return not isinstance(self.momentum, torch.Tensor) and self.momentum == 0 and self.weight_decay == 0

    def initial(self, weights: Tensor) -> State:
        """Return the velocity, 0, where there is momentum; and the momentum, where it is a tensor."""
        if isinstance(self.momentum, torch.Tensor):
            return torch.zeros_like(weights), self.momentum
        return (torch.zeros_like(weights),) if self.momentum else ()

    def step(self, weights: Tensor, gradient: Tensor, state: State, lr: Tensor, count: int) -> tuple[Tensor, State]:
        """Return theta', and v' with the rest of the state."""
        if self.weight_decay:
            gradient = gradient + self.weight_decay * weights
        if not state:
            return weights - lr * gradient, ()
        velocity, *learned = state
        momentum = at_step(learned[0], count - 1) if learned else self.momentum
        velocity = momentum * velocity + gradient
        return weights - lr * velocity, (velocity, *learned)


@dataclass(frozen=True)
class InnerAdam(InnerOptimizer):
    """Adam as in ``torch.optim.Adam`` (Kingma and Ba, ICLR 2015): ``theta' = theta - lr m^ / (sqrt(u^) + eps)``.

    ``m' = b1 m + (1 - b1) g``, ``u' = b2 u + (1 - b2) g^2``; ``m^`` and ``u^`` are their bias-corrected values. Where
    u^ is 0, the derivative of its root is taken as 0.

    Args:
        betas: (b1, b2), in [0, 1).
        eps: > 0.

    Raises:
        InputError: (a ValueError) for numbers out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_bounds(InnerAdam, vars(self))
        if len(self.betas) != 2:
            raise InputError(f"InnerAdam: betas={self.betas!r} must be two numbers")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, as from a config

    def initial(self, weights: Tensor) -> State:
        """Return m and u, 0."""
        return torch.zeros_like(weights), torch.zeros_like(weights)

    def step(self, weights: Tensor, gradient: Tensor, state: State, lr: Tensor, count: int) -> tuple[Tensor, State]:
        """Return theta', m' and u'."""
        b1, b2 = self.betas
        first = b1 * state[0] + (1 - b1) * gradient
        second = b2 * state[1] + (1 - b2) * gradient.square()
        corrected = second / (1 - b2**count)
        # The root of 0 has no derivative; where it is 0, so is all that it could multiply.
        root = torch.where(corrected > 0, corrected, 1.0).sqrt() * (corrected > 0)
        return weights - lr * (first / (1 - b1**count)) / (root + self.eps), (first, second)
