"""GSAM (Zhuang et al., ICLR 2022): the perturbation and the direction that solve Eq. 12-13 of the FTD paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm

if TYPE_CHECKING:
    from collections.abc import Sequence


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Copy tensors into one vector, so that an operation launches one kernel and not one for each tensor."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector into tensors of the shapes and dtypes of ``like``; the inverse of :func:`flatten`."""
    parts = torch.split_with_sizes(vector, [t.numel() for t in like])
    views = [part.view_as(t) for part, t in zip(parts, like, strict=True)]
    return [view if view.dtype == t.dtype else view.to(t.dtype) for view, t in zip(views, like, strict=True)]


def gsam_perturbation(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Compute the ascent step to the worst point of the ball around the weights (Eq. 12).

    Plain ball: ``eps = rho * g / ||g||``. Adaptive ball (ASAM): ``eps = rho * w**2 g / ||w g||``. The norm is taken
    over all tensors together.

    Args:
        parameters: the weights w, any shapes.
        gradients: g, in the same shapes.
        rho: radius of the ball, >= 0.
        adaptive: measure the ball relative to each weight's size.

    Returns:
        The perturbation, in the shapes of ``parameters``; zeros where the gradient vanishes.

    Example:
        >>> w, g = [torch.zeros(2)], [torch.tensor([3.0, 4.0])]
        >>> gsam_perturbation(w, g, rho=0.5)
        [tensor([0.3000, 0.4000])]
    """
    weights = flatten(parameters) if adaptive else None
    return unflatten(perturbation_of(flatten(gradients), weights, rho=rho), parameters)


def perturbation_of(gradient: Tensor, weights: Tensor | None = None, *, rho: float) -> Tensor:
    """Compute :func:`gsam_perturbation` of vectors; the ball is adaptive where the weights are given."""
    scaled = direction = gradient
    if weights is not None:
        size = weights.abs()
        scaled = size * scaled
        direction = size * scaled
    # Squares of gradients below 1e-22 vanish in float32; in units of the largest entry the norm is at least 1. The
    # clamps turn 0/0 into 0.
    unit = vector_norm(scaled, float("inf")).clamp_min(torch.finfo(scaled.dtype).tiny)
    units = scaled / unit
    norm = vector_norm(units).clamp_min(1)
    return rho * ((units if weights is None else direction / unit) / norm)


def gsam_direction(gradients: Sequence[Tensor], perturbed_gradients: Sequence[Tensor], *, alpha: float) -> list[Tensor]:
    """Combine both gradients: ``g_p - alpha * (the part of g orthogonal to g_p)``.

    alpha 0 is SAM. The paper minimises ``L + alpha * S`` (Eq. 13) with GSAM; its alpha is this one.

    Args:
        gradients: g at the weights.
        perturbed_gradients: g_p at the perturbed weights, same shapes.
        alpha: weight of the surrogate gap's gradient, >= 0.

    Returns:
        The gradient for the base optimizer, in the same shapes.

    Example:
        >>> g, g_p = [torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])]
        >>> gsam_direction(g, g_p, alpha=0.5)
        [tensor([ 2.0000, -0.5000])]
    """
    if alpha == 0:
        return list(perturbed_gradients)
    return unflatten(direction_of(flatten(gradients), flatten(perturbed_gradients), alpha=alpha), gradients)


def direction_of(gradient: Tensor, perturbed: Tensor, *, alpha: float) -> Tensor:
    """Compute :func:`gsam_direction` of vectors."""
    if alpha == 0:
        return perturbed
    along = (gradient * perturbed).sum() / (perturbed * perturbed).sum().clamp_min(torch.finfo(perturbed.dtype).tiny)
    return perturbed - alpha * (gradient - along * perturbed)
