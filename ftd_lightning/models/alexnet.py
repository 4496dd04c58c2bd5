"""AlexNet (Krizhevsky et al., 2012) for small images, as in DC: five convolutions, one linear layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.models.layers import NORMS, check_option, check_size
from ftd_lightning.sizes import ImageSize, sides

if TYPE_CHECKING:
    from ftd_lightning.models.layers import Norm

# (kernel size, channels) of a convolution; None is 2x2 max pooling.
PLAN: tuple[tuple[int, int] | None, ...] = ((5, 128), None, (5, 192), None, (3, 256), (3, 192), (3, 192), None)


class AlexNet(nn.Sequential):
    """Five times [convolution, norm, ReLU] with 2x2 max pooling after the first, second and last, then a linear layer.

    Convolutions keep the size of their map, except the first one on images of one channel, whose padding of 4 makes the
    map 4 px larger (28 px become 32).

    Args:
        in_channels: C of the images.
        num_classes: length of the logits.
        image_size: pixels, or (height, width), each at least 8 (4 with one channel); sides that pooling does not divide
            lose their last rows or columns. The linear layer grows with them.
        norm: "none", "batch", "layer", "instance" or "group" (4 groups).

    Raises:
        InputError: for a number out of range, an unknown norm, or an image that three poolings leave nothing of.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: ImageSize, norm: Norm = "none") -> None:
        check_bounds(AlexNet, locals())
        check_option("AlexNet", "norm", norm)
        enlarged = 4 if in_channels == 1 else 0
        check_size("AlexNet", image_size, halvings=PLAN.count(None), least=2 ** PLAN.count(None) - enlarged)
        size = [side + enlarged for side in sides(image_size)]
        layers: list[nn.Module] = []
        for step in PLAN:
            if step is None:
                layers.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
            else:
                kernel, channels = step
                padding = kernel // 2 + (0 if layers else enlarged // 2)
                convolution = nn.Conv2d(in_channels, channels, kernel, padding=padding)
                layers += [convolution, NORMS[norm](channels, size), nn.ReLU()]
                in_channels = channels
        super().__init__(*layers, nn.Flatten(), nn.Linear(in_channels * math.prod(size), num_classes))
