"""Kernels of infinitely wide fully connected ReLU networks, in closed form.

Sources: Cho and Saul, NeurIPS 2009 (arc-cosine kernels); Jacot, Gabriel and Hongler, NeurIPS 2018 (NTK).

The network of ``depth`` hidden layers is in NTK parameterisation, with He's weight variance 2 in every layer and the
bias variance b: the input is ``h_0 = x / sqrt(D)``, pre-activations are ``z_1 = sqrt(2) W_1 h_0 + sqrt(b) b_1`` and
``z_{l+1} = sqrt(2 / width) W_{l+1} relu(z_l) + sqrt(b) b_{l+1}``, weights and biases are standard normal, and the
output is ``z_{depth+1}``. With t the angle between two inputs as layer l sees them, and ``|x|_l`` their norms there::

    S_1 = 2 <x, z> / D + b        S_{l+1} = |x|_l |z|_l (sin t + (pi - t) cos t) / pi + b      (NNGP: covariance)
    T_1 = S_1                     T_{l+1} = S_{l+1} + T_l (pi - t) / pi                        (NTK)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 64  # units in the last place by which a cosine may miss 1 and still be one


def nngp_kernel(x: Tensor, z: Tensor, *, depth: int, bias_variance: float = 0.0) -> Tensor:
    """Return the covariance of the outputs of a random network of infinite width (NNGP kernel).

    Args:
        x: (N, D) flattened images, any floating dtype; float64 where a system of equations is solved with the kernel.
        z: (M, D), of the same dtype.
        depth: hidden layers, >= 1.
        bias_variance: of every layer, >= 0.

    Returns:
        (N, M), differentiable in both, with finite gradients at equal and at all-zero rows too.

    Example:
        >>> round(float(nngp_kernel(torch.ones(1, 4), torch.ones(1, 4), depth=3)), 4)
        2.0
    """
    return _recursion(x, z, depth, bias_variance)[0]


def ntk_kernel(x: Tensor, z: Tensor, *, depth: int, bias_variance: float = 0.0) -> Tensor:
    """Return the neural tangent kernel: the product of gradients in all parameters, at infinite width.

    Its exact value has a kink where two different images become equal (as ``-|x - z|`` has); there the gradient is that
    of the smooth part, which is the mean of the gradients from all sides, and exact on the diagonal of
    ``ntk_kernel(x, x)``.

    Args:
        x: as for :func:`nngp_kernel`.
        z: likewise.
        depth: hidden layers, >= 1.
        bias_variance: of every layer, >= 0.

    Returns:
        (N, M), differentiable in both, with finite gradients everywhere.

    Example:
        >>> round(float(ntk_kernel(torch.ones(1, 4), torch.ones(1, 4), depth=3)), 4)
        8.0
    """
    return _recursion(x, z, depth, bias_variance)[1]


def _recursion(x: Tensor, z: Tensor, depth: int, bias_variance: float) -> tuple[Tensor, Tensor]:
    dimension = x.shape[1]
    covariance = 2 * (x @ z.T) / dimension + bias_variance
    tangent = covariance
    own_x, own_z = (2 * rows.square().sum(1) / dimension + bias_variance for rows in (x, z))
    for _ in range(depth):
        norms = _root(own_x)[:, None] * _root(own_z)[None, :]
        angle = _angle(covariance / norms)
        active = (math.pi - angle) / math.pi  # twice the share of units that are active for both
        covariance = norms * (angle.sin() / math.pi + active * angle.cos()) + bias_variance
        tangent = covariance + tangent * active
        own_x, own_z = own_x + bias_variance, own_z + bias_variance  # He's variance keeps norms
    return covariance, tangent


def _root(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 (an all-zero image without biases) is 0."""
    return squares.clamp_min(torch.finfo(squares.dtype).eps ** 2).sqrt()


def _angle(cosine: Tensor) -> Tensor:
    """Arc cosine, as a constant at its ends, where its gradient is infinite.

    Rounding puts equal images on both sides of 1, and the angle between an image and itself does not change with it.
    """
    limit = 1 - ROUNDING * torch.finfo(cosine.dtype).eps
    inside = cosine.clamp(-limit, limit).arccos()  # clamped values have no gradient
    inside = torch.where(cosine >= limit, torch.zeros_like(inside), inside)
    return torch.where(cosine <= -limit, torch.full_like(inside, math.pi), inside)
