"""DSA, the differentiable siamese augmentation (Zhao and Bilen, ICML 2021), on whole batches.

Convention: images are normalised or whitened, so values lie around 0 and are never clamped; 0 fills what an operation
uncovers. Every image has parameters of its own, unless the call is siamese: then one set serves the whole batch, and
its draws do not depend on the batch's size, so that a generator in the same state does the same to another batch. All
draws come from the generator, in a fixed order, whatever the device of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from ftd_lightning.errors import InputError

Mode = Literal["single", "multiple"]
Operation = Callable[..., Tensor]

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def _uniform(images: Tensor, generator: torch.Generator, *shape: int, siamese: bool) -> Tensor:
    """U in [0, 1), float32 draws for every dtype so that float64 checks see the augmentation that float32 runs see."""
    u = torch.rand(1 if siamese else len(images), *shape, generator=generator, device=generator.device)
    return u.to(images.device, images.dtype, non_blocking=True)


def _integers(images: Tensor, generator: torch.Generator, low: int, high: int, *, siamese: bool) -> Tensor:
    """(2, N) integers in {low .. high}, (2, 1) if siamese: one for each of the two axes."""
    shape = (2, 1 if siamese else len(images))
    draws = torch.randint(low, high + 1, shape, generator=generator, device=generator.device)
    return draws.to(images.device, non_blocking=True)


def flip(images: Tensor, generator: torch.Generator, *, probability: float = 0.5, siamese: bool = False) -> Tensor:
    """Mirror each image left to right with a probability in [0, 1].

    Example:
        >>> flip(torch.tensor([[[[1.0, 2.0]]]]), torch.Generator(), probability=1.0)
        tensor([[[[2., 1.]]]])
    """
    u = _uniform(images, generator, 1, 1, 1, siamese=siamese)
    return torch.where(u < probability, images.flip(3), images)


def _warp(images: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor], *, align_corners: bool) -> Tensor:
    """Sample at a linear map of the centred coordinates; bilinear, zero padding."""
    zero = torch.zeros_like(rows[0])
    theta = torch.stack([rows[0], rows[1], zero, rows[2], rows[3], zero], dim=1).view(-1, 2, 3)
    grid = affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=align_corners)
    return grid_sample(images, grid, align_corners=align_corners)


def scale(
    images: Tensor,
    generator: torch.Generator,
    *,
    ratio: float = 1.2,
    siamese: bool = False,
    align_corners: bool = True,
) -> Tensor:
    """Stretch each axis by a factor of its own, uniform in (1/ratio, ratio).

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
    """Turn each image by an angle uniform in (-degrees, degrees).

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
    shift_y = _integers(images, generator, 0, 2 * reach_y, siamese=siamese)[0]
    shift_x = _integers(images, generator, 0, 2 * reach_x, siamese=siamese)[1]
    rows = (shift_y[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (shift_x[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
    # Two gathers: no index repeats within one, so the backward scatter has one summand a place and is deterministic.
    strips = padded.gather(2, rows.expand(count, channels, height, padded.shape[3]))
    return strips.gather(3, columns.expand(count, channels, height, width))


def cutout(images: Tensor, generator: torch.Generator, *, ratio: float = 0.5, siamese: bool = False) -> Tensor:
    """Fill a square of side int(size * ratio + 0.5) with 0; its centre is uniform, what sticks out is cut off.

    Example:
        >>> float(cutout(torch.ones(1, 1, 4, 4), torch.Generator(), ratio=2.0).sum())
        0.0
    """
    inside = torch.ones(1, dtype=torch.bool, device=images.device)
    for axis in (2, 3):
        size = images.shape[axis]
        side = int(size * ratio + 0.5)
        # An even side has its middle between two pixels and one more place to stand.
        centre = _integers(images, generator, 0, size - side % 2, siamese=siamese)[axis - 2]
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


def parse_strategy(strategy: str) -> list[str]:
    """Split a strategy such as "color_crop_flip" into its operations.

    Raises:
        InputError: (a ValueError) for an operation that is not there.

    Example:
        >>> parse_strategy("flip_scale")
        ['flip', 'scale']
    """
    names = [name for name in strategy.split("_") if name]
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise InputError(f"DSA has no operation {unknown[0]!r}: choose from {list(OPERATIONS)}")
    return names


def dsa(
    images: Tensor,
    generator: torch.Generator,
    *,
    strategy: str = STRATEGY,
    mode: Mode = "single",
    siamese: bool = False,
    align_corners: bool = True,
) -> Tensor:
    """Augment a batch differentiably: a pure function of the images and the generator's state.

    Args:
        images: (N, C, H, W), normalised or whitened, any floating dtype and device.
        generator: moved on by the draws; on the CPU, no step of it waits for a device.
        strategy: operations joined by "_"; "" leaves the images as they are.
        mode: "single" draws one operation for the whole batch; "multiple" applies all, in the strategy's order.
        siamese: give all images the same parameters. Real and synthetic images of a matching step (DSA, DM, CAFE) are
            then augmented alike by generators in the same state, however many of each there are.
        align_corners: whether scale and rotate turn about pixel centres from corner to corner (MTT, FTD) or count
            pixels as squares (False: DC, DSA, DM, CAFE).

    Returns:
        (N, C, H, W), same dtype and device.

    Raises:
        ValueError: for an unknown operation or mode.

    Example:
        >>> x = torch.randn(4, 3, 8, 8)
        >>> a, b = (dsa(x, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> bool(a.equal(b))
        True
        >>> a, b = (dsa(x[:n], torch.Generator().manual_seed(0), siamese=True) for n in (1, 4))
        >>> bool(a[0].allclose(b[0]))
        True
    """
    if mode not in get_args(Mode):
        raise ValueError(f"DSA mode {mode!r} is unknown: choose from {list(get_args(Mode))}")
    names = parse_strategy(strategy)
    if mode == "single" and names:
        names = [names[int(torch.randint(len(names), (1,), generator=generator, device=generator.device))]]
    # Below float32 the sampling grid and the draws are too coarse: bfloat16's 8 bits are half a pixel at 128 px.
    result = images.to(torch.promote_types(images.dtype, torch.float32))
    for name in names:
        # Only what is asked for: an operation that was added to OPERATIONS need not know of it.
        options = {"siamese": True} if siamese else {}
        if not align_corners and name in ("scale", "rotate"):
            options["align_corners"] = False
        result = OPERATIONS[name](result, generator, **options)
    return result.to(images.dtype)
