"""Parameter pruning in the matching loss: our reading of PP, after the definition of DPD.

PP (Li, Togo, Ogawa and Haseyama, "Dataset Distillation Using Parameter Pruning", IEICE Trans. 2024) leaves parameters
that are hard to match out of the matching loss, but no source states its similarity measure or threshold. DPD (Cao et
al., ACML 2025, Eq. 3-9) writes such a rule down, and that is the definition followed here::

    d_j = |theta_n,j - theta*_{t+m},j|;   K = all but the floor(P * rate) parameters of largest d_j
    loss = sum_{j in K} (theta_n - theta*_{t+m})_j^2 / sum_{j in K} (theta*_t - theta*_{t+m})_j^2
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["drop_largest", "similarity_below"]


@torch.no_grad()
def keep_mask(
    student: Tensor,
    target: Tensor,
    start: Tensor | None = None,
    *,
    rule: Rule,
    rate: float = 0.0,
    epsilon: float = 0.0,
) -> Tensor:
    """Tell which parameters stay in the matching loss (our reading of PP).

    "drop_largest" is DPD's rule: without the ``floor(P * rate)`` of largest ``|student - target|``; their rate is 0.1.
    "similarity_below" is another reading of PP: without those whose similarity
    ``min(|s|, |t|) / max(|s|, |t|)``, 0 where s and t differ in sign and 1 where both are 0, lies below ``epsilon``.

    Convention: the mask is drawn up anew for every loss and is not differentiated. Of equally large differences at the
    cut, which ones go is not said, only how many.

    Args:
        student: theta_n, (P,).
        target: theta*_{t+m}, (P,).
        start: theta*_t, (P,): compare the displacements from it rather than the weights themselves by similarity;
            differences, and so "drop_largest", do not depend on it.
        rule: which of the two.
        rate: fraction dropped by "drop_largest", in [0, 1).
        epsilon: threshold of "similarity_below", in [0, 1].

    Returns:
        (P,) bool, True for what is kept; all True at rate 0 or epsilon 0.

    Raises:
        ValueError: for another rule, or a rate or epsilon out of range.

    Example:
        >>> student, target = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 3.5, 0.0])
        >>> keep_mask(student, target, rule="drop_largest", rate=0.25)
        tensor([ True, False,  True,  True])
        >>> keep_mask(student, target, rule="similarity_below", epsilon=0.6)
        tensor([False, False,  True,  True])
    """
    if rule not in get_args(Rule):
        raise ValueError(f"pruning rule {rule!r} is unknown: choose from {list(get_args(Rule))}")
    if not (0 <= rate < 1 and 0 <= epsilon <= 1):
        raise ValueError(f"rate={rate} must lie in [0, 1) and epsilon={epsilon} in [0, 1]")
    if rule == "drop_largest":
        dropped = (student - target).abs().topk(int(student.numel() * rate), sorted=False).indices
        return torch.ones_like(student, dtype=torch.bool).index_fill_(0, dropped, False)
    s, t = (student, target) if start is None else (student - start, target - start)
    smaller, larger = torch.minimum(s.abs(), t.abs()), torch.maximum(s.abs(), t.abs())
    similarity = torch.where(larger > 0, smaller / larger, 1.0).masked_fill(s.sign() * t.sign() < 0, 0.0)
    return similarity >= epsilon


def pruned_distance(student: Tensor, start: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Measure the normalized distance over the parameters that are kept (our reading of PP; DPD's loss).

    ``sum_K (theta_n - theta*_{t+m})^2 / sum_K (theta*_t - theta*_{t+m})^2``: one mask for numerator and denominator.

    Convention: with nothing dropped this is ``normalized_distance``, bit for bit. If the teacher did not move any of
    the kept parameters, the denominator is its movement in all of them.

    Args:
        student: theta_n, (P,).
        start: theta*_t, (P,).
        target: theta*_{t+m}, (P,).
        keep: (P,) bool; see :func:`keep_mask`.

    Returns:
        A scalar, differentiable in the weights.

    Example:
        >>> student, start, target = torch.tensor([1.0, 9.0]), torch.zeros(2), torch.tensor([2.0, 1.0])
        >>> pruned_distance(student, start, target, torch.tensor([True, False]))
        tensor(0.2500)
    """
    # Zeros in the places of what is dropped, instead of shorter vectors: no wait for their length, same order of sums.
    movement = (start - target).square()
    kept = torch.where(keep, movement, 0.0).sum()
    denominator = torch.where(kept > 0, kept, movement.sum())
    return torch.where(keep, (student - target).square(), 0.0).sum() / denominator
