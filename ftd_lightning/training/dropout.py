"""Networks that a student cannot follow: those that draw random numbers as they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ftd_lightning.errors import InputError
from ftd_lightning.functional.inner_step import draws_random_numbers

if TYPE_CHECKING:
    from torch import Tensor

KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def refuse_dropout(network: nn.Module, images: Tensor | None = None) -> None:
    """Refuse a network with dropout, in whatever form, before hours are spent on its teachers.

    Args:
        network: in training mode.
        images: (N, C, H, W), a few that it takes; None looks for dropout modules only.

    Raises:
        InputError: for such a network.

    Example:
        >>> refuse_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    """
    for name, part in network.named_modules():
        if isinstance(part, KINDS) and part.p > 0:
            raise InputError(f"network has dropout ({name!r}): a student must be a function of its weights; set p to 0")
    if images is not None and draws_random_numbers(network, images):
        raise InputError(
            f"{type(network).__name__} draws random numbers (dropout, drop path): a student must be a function of its "
            "weights; switch that off"
        )
