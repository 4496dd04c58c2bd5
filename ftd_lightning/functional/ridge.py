"""Kernel ridge regression on a synthetic set, through which images and labels are learned (KIP, FRePo)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def ridge_predictions(k_ts: Tensor, k_ss: Tensor, targets: Tensor, *, reg: float) -> Tensor:
    """Predict by kernel ridge regression: ``K_ts (K_ss + reg tr(K_ss) / N I)^-1 y``.

    Conditioning: the regularisation is relative to the mean eigenvalue, so the system's condition number is at most
    N / reg + 1, 1e8 for the usual reg of 1e-6 and 100 images. In float32 little would be left of the answer, so the
    system is solved in float64 whatever the dtypes. A kernel that was *computed* in float32 has lost as much: compute
    it in float64 too where reg is below 1e-5.

    Args:
        k_ts: kernel of target and synthetic images, (M, N).
        k_ss: of the synthetic images, (N, N), symmetric positive semidefinite.
        targets: y, (N, K).
        reg: lambda, >= 0, relative to the mean of the diagonal.

    Returns:
        (M, K) in the dtype of ``targets``, differentiable in the three tensors. A singular system (reg 0 and equal
        images, or a kernel that is not finite) gives values that are not finite and no error.

    Example:
        >>> ridge_predictions(torch.eye(2), torch.eye(2), torch.tensor([[3.0], [6.0]]), reg=2.0)
        tensor([[1.],
                [2.]])
    """
    return (k_ts.double() @ ridge_weights(k_ss, targets, reg=reg)).to(targets.dtype)


def ridge_weights(k_ss: Tensor, targets: Tensor, *, reg: float) -> Tensor:
    """Solve the system of :func:`ridge_predictions`: a kernel ``K_ts`` times the result is the predictions.

    Args: as for :func:`ridge_predictions`.

    Returns:
        (N, K) float64.

    Example:
        >>> ridge_weights(torch.eye(2), torch.tensor([[3.0], [6.0]]), reg=2.0)
        tensor([[1.],
                [2.]], dtype=torch.float64)
    """
    kernel, y = k_ss.double(), targets.double()
    mean_eigenvalue = kernel.diagonal().mean()
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    # solve_ex and not solve, which would wait for a GPU to raise an error, and end a run that may skip the step.
    weights, _ = torch.linalg.solve_ex(kernel + reg * mean_eigenvalue * identity, y)
    return weights


def half_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return half of the squared distance of (M, K) predictions from their targets, the mean over M: a scalar.

    Example:
        >>> half_squared_error(torch.zeros(2, 2), torch.ones(2, 2))
        tensor(1.)
    """
    return 0.5 * (predictions - targets).square().sum(1).mean()


def centred_targets(labels: Tensor, num_classes: int, *, scale: float = 1.0) -> Tensor:
    """Return regression targets of classes, ``scale (one_hot - 1 / K)``; each row has sum 0.

    Args:
        labels: (N,) int64 in [0, K).
        num_classes: K.
        scale: > 0; 1 in KIP, ``sqrt(10 / K)`` in FRePo.

    Returns:
        (N, K) in the default dtype.

    Example:
        >>> centred_targets(torch.tensor([1]), 2)
        tensor([[-0.5000,  0.5000]])
    """
    return scale * (one_hot(labels, num_classes).to(torch.get_default_dtype()) - 1 / num_classes)


def target_probabilities(targets: Tensor, *, scale: float = 1.0) -> Tensor:
    """Make regression targets probabilities: undo scale and centring, cut at 0, and divide by the sum.

    Centred one-hot targets come out as the one-hot labels that they were made of, exactly; learned ones keep what they
    say beyond the class. A row without a positive entry becomes uniform.

    Args:
        targets: (N, K), any finite values.
        scale: that of :func:`centred_targets`.

    Returns:
        (N, K), non-negative, each row with sum 1.

    Example:
        >>> target_probabilities(torch.tensor([[-0.5, 0.5], [0.25, 0.0]]))
        tensor([[0.0000, 1.0000],
                [0.6000, 0.4000]])
    """
    classes = targets.shape[1]
    # Cut at what rounding leaves of a 0.
    share = torch.nn.functional.threshold(targets / scale + 1 / classes, 1e-6, 0.0)
    total = share.sum(1, keepdim=True)
    return torch.where(total > 0, share / total.clamp_min(1e-6), torch.full_like(share, 1 / classes))
