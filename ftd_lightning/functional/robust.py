"""Robust learning (Sec. 3.3, Eq. 9): noise on the weights that a student starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from torch import Tensor

Residual = Literal["displacement", "endpoint"]


def start_noise(start: Tensor, target: Tensor, generator: torch.Generator, *, kappa: float) -> Tensor:
    """Draw the noise of Eq. 9, eps ~ N(0, sigma^2 I), in proportion to what the teacher does in the segment.

    ``sigma = kappa * ||theta*_0 - theta*_m|| / sqrt(P)``, so that ``||eps||`` is about kappa times the teacher's own
    displacement, whatever the network's size and however far training has come. The paper does not say its sigma.

    Convention: isotropic over all P weights; those of normalisation layers, near 1 and 0, get as much as any.

    Args:
        start: theta*_0, (P,).
        target: theta*_m, (P,).
        generator: a CPU generator; draws are float32 for every dtype, then moved to the weights' device.
        kappa: >= 0; 0 gives zeros.

    Returns:
        eps, (P,), in dtype and on the device of ``start``.

    Example:
        >>> eps = start_noise(torch.zeros(10_000), torch.ones(10_000), torch.Generator().manual_seed(0), kappa=0.5)
        >>> round(float(eps.norm()) / 100, 1)
        0.5
    """
    sigma = kappa * (start - target).norm() / math.sqrt(start.numel())
    eps = torch.randn(start.numel(), generator=generator, device=generator.device)
    return sigma * eps.to(start.device, start.dtype)


def compared_end(student: Tensor, noise: Tensor, *, residual: Residual) -> Tensor:
    """Give what of a student that started beside the teacher is compared with the teacher's target.

    "displacement" is Eq. 9 as written, ``A(theta*_0 + eps) - A_T(theta*_0)``: the noise is no part of what the student
    did, so the residual is ``theta_n - eps - theta*_m``. "endpoint" asks the student to arrive, i.e. to undo the noise
    on its way: ``theta_n - theta*_m``.

    Args:
        student: theta_n, (P,), of a student that started at ``theta*_0 + noise``.
        noise: eps, (P,).
        residual: which of the two.

    Returns:
        (P,), to be compared with theta*_m.

    Raises:
        ValueError: for another ``residual``.

    Example:
        >>> compared_end(torch.ones(2), torch.tensor([0.25, 0.0]), residual="displacement")
        tensor([0.7500, 1.0000])
    """
    if residual not in get_args(Residual):
        raise ValueError(f"residual {residual!r} is unknown: choose from {list(get_args(Residual))}")
    return student - noise if residual == "displacement" else student
