"""Robust learning (Sec. 3.3, Eq. 9): noise on the weights that a student starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError
from ftd_lightning.functional.rules import MatchingRule
from ftd_lightning.functional.to_device import to_device

if TYPE_CHECKING:
    from torch import Tensor

Residual = Literal["displacement", "endpoint"]


def start_noise(start: Tensor, target: Tensor, generator: torch.Generator, *, kappa: float) -> Tensor:
    """Draw the noise of Eq. 9, eps ~ N(0, sigma^2 I), in proportion to the teacher's displacement in the segment.

    ``sigma = kappa * ||theta*_0 - theta*_m|| / sqrt(P)``, so that ``||eps||`` is about kappa times the teacher's
    displacement, whatever the size of the network and however far training has advanced. The paper gives no sigma.

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
    return sigma * to_device(eps, start.device, start.dtype)


@dataclass(frozen=True)
class RobustStart(MatchingRule):
    """Robust learning of the FTD paper (Du et al., CVPR 2023, Eq. 9): the student starts beside the teacher.

    It starts at ``theta*_0 + eps``; see :func:`start_noise`. With "displacement", Eq. 9 as written,
    ``A(theta*_0 + eps) - A_T(theta*_0)``, the noise is not part of what the student did, so the residual is
    ``theta_n - eps - theta*_m``. "endpoint" asks the student to arrive, i.e. to undo the noise on its way:
    ``theta_n - theta*_m``. The distance is normalised by the teacher's displacement in either case.

    Args:
        kappa: size of the noise relative to the teacher's displacement, >= 0 and finite.
        residual: "displacement" or "endpoint".

    Raises:
        InputError: (a ValueError) for a kappa out of range or an unknown residual.

    Example:
        >>> start, target = torch.zeros(4), torch.ones(4)
        >>> rule = RobustStart(kappa=0.1)
        >>> noise = rule.begin(start, target, torch.Generator().manual_seed(0)) - start
        >>> bool(rule.compared(target + noise, noise).allclose(target))
        True
    """

    kappa: float
    residual: Residual = "displacement"

    name: ClassVar[str] = "robust"

    def __post_init__(self) -> None:
        check_bounds(RobustStart, vars(self))
        if self.residual not in get_args(Residual):
            raise InputError(f"residual={self.residual!r} is unknown: choose from {list(get_args(Residual))}")

    def begin(self, start: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Return theta*_0 + eps, (P,)."""
        return start + start_noise(start, target, generator, kappa=self.kappa)

    def compared(self, student: Tensor, noise: Tensor) -> Tensor:
        """Return ``theta_n - eps`` ("displacement") or ``theta_n`` ("endpoint"), (P,)."""
        return student - noise if self.residual == "displacement" else student
