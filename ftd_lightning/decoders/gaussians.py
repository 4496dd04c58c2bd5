"""The decoder of Gaussians (GSDD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from ftd_lightning.bounds import check_bounds
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.sizes import sides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftd_lightning.contracts import ImageShape

AT_ONCE = 2**24  # values of one temporary: pixels times Gaussians of the images that are drawn together
ANTI_ALIASING = 1 / 12  # px^2, the variance of a pixel's square; added to each Gaussian's


@dataclass
class Gaussians(Decoder):
    """Draws every image as a sum of coloured Gaussians (GSDD, ICLR 2026 submission, Eq. 1 to 11).

    A Gaussian has a centre, three entries of the Cholesky factor of its covariance, in pixels, a colour of C channels,
    and a weight: 6 + C numbers, float32 here, where the published ones are bf16 (twice as many images in the same
    bytes). Centres are clamped to the image, as published. Left out: supersampling, and the penalty on centres near the
    border: without it, one that crosses the border stays there.

    It begins with real images, which the Gaussians are fitted to by Adam.

    Args:
        gaussians: Gaussians of each image.
        fit_steps: of Adam, at the start.
    """

    gaussians: int = 22
    fit_steps: int = 300

    name: ClassVar[str] = "gaussians"

    def __post_init__(self) -> None:
        check_bounds(Gaussians, vars(self))

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return how many images of so many Gaussians the numbers allow."""
        whole = ipc * shape.in_channels * math.prod(sides(shape.image_size))
        return self.at_least_one(whole / (self.gaussians * (6 + shape.in_channels)), "lower gaussians or raise ipc")

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Fit Gaussians, spread evenly at first, to the images."""
        count, (channels, height, width) = self.gaussians, self.shape
        along = math.ceil(math.sqrt(count))
        places = torch.arange(count)
        centres = torch.stack([(places // along + 0.5) / along, (places % along + 0.5) / along], 1) * 2 - 1
        start = images.new_zeros(len(images), count, 6 + channels)
        start[:, :, :2] = centres.clamp(-0.95, 0.95)
        start[:, :, 2] = start[:, :, 4] = math.sqrt(height * width) / along / 2
        pixels = ((centres + 1) / 2 * torch.tensor([height, width])).long()
        start[:, :, 5] = 1.0
        start[:, :, 6:] = images[:, :, pixels[:, 0].clamp(max=height - 1), pixels[:, 1].clamp(max=width - 1)].mT / 2
        learned = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([learned], lr=1e-2)
        with torch.enable_grad():
            for _ in range(self.fit_steps):
                optimizer.zero_grad()
                (self.decode({"gaussians": learned}) - images).square().mean((1, 2, 3)).sum().backward()
                optimizer.step()
        return {"gaussians": learned.detach()}

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Draw the images, some at a time: backward passes draw them again, so that memory does not grow with them."""
        values = parameters["gaussians"] if index is None else parameters["gaussians"][index]
        some = max(1, AT_ONCE // (self.gaussians * math.prod(self.shape[1:])))
        parts = values.split(some)
        if len(parts) == 1:
            return self._draw(values)
        return torch.cat([checkpoint(self._draw, part, use_reentrant=False) for part in parts])

    def _draw(self, values: Tensor) -> Tensor:
        """Draw Gaussians (n, M, 6 + C) as images (n, C, H, W)."""
        height, width = self.shape[1:]
        centres = (values[..., :2].clamp(-1, 1) + 1) / 2 * values.new_tensor([height, width])
        a, b, c = values[..., 2:5].unbind(-1)  # the covariance is L L^T, L = [[a, 0], [b, c]]
        yy, xy, xx = a * a + ANTI_ALIASING, a * b, b * b + c * c + ANTI_ALIASING
        scale = 1 / (yy * xx - xy * xy)
        y = torch.arange(height).to(values)[:, None] + 0.5 - centres[..., 0, None, None]  # (n, M, H, 1)
        x = torch.arange(width).to(values) + 0.5 - centres[..., 1, None, None]  # (n, M, 1, W)
        inverse = [(scale * part)[..., None, None] for part in (xx, xy, yy)]
        weights = torch.exp(-0.5 * (inverse[0] * y * y - 2 * inverse[1] * y * x + inverse[2] * x * x))
        return torch.einsum("nmhw,nmc->nchw", weights, values[..., 5, None] * values[..., 6:])
