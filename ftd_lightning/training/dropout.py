"""Networks that a student cannot follow: those that draw random numbers as they run."""

from __future__ import annotations

from torch import nn

from ftd_lightning.errors import InputError

KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def refuse_dropout(network: nn.Module) -> None:
    """Refuse a network with dropout modules before hours are spent on its teachers.

    Raises:
        InputError: naming the module.

    Example:
        >>> refuse_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    """
    for name, part in network.named_modules():
        if isinstance(part, KINDS) and part.p > 0:
            raise InputError(f"network has dropout ({name!r}): a student must be a function of its weights; set p to 0")
