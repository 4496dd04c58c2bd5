"""The operations of DSA, the differentiable siamese augmentation, each a pure function of images and generator.

Convention: images are standardised or whitened, so values lie around 0 and are never clamped; 0 fills what an operation
uncovers. Parameters are drawn per image, unless the call is siamese: then one set of them serves the whole batch, and
the draws do not depend on the batch size, so that a generator in the same state does the same to another batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from ftd_lightning.functional.to_device import to_device

Operation = Callable[..., Tensor]

SAMPLED = ("scale", "rotate")  # the operations that sample between pixels


def _uniform(images: Tensor, generator: torch.Generator, *shape: int, siamese: bool) -> Tensor:
    """Draw from [0, 1), (N, *shape), or (1, *shape) if siamese.

    Draws are float32 for every dtype, so that float64 checks see the augmentation that float32 runs see.
    """
    u = torch.rand(1 if siamese else len(images), *shape, generator=generator, device=generator.device)
    return to_device(u, images.device, images.dtype)


def _integers(images: Tensor, generator: torch.Generator, high: int, *, axis: int, siamese: bool) -> Tensor:
    """Draw from {0 .. high} for the vertical (0) or horizontal (1) axis, (N,), or (1,) if siamese."""
    # One row of the two is used. Drawing just that one would leave the generator in another state, and so change the
    # augmentations, and thereby the teachers and sets, that a seed has produced since version 0.1.0.
    shape = (2, 1 if siamese else len(images))
    draws = torch.randint(high + 1, shape, generator=generator, device=generator.device)
    return to_device(draws[axis], images.device)


def flip(images: Tensor, generator: torch.Generator, *, probability: float = 0.5, siamese: bool = False) -> Tensor:
    """Mirror each image horizontally with a probability in [0, 1].

    Example:
        >>> flip(torch.tensor([[[[1.0, 2.0]]]]), torch.Generator(), probability=1.0)
        tensor([[[[2., 1.]]]])
    """
    u = _uniform(images, generator, 1, 1, 1, siamese=siamese)
    return torch.where(u < probability, images.flip(3), images)


def _warp(images: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor], *, align_corners: bool) -> Tensor:
    """Sample the images at linearly mapped, centred coordinates; bilinear, with zero padding.

    Args:
        images: (N, C, H, W).
        rows: the entries of the 2 x 2 matrix, row by row, each (N,) or (1,).
        align_corners: as in ``torch.nn.functional.grid_sample``.
    """
    y, x = (_coordinates(size, images, align_corners=align_corners) for size in images.shape[2:])
    a, b, c, d = (entry[:, None, None] for entry in rows)
    # Not affine_grid: it multiplies matrices, for which autocast and TF32 take numbers of 8 to 11 bits, and moves what
    # is sampled by up to a pixel.
    grid = torch.stack([a * x + b * y[:, None], c * x + d * y[:, None]], dim=-1)
    return grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=align_corners)


def _coordinates(size: int, images: Tensor, *, align_corners: bool) -> Tensor:
    """Place the centres of an axis's pixels between -1 and 1."""
    reach = 1.0 if align_corners and size > 1 else 1.0 - 1.0 / size
    return torch.linspace(-reach, reach, size, device=images.device, dtype=images.dtype)


def scale(
    images: Tensor,
    generator: torch.Generator,
    *,
    ratio: float = 1.2,
    siamese: bool = False,
    align_corners: bool = True,
) -> Tensor:
    """Scale the sampling coordinates of each axis by its own factor, uniform in (1/ratio, ratio).

    Example:
        >>> scale(torch.ones(2, 1, 4, 4), torch.Generator()).shape
        torch.Size([2, 1, 4, 4])
    """
    u = _uniform(images, generator, 2, siamese=siamese)
    factors = u * (ratio - 1 / ratio) + 1 / ratio
    zero = torch.zeros_like(u[:, 0])
    return _warp(images, (factors[:, 0], zero, zero, factors[:, 1]), align_corners=align_corners)


def rotate(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 15.0,
    siamese: bool = False,
    align_corners: bool = True,
) -> Tensor:
    """Rotate each image by an angle uniform in (-degrees, degrees).

    Example:
        >>> rotate(torch.ones(2, 1, 4, 4), torch.Generator()).shape
        torch.Size([2, 1, 4, 4])
    """
    angle = (_uniform(images, generator, siamese=siamese) - 0.5) * (2 * math.radians(degrees))
    return _warp(images, (angle.cos(), -angle.sin(), angle.sin(), angle.cos()), align_corners=align_corners)


def crop(images: Tensor, generator: torch.Generator, *, ratio: float = 0.125, siamese: bool = False) -> Tensor:
    """Shift each image by whole pixels in {-s .. s} on each axis, s = int(size * ratio + 0.5).

    Example:
        >>> crop(torch.ones(2, 1, 8, 8), torch.Generator()).shape
        torch.Size([2, 1, 8, 8])
    """
    count, channels, height, width = images.shape
    reach_y, reach_x = int(height * ratio + 0.5), int(width * ratio + 0.5)
    padded = pad(images, (reach_x, reach_x, reach_y, reach_y))
    shift_y = _integers(images, generator, 2 * reach_y, axis=0, siamese=siamese)
    shift_x = _integers(images, generator, 2 * reach_x, axis=1, siamese=siamese)
    rows = (shift_y[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (shift_x[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
    # No index repeats within either gather, so their backward scatter adds one term per pixel and is deterministic.
    strips = padded.gather(2, rows.expand(count, channels, height, padded.shape[3]))
    return strips.gather(3, columns.expand(count, channels, height, width))


def cutout(images: Tensor, generator: torch.Generator, *, ratio: float = 0.5, siamese: bool = False) -> Tensor:
    """Set a square of side int(size * ratio + 0.5), clipped at the border, to 0; its centre is uniform.

    Example:
        >>> float(cutout(torch.ones(1, 1, 4, 4), torch.Generator(), ratio=2.0).sum())
        0.0
    """
    inside = torch.ones(1, dtype=torch.bool, device=images.device)
    for axis in (2, 3):
        size = images.shape[axis]
        side = int(size * ratio + 0.5)
        # The centre of an even side lies between two pixels, and has one more possible position.
        centre = _integers(images, generator, size - side % 2, axis=axis - 2, siamese=siamese)
        offset = torch.arange(size, device=images.device) - (centre - side // 2)[:, None]
        span = (offset >= 0) & (offset < side)
        inside = inside & (span[:, None, :, None] if axis == 2 else span[:, None, None, :])
    return images.masked_fill(inside, 0.0)


def color(
    images: Tensor,
    generator: torch.Generator,
    *,
    brightness: float = 1.0,
    saturation: float = 2.0,
    contrast: float = 0.5,
    siamese: bool = False,
) -> Tensor:
    """Change brightness, then saturation (about each pixel's mean), then contrast (about the image's mean).

    ``x + (u - 0.5) * brightness``; ``(x - mean) * u * saturation + mean``; ``(x - mean) * (u + contrast) + mean``.

    Example:
        >>> color(torch.ones(2, 3, 4, 4), torch.Generator()).shape
        torch.Size([2, 3, 4, 4])
    """
    images = images + (_uniform(images, generator, 1, 1, 1, siamese=siamese) - 0.5) * brightness
    mean = images.mean(dim=1, keepdim=True)
    images = (images - mean) * (_uniform(images, generator, 1, 1, 1, siamese=siamese) * saturation) + mean
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_uniform(images, generator, 1, 1, 1, siamese=siamese) + contrast) + mean


OPERATIONS: dict[str, Operation] = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}
