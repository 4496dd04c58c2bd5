"""ResNet18 (He et al., 2016) with the stem for small images, and its variant that pools where others stride."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.models.layers import NORMS, check_option, check_size

if TYPE_CHECKING:
    from ftd_lightning.models.layers import Norm

# (channels, stride of the first block); two blocks each.
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


def _convolution(in_channels: int, channels: int, kernel: int, stride: int, *, average_pooling: bool) -> nn.Sequential:
    """Convolve without bias, making the map ``stride`` times smaller by striding or by pooling afterwards.

    Pooling keeps the incomplete window at the edge of an odd map, as a stride does: both variants have maps, and layer
    norms, of the same sizes. It is there as an identity too, so that weights have the same names in both.
    """
    pooled = average_pooling and stride > 1
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride=1 if pooled else stride, padding=kernel // 2, bias=False),
        nn.AvgPool2d(stride, ceil_mode=True) if pooled else nn.Identity(),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x)).

    The shortcut is the identity, or a 1x1 convolution with its norm where the block changes the shape.

    Args:
        in_channels: of the map that comes in.
        channels: of the map that goes out.
        size: height and width of the map that goes out.
        stride: 1, or 2 to halve the map.
        norm: a key of ``NORMS``.
        average_pooling: halve by pooling instead of striding.

    Example:
        >>> import torch
        >>> BasicBlock(4, 8, 3, 2, "instance", average_pooling=True)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(
        self, in_channels: int, channels: int, size: int, stride: int, norm: Norm, *, average_pooling: bool
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(in_channels, channels, 3, stride, average_pooling=average_pooling),
            NORMS[norm](channels, size),
            nn.ReLU(),
            _convolution(channels, channels, 3, 1, average_pooling=average_pooling),
            NORMS[norm](channels, size),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            shortcut = _convolution(in_channels, channels, 1, stride, average_pooling=average_pooling)
            self.shortcut = nn.Sequential(shortcut, NORMS[norm](channels, size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, size, size)."""
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out.relu()


class ResNet18(nn.Sequential):
    """A 3x3 convolution, norm and ReLU, four stages of two basic blocks, the mean over the map, a linear layer.

    Convention: convolutions have no bias, whatever the norm, and the linear layer takes 512 numbers whatever the image
    size (public networks of the pooling variant give it all of the 4x4 map, which ties them to 32 px).

    Args:
        in_channels: C of the images.
        num_classes: length of the logits.
        image_size: height and width in pixels, at least 8; 9 with instance norm, of whose last map of 8 px, one place,
            nothing would be left but the offset.
        norm: "none", "batch", "layer", "instance" or "group" (4 groups).
        average_pooling: give every convolution of stride 2 a stride of 1 and average 2x2 places after it.

    Raises:
        InputError: for a number out of range, an unknown norm, or an image that is too small.

    Example:
        >>> import torch
        >>> ResNet18(3, 10, 32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: int,
        norm: Norm = "instance",
        average_pooling: bool = False,
    ) -> None:
        check_bounds(ResNet18, locals())
        check_option("ResNet18", "norm", norm)
        name, least = ("ResNet18 with instance norm", 9) if norm == "instance" else ("ResNet18", 8)
        check_size(name, image_size, halvings=3, least=least)
        channels, size = STAGES[0][0], image_size
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        layers += [NORMS[norm](channels, size), nn.ReLU()]
        for wider, first_stride in STAGES:
            for stride in (first_stride, 1):
                size = -(-size // stride)
                layers.append(BasicBlock(channels, wider, size, stride, norm, average_pooling=average_pooling))
                channels = wider
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, K)."""
        logits: Tensor = super().forward(images)
        return logits


def resnet18_ap(in_channels: int, num_classes: int, image_size: int, norm: Norm = "instance") -> ResNet18:
    """Build the average-pooling variant of :class:`ResNet18`, with the same arguments."""
    return ResNet18(in_channels, num_classes, image_size, norm, average_pooling=True)
