"""Losses of sets that linear probes on frozen features are trained on: class means and ridge regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from ftd_lightning.functional.kernels import centred_targets, ridge_predictions

if TYPE_CHECKING:
    from torch import Tensor


def centred_class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Average the features of each class, and subtract the mean of these averages.

    On a balanced batch, ``-1 / K`` times the result is the gradient of the mean cross entropy in the weights of a
    linear layer of zeros, which Linear Gradient Matching compares; the biases' gradient is zero.

    Args:
        features: (N, D).
        labels: (N,) int64 in [0, K); every class occurs.
        num_classes: K.

    Returns:
        (K, D), differentiable in the features.

    Example:
        >>> import torch
        >>> centred_class_means(torch.tensor([[1.0], [3.0], [6.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[-2.],
                [ 2.]])
    """
    members = one_hot(labels, num_classes).to(features.dtype)
    means = members.T @ features / members.sum(0)[:, None]
    return means - means.mean(0)


def class_mean_loss(synthetic: Tensor, real: Tensor) -> Tensor:
    """Return ``1 - cos`` of the centred class means of synthetic and real features, (K, D) each, as one vector."""
    return 1 - cosine_similarity(synthetic.flatten(), real.flatten(), dim=0)


def ridge_cross_entropy(
    synthetic: Tensor,
    labels: Tensor,
    real: Tensor,
    classes: Tensor,
    *,
    num_classes: int,
    reg: float,
    temperature: float,
) -> Tensor:
    """Return the cross entropy of real features under the ridge regression on synthetic ones (CLP-DD).

    ``CE(softmax(Z_r W / temperature), classes)`` with ``W = Z_s^T (Z_s Z_s^T + lambda I)^-1 Y``.

    Args:
        synthetic: Z_s, (N, D).
        labels: their classes, (N,) int64 in [0, K).
        real: Z_r, (M, D).
        classes: (M,) int64 in [0, K).
        num_classes: K.
        reg: lambda, >= 0, relative to the mean of the diagonal of Z_s Z_s^T.
        temperature: > 0.

    Returns:
        A scalar, differentiable in both features.
    """
    targets = centred_targets(labels, num_classes).to(synthetic.dtype)
    predictions = ridge_predictions(real @ synthetic.T, synthetic @ synthetic.T, targets, reg=reg)
    return cross_entropy(predictions / temperature, classes)
