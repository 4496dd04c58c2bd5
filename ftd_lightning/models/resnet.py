"""ResNet18 (He et al., 2016) for small images, and its variant that pools instead of striding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.models.layers import NORMS, check_option, check_size
from ftd_lightning.sizes import ImageSize, sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftd_lightning.models.layers import Norm

# (channels, stride of the first block); two blocks each.
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


def _convolution(in_channels: int, channels: int, kernel: int, stride: int, pool: int = 1) -> nn.Sequential:
    """Convolve without bias, then average ``pool`` x ``pool`` places; an identity keeps the names of the weights."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.AvgPool2d(pool) if pool > 1 else nn.Identity(),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x)).

    The shortcut is the identity, or a 1x1 convolution with its norm where the block changes the shape.

    With average pooling it halves the map, of ``size`` (height, width), by pooling instead of striding: after the
    first ReLU, and, in the shortcut, after the convolution. A stride keeps the last place of an odd map, pooling drops
    it.
    """

    def __init__(
        self, in_channels: int, channels: int, size: Sequence[int], stride: int, norm: Norm, *, average_pooling: bool
    ) -> None:
        super().__init__()
        stride, pool = (1, stride) if average_pooling else (stride, 1)
        strided = [-(-side // stride) for side in size]
        halved = [side // pool for side in strided]
        self.residual = nn.Sequential(
            _convolution(in_channels, channels, 3, stride),
            NORMS[norm](channels, strided),
            nn.ReLU() if pool == 1 else nn.Sequential(nn.ReLU(), nn.AvgPool2d(pool)),
            _convolution(channels, channels, 3, 1),
            NORMS[norm](channels, halved),
        )
        self.shortcut: nn.Module = nn.Identity()
        if max(stride, pool) != 1 or in_channels != channels:
            shortcut = _convolution(in_channels, channels, 1, stride, pool)
            self.shortcut = nn.Sequential(shortcut, NORMS[norm](channels, halved))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, *size) to (N, channels, H, W)."""
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out.relu()


class ResNet18(nn.Sequential):
    """A 3x3 convolution, norm and ReLU, four stages of two basic blocks, the mean over the map, a linear layer.

    Convention: convolutions have no bias, whatever the norm. At 32 px, and at 28 px with one channel, both variants
    equal the networks of DC and MTT, whose code takes no other size; here the linear layer follows the image size.

    Args:
        in_channels: C of the images.
        num_classes: length of the logits.
        image_size: pixels, or (height, width), each at least 8. Instance norm leaves only its offset of a last map of
            one place, and so takes at least 9 px, or 16 with average pooling.
        norm: "none", "batch", "layer", "instance" or "group" (4 groups).
        average_pooling: the variant "ResNet18_AP" of DC. Where a block halves its map, it averages 2x2 places after the
            first ReLU, and after the convolution of the shortcut, instead of striding; the linear layer takes the whole
            last map instead of its mean.

    Raises:
        InputError: for a number out of range, an unknown norm, or an image that is too small.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: ImageSize,
        norm: Norm = "instance",
        average_pooling: bool = False,
    ) -> None:
        check_bounds(ResNet18, locals())
        check_option("ResNet18", "norm", norm)
        name, least = "ResNet18", 8
        if norm == "instance":
            name, least = "ResNet18 with instance norm", 16 if average_pooling else 9
        check_size(name, image_size, halvings=3, least=least)
        channels, size = STAGES[0][0], list(sides(image_size))
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        layers += [NORMS[norm](channels, size), nn.ReLU()]
        for wider, first_stride in STAGES:
            for stride in (first_stride, 1):
                layers.append(BasicBlock(channels, wider, size, stride, norm, average_pooling=average_pooling))
                channels = wider
                size = [side // stride if average_pooling else -(-side // stride) for side in size]
        last = math.prod(size) if average_pooling else 1
        layers.append(nn.Identity() if average_pooling else nn.AdaptiveAvgPool2d(1))
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * last, num_classes))


def resnet18_ap(in_channels: int, num_classes: int, image_size: ImageSize, norm: Norm = "instance") -> ResNet18:
    """Build the average-pooling variant of :class:`ResNet18`, with the same arguments."""
    return ResNet18(in_channels, num_classes, image_size, norm, average_pooling=True)
