"""VGG11 (Simonyan and Zisserman, 2015, configuration A) for small images: its convolutions and one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.models.layers import NORMS, check_option, check_size, first_padding
from ftd_lightning.sizes import ImageSize, sides

if TYPE_CHECKING:
    from ftd_lightning.models.layers import Norm

# Channels of the convolutions before each pooling.
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nn.Sequential):
    """Eight times [3x3 convolution, norm, ReLU] in five stages, each ending in 2x2 max pooling, then a linear layer.

    The linear layer takes the mean over the last map, 512 numbers whatever the image size.

    Convention: images of one channel and 28 px (MNIST) become 32 px by a padding of 3, as in ``ConvNet``.

    Args:
        in_channels: C of the images.
        num_classes: length of the logits.
        image_size: pixels, or (height, width), each at least 32, or 28 with one channel; sides that pooling does not
            divide lose their last rows or columns.
        norm: "none", "batch", "layer", "instance" or "group" (4 groups).

    Raises:
        InputError: for a number out of range, an unknown norm, or an image that five poolings leave nothing of.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: ImageSize, norm: Norm = "instance") -> None:
        check_bounds(VGG11, locals())
        check_option("VGG11", "norm", norm)
        padding = first_padding(in_channels, image_size)
        size = [side + 2 * (padding - 1) for side in sides(image_size)]
        check_size("VGG11", size, halvings=len(STAGES), least=2 ** len(STAGES))
        layers: list[nn.Module] = []
        for stage in STAGES:
            for channels in stage:
                layers += [nn.Conv2d(in_channels, channels, 3, padding=padding), NORMS[norm](channels, size), nn.ReLU()]
                in_channels, padding = channels, 1
            layers.append(nn.MaxPool2d(2))
            size = [side // 2 for side in size]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
