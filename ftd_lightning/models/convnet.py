"""ConvNet (Gidaris and Komodakis, 2018), the usual network of dataset distillation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.errors import InputError
from ftd_lightning.models.layers import NORMS, AveragePooling, Norm, check_option, first_padding
from ftd_lightning.sizes import ImageSize, sides, size_text

if TYPE_CHECKING:
    from collections.abc import Callable

Activation = Literal["sigmoid", "relu", "leakyrelu"]
Pooling = Literal["none", "max", "avg"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leakyrelu": lambda: nn.LeakyReLU(0.01),
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "max": lambda: nn.MaxPool2d(2),
    "avg": AveragePooling,
}


class ConvNet(nn.Sequential):
    """Depth times [3x3 convolution, norm, activation, 2x2 pooling], then a linear layer.

    Convention: images of one channel and 28 px (MNIST) become 32 px by a padding of 3 in the first convolution, as in
    DC and MTT. Their code pads every image of one channel so; here other sizes keep a padding of 1.

    Args:
        in_channels: C of the images.
        num_classes: length of the logits.
        image_size: pixels, or (height, width); pooling must divide each side (32 instead of 28 with one channel)
            ``depth`` times.
        width: channels of every convolution.
        depth: number of blocks.
        norm: "none", "batch", "layer", "instance" or "group" (4 groups).
        activation: "sigmoid", "relu" or "leakyrelu".
        pooling: "none", "max" or "avg".

    Raises:
        InputError: for a number out of range, an unknown option, a size that pooling does not divide, or a width that 4
            groups do not.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: ImageSize,
        width: int = 128,
        depth: int = 3,
        norm: Norm = "instance",
        activation: Activation = "relu",
        pooling: Pooling = "avg",
    ) -> None:
        check_bounds(ConvNet, locals())
        check_option("ConvNet", "norm", norm)
        check_option("ConvNet", "activation", activation, get_args(Activation))
        check_option("ConvNet", "pooling", pooling, get_args(Pooling))
        if norm == "group" and width % 4:
            raise InputError(f"ConvNet's norm 'group' has 4 groups, which do not divide width {width}")
        padding = first_padding(in_channels, image_size)
        size = [side + 2 * (padding - 1) for side in sides(image_size)]
        if pooling != "none" and any(side % 2**depth for side in size):
            given = size_text(image_size)
            raise InputError(f"ConvNet of depth {depth} cannot halve {given} {depth} times: lower the depth")
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(nn.Conv2d(in_channels, width, 3, padding=padding))
            layers += [NORMS[norm](width, size), ACTIVATIONS[activation](), POOLINGS[pooling]()]
            in_channels, padding = width, 1
            size = size if pooling == "none" else [side // 2 for side in size]
        super().__init__(*layers, nn.Flatten(), nn.Linear(in_channels * math.prod(size), num_classes))
