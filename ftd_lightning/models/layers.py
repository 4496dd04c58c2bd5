"""Norms, padding and checks that the networks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from ftd_lightning.errors import InputError
from ftd_lightning.sizes import ImageSize, as_size, sides, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Norm = Literal["none", "batch", "layer", "instance", "group"]

# "Instance norm" of this field is affine and per channel: GroupNorm with as many groups as channels. (channels, map)
NORMS: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "none": lambda channels, size: nn.Identity(),
    "batch": lambda channels, size: nn.BatchNorm2d(channels),
    "layer": lambda channels, size: nn.LayerNorm([channels, *size]),
    "instance": lambda channels, size: nn.GroupNorm(channels, channels),
    "group": lambda channels, size: nn.GroupNorm(4, channels),
}


def first_padding(in_channels: int, image_size: ImageSize) -> int:
    """Return the padding of a 3x3 convolution on the images: 1, or 3 for one channel of 28 px, which makes 32 px."""
    return 3 if (in_channels, as_size(image_size)) == (1, 28) else 1


def check_option(network: str, what: str, value: str, known: Sequence[str] = get_args(Norm)) -> None:
    """Raise InputError for an option of a network that is not among the known ones."""
    if value not in known:
        raise InputError(f"{network} has no {what} {value!r}: choose from {list(known)}")


def check_size(network: str, image_size: int | Sequence[int], *, halvings: int, least: int) -> None:
    """Raise InputError for images of a side below the least, in pixels, that a network takes."""
    if min(sides(image_size)) < least:
        raise InputError(
            f"{network} halves its images {halvings} times: {size_text(image_size)} is too small, it takes {least} px "
            "or more"
        )
