"""What the networks share: the norms, and the checks of what a network is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Norm = Literal["none", "batch", "layer", "instance", "group"]

# "Instance norm" of this field is affine and per channel: GroupNorm with as many groups as channels. (channels, size)
NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, size: nn.Identity(),
    "batch": lambda channels, size: nn.BatchNorm2d(channels),
    "layer": lambda channels, size: nn.LayerNorm([channels, size, size]),
    "instance": lambda channels, size: nn.GroupNorm(channels, channels),
    "group": lambda channels, size: nn.GroupNorm(4, channels),
}


def first_padding(in_channels: int, image_size: int) -> int:
    """Return the padding of a 3x3 convolution on the images: 1, or 3 for one channel of 28 px, which makes 32 px.

    Example:
        >>> first_padding(1, 28), first_padding(3, 32)
        (3, 1)
    """
    return 3 if (in_channels, image_size) == (1, 28) else 1


def check_option(network: str, what: str, value: str, known: Sequence[str] = get_args(Norm)) -> None:
    """Refuse an option that a network does not have.

    Args:
        network: its name, for the message.
        what: the option's name.
        value: what was asked for.
        known: what there is; the norms, if not given.

    Raises:
        InputError: if ``value`` is not among ``known``, which the message lists.

    Example:
        >>> check_option("VGG11", "norm", "batch")
    """
    if value not in known:
        raise InputError(f"{network} has no {what} {value!r}: choose from {list(known)}")


def check_size(network: str, image_size: int, *, halvings: int, least: int) -> None:
    """Refuse images that a network would halve to nothing.

    Args:
        network: its name, for the message.
        image_size: height and width in pixels.
        halvings: how many times the network halves them.
        least: the smallest size that it takes, in pixels.

    Raises:
        InputError: if ``image_size`` is below ``least``.

    Example:
        >>> check_size("VGG11", 32, halvings=5, least=32)
    """
    if image_size < least:
        raise InputError(
            f"{network} halves its images {halvings} times: {image_size} px is too small, it takes {least} px or more"
        )
