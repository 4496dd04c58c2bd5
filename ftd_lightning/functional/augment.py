"""DSA, the differentiable siamese augmentation (Zhao and Bilen, ICML 2021), on whole batches.

All draws come from the generator, in a fixed order, whatever the device of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import to_device

Mode = Literal["single", "multiple"]

STRATEGY = "color_crop_cutout_flip_scale_rotate"


@cache
def parse_strategy(strategy: str) -> tuple[str, ...]:
    """Split a strategy such as "color_crop_flip" into operations; raises InputError for an unknown one."""
    names = tuple(name for name in strategy.split("_") if name)
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
        images: (N, C, H, W), standardised or whitened, any floating dtype and device.
        generator: advanced by the draws; a CPU generator needs no synchronisation.
        strategy: operations joined by "_"; "" returns the images unchanged.
        mode: "single" draws one operation for the whole batch; "multiple" applies all, in the strategy's order.
        siamese: use the same parameters for all images. Generators in the same state then augment the real and the
            synthetic images of a matching step (DSA, DM, CAFE) alike, whatever their numbers.
        align_corners: whether scale and rotate place the corners of the coordinate system at the centres of the
            outermost pixels (MTT, FTD) or at their outer edges (False: DC, DSA, DM, CAFE).

    Returns:
        (N, C, H, W), same dtype and device.

    Raises:
        InputError: (a ValueError) for an unknown operation or mode.
    """
    return Augmentation(strategy, mode, align_corners)(images, generator, siamese=siamese)


@dataclass(frozen=True)
class Augmentation:
    """DSA with chosen settings: a callable ``(images, generator) -> images``.

    Args:
        strategy: as for :func:`dsa`; "" is no augmentation, and false.
        mode: as for :func:`dsa`.
        align_corners: as for :func:`dsa`.

    Raises:
        InputError: (a ValueError) for an unknown operation or mode.
    """

    strategy: str = STRATEGY
    mode: Mode = "single"
    align_corners: bool = True

    def __post_init__(self) -> None:
        parse_strategy(self.strategy)
        if self.mode not in get_args(Mode):
            raise InputError(f"DSA mode {self.mode!r} is unknown: choose from {list(get_args(Mode))}")

    def __call__(self, images: Tensor, generator: torch.Generator, *, siamese: bool = False) -> Tensor:
        """Augment a batch, (N, C, H, W); see :func:`dsa`."""
        names = parse_strategy(self.strategy)
        if self.mode == "single" and names:
            names = (names[int(torch.randint(len(names), (1,), generator=generator, device=generator.device))],)
        # Below float32 the sampling grid and the draws are too coarse: bfloat16's 8 bits are half a pixel at 128 px.
        result = images.to(torch.promote_types(images.dtype, torch.float32))
        for name in names:
            options = {"align_corners": self.align_corners} if name in SAMPLED else {}
            result = OPERATIONS[name](result, generator, siamese=siamese, **options)
        return result.to(images.dtype)

    def __bool__(self) -> bool:
        return bool(parse_strategy(self.strategy))

    @classmethod
    def of(cls, value: Augmentation | Mapping[str, Any] | str, *, align_corners: bool = True) -> Augmentation:
        """Build an augmentation from the values of configs and files.

        Args:
            value: an augmentation, which is returned as it is; its fields as a mapping; or a strategy.
            align_corners: the default for a mapping or strategy that does not specify it.

        Raises:
            InputError: (a ValueError) for an unknown field, operation or mode, or a value of another type.

        Example:
            >>> Augmentation.of({"strategy": "crop_flip", "mode": "multiple"}, align_corners=False)
            Augmentation(strategy='crop_flip', mode='multiple', align_corners=False)
        """
        if isinstance(value, Augmentation):
            return value
        settings = {"strategy": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping):
            raise InputError(
                f'augment={value!r} must be a strategy ("" for none) or a mapping such as {{"strategy": ""}}'
            )
        names = [field.name for field in fields(cls)]
        unknown = [key for key in settings if key not in names]
        if unknown:
            raise InputError(f"augment has no field {unknown[0]!r}: choose from {names}")
        return cls(**{"align_corners": align_corners, **settings})

    def plain(self) -> dict[str, Any]:
        """Return all fields as plain values, from which :meth:`of` builds the same augmentation."""
        return asdict(self)

    def describe(self) -> dict[str, Any]:
        """Return the fields that files record: ``align_corners`` only where it is False."""
        return {key: value for key, value in self.plain().items() if (key, value) != ("align_corners", True)}

    def deterministic_on(self, device: torch.device) -> bool:
        """Return whether the gradient in the images is deterministic; on CUDA that of ``grid_sample`` is not."""
        return device.type != "cuda" or not any(name in SAMPLED for name in parse_strategy(self.strategy))


