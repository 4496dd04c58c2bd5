"""Kernels of infinitely wide networks, and kernel ridge regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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
    """
    return _recursion(x, z, depth, bias_variance)[0]


def ntk_kernel(x: Tensor, z: Tensor, *, depth: int, bias_variance: float = 0.0) -> Tensor:
    """Return the neural tangent kernel (N, M): the product of gradients in all parameters, at infinite width.

    Arguments are those of :func:`nngp_kernel`. The kernel has a kink where two different images become equal (as
    ``-|x - z|`` has); there the gradient is the mean over all sides. On the diagonal of ``ntk_kernel(x, x)`` it is
    exact.
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
    """Arc cosine, constant near -1 and 1, where its gradient is infinite: rounding puts equal images beside 1."""
    limit = 1 - ROUNDING * torch.finfo(cosine.dtype).eps
    inside = cosine.clamp(-limit, limit).arccos()  # clamped values have no gradient
    inside = torch.where(cosine >= limit, torch.zeros_like(inside), inside)
    return torch.where(cosine <= -limit, torch.full_like(inside, math.pi), inside)


def ridge_predictions(k_ts: Tensor, k_ss: Tensor, targets: Tensor, *, reg: float) -> Tensor:
    """Predict by kernel ridge regression: ``K_ts (K_ss + reg tr(K_ss) / N I)^-1 y``.

    The system's condition number is at most N / reg + 1, 1e8 for the usual reg of 1e-6 and 100 images, so it is solved
    in float64. Compute the kernels in float64 too where reg is below 1e-5.

    Args:
        k_ts: kernel of target and synthetic images, (M, N).
        k_ss: of the synthetic images, (N, N), symmetric positive semidefinite.
        targets: y, (N, K).
        reg: lambda, >= 0, relative to the mean of the diagonal.

    Returns:
        (M, K) in the dtype of ``targets``, differentiable in the three tensors; not finite for a singular system.

    Example:
        >>> ridge_predictions(torch.eye(2), torch.eye(2), torch.tensor([[3.0], [6.0]]), reg=2.0)
        tensor([[1.],
                [2.]])
    """
    return (k_ts.double() @ ridge_weights(k_ss, targets, reg=reg)).to(targets.dtype)


def ridge_weights(k_ss: Tensor, targets: Tensor, *, reg: float) -> Tensor:
    """Solve the system of :func:`ridge_predictions`: ``K_ts`` times the result, (N, K) float64, is the predictions."""
    kernel, y = k_ss.double(), targets.double()
    mean_eigenvalue = kernel.diagonal().mean()
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    # Unlike solve, solve_ex does not wait for a GPU, and raises no error in a run that may skip the step.
    weights, _ = torch.linalg.solve_ex(kernel + reg * mean_eigenvalue * identity, y)
    return weights


def half_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return half of the squared distance of (M, K) predictions from their targets, the mean over M: a scalar."""
    return 0.5 * (predictions - targets).square().sum(1).mean()


def centred_targets(labels: Tensor, num_classes: int, *, scale: float = 1.0) -> Tensor:
    """Return regression targets of classes, ``scale (one_hot - 1 / K)``; each row has sum 0.

    Args:
        labels: (N,) int64 in [0, K), or (N, K) in the place of ``one_hot``.
        num_classes: K.
        scale: > 0; 1 in KIP, ``sqrt(10 / K)`` in FRePo.

    Returns:
        (N, K) in the default dtype.

    Example:
        >>> centred_targets(torch.tensor([1]), 2)
        tensor([[-0.5000,  0.5000]])
    """
    rows = one_hot(labels, num_classes) if labels.ndim == 1 else labels
    return scale * (rows.to(torch.get_default_dtype()) - 1 / num_classes)


def target_probabilities(targets: Tensor, *, scale: float = 1.0) -> Tensor:
    """Turn regression targets into probabilities: undo scale and centring, cut at 0, and divide by the sum.

    Centred one-hot targets give their one-hot labels exactly. A row without a positive entry becomes uniform.

    Args:
        targets: (N, K), any finite values.
        scale: as for :func:`centred_targets`.

    Returns:
        (N, K), non-negative, each row with sum 1.
    """
    classes = targets.shape[1]
    # Cut at what rounding leaves of a 0.
    share = torch.nn.functional.threshold(targets / scale + 1 / classes, 1e-6, 0.0)
    total = share.sum(1, keepdim=True)
    return torch.where(total > 0, share / total.clamp_min(1e-6), torch.full_like(share, 1 / classes))
