"""Rules for where a matched segment starts, and which are accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import to_device
from ftd_lightning.functional.selection import Ipc, images_per_class
from ftd_lightning.rules.base import MatchingRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ftd_lightning.rules.base import Teachers


Residual = Literal["displacement", "endpoint"]


def start_noise(start: Tensor, target: Tensor, generator: torch.Generator, *, kappa: float) -> Tensor:
    """Draw the noise of Eq. 9, eps ~ N(0, sigma^2 I), in proportion to the teacher's displacement in the segment.

    ``sigma = kappa * ||theta*_0 - theta*_m|| / sqrt(P)``, so that ``||eps||`` is about kappa times the displacement.
    The paper gives no sigma.

    Args:
        start: theta*_0, (P,).
        target: theta*_m, (P,).
        generator: a CPU generator; draws are float32 for every dtype.
        kappa: >= 0.

    Returns:
        eps, (P,), in dtype and on the device of ``start``.
    """
    sigma = kappa * (start - target).norm() / math.sqrt(start.numel())
    eps = torch.randn(start.numel(), generator=generator, device=generator.device)
    return sigma * to_device(eps, start.device, start.dtype)


@dataclass(frozen=True)
class RobustStart(MatchingRule):
    """Robust learning of the FTD paper (Du et al., CVPR 2023, Eq. 9): the student starts at ``theta*_0 + eps``.

    See :func:`start_noise` for eps. The residual is ``theta_n - eps - theta*_m`` ("displacement", Eq. 9 as written), or
    ``theta_n - theta*_m`` ("endpoint": the student has to undo the noise). Either distance is normalised by the
    teacher's displacement.

    Args:
        kappa: size of the noise relative to the teacher's displacement, >= 0 and finite.
        residual: "displacement" or "endpoint".
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


@dataclass(frozen=True)
class StartWindow(MatchingRule):
    """Start segments in {T- .. U - 1}, where U grows from T to T+ (DATM, Guo et al., ICLR 2024, Sec. 3.3).

    ``U = min(T+, T + floor((T+ - T) * iteration / E))``; T+ is the module's ``max_start_epoch``. PAD's "T grows by 1
    every I iterations" is E = I * (T+ - T).

    Args:
        first: T-, the first start epoch.
        ceiling: T, the initial ceiling of the start epochs; None: T+, without growth.
        growth_iterations: E, iterations until the ceiling reaches T+.

    Raises:
        InputError: for a ceiling that is not above ``first``, or ``ceiling`` and ``growth_iterations`` without each
            other.

    Example:
        >>> window = StartWindow(first=1, ceiling=3, growth_iterations=100)
        >>> [window.start_epochs(iteration, 5) for iteration in (0, 49, 50, 100, 1000)]
        [range(1, 3), range(1, 3), range(1, 4), range(1, 5), range(1, 5)]
    """

    first: int = 0
    ceiling: int | None = None
    growth_iterations: int | None = None

    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        check_bounds(StartWindow, vars(self))
        if (self.ceiling is None) != (self.growth_iterations is None):
            raise InputError("StartWindow: ceiling and growth_iterations belong together: give both or neither")
        if self.ceiling is not None and self.ceiling <= self.first:
            raise InputError(f"StartWindow: ceiling={self.ceiling} must be above first={self.first}")

    def start_epochs(self, iteration: int, max_start_epoch: int) -> range:
        """Return {T- .. U - 1}."""
        if self.ceiling is None or self.growth_iterations is None:
            return range(self.first, max_start_epoch)
        grown = (max_start_epoch - self.ceiling) * iteration // self.growth_iterations
        return range(self.first, min(max_start_epoch, self.ceiling + grown))


CHUNK = 256  # images that a teacher classifies at a time


@dataclass(frozen=True)
class CorrectImages(MatchingRule):
    """Start from real images that a teacher classifies correctly (DATM, Guo et al., ICLR 2024, Sec. 3.4).

    For each class, take the first images, in random order, that teacher 0 classifies correctly after its last recorded
    epoch; if they are too few, add images that teacher 1 classifies correctly, and so on.

    Raises:
        InputError: if all teachers together classify too few images of a class correctly.
    """

    name: ClassVar[str] = "correct"

    def initial_images(self, candidates: Sequence[Tensor], ipc: Ipc, teachers: Teachers) -> list[Tensor]:
        """Return indices into the candidates of each class."""
        counts = enumerate(images_per_class(ipc, [len(images) for images in candidates]))
        return [self._of_class(label, candidates[label], count, teachers) for label, count in counts]

    def _of_class(self, label: int, images: Tensor, ipc: int, teachers: Teachers) -> Tensor:
        chosen: dict[int, None] = {}  # in order
        for teacher in range(len(teachers)):
            for first in range(0, len(images), CHUNK):
                right = teachers.logits(teacher, images[first : first + CHUNK]).argmax(1) == label
                chosen |= dict.fromkeys((right.nonzero()[:, 0] + first).tolist())
                if len(chosen) >= ipc:
                    return torch.tensor(list(chosen)[:ipc])
        raise InputError(
            f"CorrectImages: the teachers classify {len(chosen)} images of class {label} correctly, ipc={ipc} are "
            "needed; train them longer, or start from random images"
        )


@dataclass(frozen=True)
class ClosestStep(MatchingRule):
    """Match the step of the student that comes closest to the target (ATT, Liu et al., ECCV 2024).

    The step is ``argmin_i ||theta_i - theta*_{t+m}||_1``, the later one of equal steps. The student runs all n steps
    without gradient first and is then unrolled up to that step, where the usual loss is taken. ``matching/steps`` logs
    the choice; where it is always n this is MTT.
    """

    name: ClassVar[str] = "att"

    def distance(self, student: Tensor, target: Tensor) -> Tensor:
        """Return the sum of absolute differences."""
        return (student - target).abs().sum()


@dataclass(frozen=True)
class LossGate(MatchingRule):
    """Skip the update of an iteration whose matching loss is above a threshold (the public code of DATM, ICLR 2024).

    At a loss of 1 the student ends as far from the target as it began. A skipped iteration changes neither images,
    labels, step size nor momenta; it is counted in ``matching/gated_steps``.

    Args:
        threshold: above 0; published: 1 to 1.5.
    """

    threshold: float

    name: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        check_bounds(LossGate, vars(self))

    def accepts(self, loss: Tensor) -> Tensor:
        """Accept losses up to the threshold, and NaN, which the step guard skips."""
        return ~(loss > self.threshold)