Operation = Callable[..., Tensor]

SAMPLED = ("scale", "rotate")  # the operations that sample between pixels


def _uniform(images: Tensor, generator: torch.Generator, *shape: int, siamese: bool) -> Tensor:
    """Draw from [0, 1), (N, *shape), or (1, *shape) if siamese; the same numbers for every dtype."""
    u = torch.rand(1 if siamese else len(images), *shape, generator=generator, device=generator.device)
    return to_device(u, images.device, images.dtype)


def _integers(images: Tensor, generator: torch.Generator, high: int, *, axis: int, siamese: bool) -> Tensor:
    """Draw from {0 .. high} for the vertical (0) or horizontal (1) axis, (N,), or (1,) if siamese."""
    # Two rows, of which one is used: with one, seeds would give other augmentations, and so other sets, than in 0.2.
    shape = (2, 1 if siamese else len(images))
    draws = torch.randint(high + 1, shape, generator=generator, device=generator.device)
    return to_device(draws[axis], images.device)


def flip(images: Tensor, generator: torch.Generator, *, probability: float = 0.5, siamese: bool = False) -> Tensor:
    """Mirror each image horizontally with a probability in [0, 1]."""
    u = _uniform(images, generator, 1, 1, 1, siamese=siamese)
    return torch.where(u < probability, images.flip(3), images)


def _warp(images: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor], *, align_corners: bool) -> Tensor:
    """Sample bilinearly, with zero padding, at coordinates mapped by a 2 x 2 matrix: its entries, (N,) or (1,) each."""

    def coordinates(size: int) -> Tensor:
        reach = 1.0 if align_corners and size > 1 else 1.0 - 1.0 / size
        return torch.linspace(-reach, reach, size, device=images.device, dtype=images.dtype)

    y, x = (coordinates(size) for size in images.shape[2:])
    a, b, c, d = (entry[:, None, None] for entry in rows)
    # Not affine_grid: autocast and TF32 round its matrix product, which moves samples by up to a pixel.
    grid = torch.stack([a * x + b * y[:, None], c * x + d * y[:, None]], dim=-1)
    return grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=align_corners)


def scale(
    images: Tensor, generator: torch.Generator, *, ratio: float = 1.2, siamese: bool = False, align_corners: bool = True
) -> Tensor:
    """Scale the sampling coordinates of each axis by its own factor, uniform in (1/ratio, ratio)."""
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
    """Rotate each image by an angle uniform in (-degrees, degrees)."""
    angle = (_uniform(images, generator, siamese=siamese) - 0.5) * (2 * math.radians(degrees))
    height, width = (max(size - 1, 1) if align_corners else size for size in images.shape[2:])
    cos, sin = angle.cos(), angle.sin()
    # Coordinates run from -1 to 1 on both axes: a turn by an angle in pixels has the ratio of the sides in it.
    rows = (cos, -sin * (height / width), sin * (width / height), cos)
    return _warp(images, rows, align_corners=align_corners)


def crop(images: Tensor, generator: torch.Generator, *, ratio: float = 0.125, siamese: bool = False) -> Tensor:
    """Shift each image by whole pixels in {-s .. s} on each axis, s = int(size * ratio + 0.5)."""
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
    """Set a box to 0, int(size * ratio + 0.5) long on each axis, clipped at the border; its centre is uniform."""
    spans = []
    for axis in (2, 3):
        size = images.shape[axis]
        side = int(size * ratio + 0.5)
        # The centre of an even side lies between two pixels, and has one more possible position.
        centre = _integers(images, generator, size - side % 2, axis=axis - 2, siamese=siamese)
        offset = torch.arange(size, device=images.device) - (centre - side // 2)[:, None]
        spans.append((offset >= 0) & (offset < side))
    rows, columns = spans
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


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
