"""Norms, padding and checks that the networks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from ftd_lightning.errors import InputError
from ftd_lightning.sizes import ImageSize, as_size, sides, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class InstanceNorm(nn.GroupNorm):
    """Affine norm per image and channel: ``GroupNorm`` with as many groups as channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the normalised maps, (N, C, H, W)."""
        if not is_compiled_for_cpu(input):
            return super().forward(input)
        maps = input.to(torch.promote_types(input.dtype, torch.float32))
        variance, mean = torch.var_mean(maps, (2, 3), correction=0, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight[:, None, None]
        return (maps * scale + (self.bias[:, None, None] - mean * scale)).to(input.dtype)


class AveragePooling(nn.AvgPool2d):
    """2x2 average pooling of maps whose sides are even."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return maps of half the size, (N, C, H / 2, W / 2)."""
        if not is_compiled_for_cpu(input):
            return super().forward(input)
        return input.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))


def is_compiled_for_cpu(maps: Tensor) -> bool:
    """Return whether a layer is written out, because inductor fuses torch's own less and stores maps in two layouts."""
    return torch.compiler.is_compiling() and maps.is_cpu


Norm = Literal["none", "batch", "layer", "instance", "group"]

# Of (channels, map).
NORMS: dict[str, Callable[[int, Sequence[int]], nn.Module]] = {
    "none": lambda channels, size: nn.Identity(),
    "batch": lambda channels, size: nn.BatchNorm2d(channels),
    "layer": lambda channels, size: nn.LayerNorm([channels, *size]),
    "instance": lambda channels, size: InstanceNorm(channels),
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
