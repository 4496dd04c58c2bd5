"""The accumulated trajectory error (Sec. 3.2), of a student that is never put back on its teacher's trajectory.

With ``A(theta)`` the change of the weights over n steps on the synthetic set, ``theta*_{t,0} .. theta*_{t,m}`` the
teacher's segment t (``theta*_{t,m} = theta*_{t+1,0}``) and ``theta_{t,0} .. theta_{t,n}`` the student's::

    delta_t       = A(theta*_{t,0}) - (theta*_{t,m} - theta*_{t,0})           matching error, Eq. 6
    I_t           = A(theta*_{t,m} + epsilon_t) - A(theta*_{t,m})             initialization error, Eq. 7
    epsilon_t     = theta_{t,n} - theta*_{t,m}                                accumulated error
    epsilon_{t+1} = epsilon_t + I_t + delta_{t+1}                             Eq. 8

Convention: segments count from 0, and ``epsilon_0 = delta_0``. delta and epsilon carry the number of the segment at
whose *end* they are measured; I_t arises in segment t + 1, which starts at ``theta*_{t,m}``. Eq. 7 has ``theta*_{t,0}``
there, but Eq. 8 holds only with ``theta*_{t,m}``, which its derivation uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Advance = Callable[[Tensor, int], Tensor]


class SegmentError(NamedTuple):
    """The errors of one segment t, all entries (P,).

    Convention: ``initialization`` is the error that arises in this segment, I_{t-1}, so that, with the ``accumulated``
    of the previous segment (zero before the first), ``accumulated = previous + initialization + matching``.

    Attributes:
        start: theta*_{t,0}.
        student: theta_{t,n}, of the student that has trained since epoch 0 ("evaluation").
        fresh: the end of a student that started at theta*_{t,0} ("distillation").
        target: theta*_{t,m}.
        accumulated: epsilon_t.
        initialization: I_{t-1}; zero in segment 0.
        matching: delta_t.
    """

    start: Tensor
    student: Tensor
    fresh: Tensor
    target: Tensor
    accumulated: Tensor
    initialization: Tensor
    matching: Tensor


def trajectory_errors(advance: Advance, teacher: Iterable[Tensor]) -> Iterator[SegmentError]:
    """Train one student along a teacher's trajectory, and in every segment a fresh one for comparison.

    Memory does not grow with the trajectory. Each segment takes two runs of ``advance``, the first one run.

    Args:
        advance: ``advance(weights, segment) -> weights``, n steps on the synthetic set; a function of its arguments
            only, so that all students of a segment see the same random draws. Segments count from 0.
        teacher: weights (P,) at the ends of segments: theta*_{0,0}, theta*_{0,m} = theta*_{1,0}, ...

    Yields:
        A :class:`SegmentError` per segment.

    Example:
        A teacher that moves by 1 per segment, and students that double their weight:

        >>> import torch
        >>> teacher = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])]
        >>> [(float(e.student), float(e.fresh)) for e in trajectory_errors(lambda w, t: 2 * w, teacher)]
        [(2.0, 2.0), (4.0, 4.0)]
    """
    student: Tensor | None = None
    for segment, (start, target) in enumerate(itertools.pairwise(teacher)):
        fresh = advance(start, segment)
        previous = start if student is None else student
        student = fresh if student is None else advance(student, segment)
        yield SegmentError(
            start=start,
            student=student,
            fresh=fresh,
            target=target,
            accumulated=student - target,
            initialization=(student - previous) - (fresh - start),
            matching=(fresh - start) - (target - start),
        )
