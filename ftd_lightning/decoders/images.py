"""Decoders of plain images: smaller ones (multi-formation, IDC), fewer (flips, FYI), or sums of all sizes (pyramid)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import interpolate

from ftd_lightning.bounds import check_bounds
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.sizes import sides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftd_lightning.contracts import ImageShape


@dataclass
class MultiFormation(Decoder):
    """Stores ``factor**2`` images in the pixels of one: a grid of small images, each enlarged (IDC, Kim et al., 2022).

    Cells are enlarged bilinearly, ``align_corners`` False. It begins with real images shrunk by averaging, where the
    published code drops pixels; its "multi" and "bound" formations are left out.

    Args:
        factor: images along each side of the grid; it divides the height and the width.
    """

    factor: int = 2

    name: ClassVar[str] = "multi-formation"

    def __post_init__(self) -> None:
        check_bounds(MultiFormation, vars(self))

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return ``ipc * factor**2``."""
        for side in sides(shape.image_size):
            if side % self.factor:
                raise InputError(f"decoder: factor={self.factor} does not divide {side} px")
        return ipc * self.factor**2

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Shrink the images into cells: image ``i`` of a class into cell ``i // ipc`` of stored image ``i % ipc``."""
        channels, height, width = self.shape
        f, (h, w) = self.factor, (height // self.factor, width // self.factor)
        small = interpolate(images, size=(h, w), mode="area")
        cells = small.reshape(self.num_classes, f, f, -1, channels, h, w)
        return {"images": cells.permute(0, 3, 4, 1, 5, 2, 6).reshape(-1, channels, height, width)}

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Cut the grids up and enlarge their cells."""
        channels, height, width = self.shape
        f, (h, w) = self.factor, (height // self.factor, width // self.factor)
        grids = parameters["images"].reshape(self.num_classes, -1, channels, f, h, f, w)
        cells = grids.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, channels, h, w)
        return interpolate(cells if index is None else cells[index], size=(height, width), mode="bilinear")


@dataclass
class Flip(Decoder):
    """Stores one image for itself and its mirror image (FYI, Son et al., ECCV 2024).

    The published method mirrors each drawn mini-batch; here a mini-batch may have one of the two.
    """

    name: ClassVar[str] = "flip"

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return ``2 * ipc``."""
        return 2 * ipc

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Take the first half of each class."""
        of_class = images.unflatten(0, (self.num_classes, 2, -1))
        return {"images": of_class[:, 0].flatten(0, 1).clone()}

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Return the images of each class, then their mirror images."""
        images = parameters["images"].unflatten(0, (self.num_classes, -1))
        both = torch.cat([images, images.flip(-1)], 1).flatten(0, 1)
        return both if index is None else both[index]


@dataclass
class Pyramid(Decoder):
    """Stores every image as a sum of images of all sizes, each half of the next, down to one pixel (LGM, SFM).

    Coarse pixels are learned as fast as fine ones, which makes smooth images that serve other networks, too. It stores
    a third more numbers than pixels. Published are also a sigmoid, a matrix of colours, and levels that are added one
    by one; here all are learned from the start.
    """

    name: ClassVar[str] = "pyramid"

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return ``ipc``."""
        return ipc

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Shrink the images to one pixel by averaging; then what the levels so far leave, to the next size."""
        _, height, width = self.shape
        sizes = [(height, width)]
        while max(sizes[0]) > 1:
            sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
        levels: dict[str, Tensor] = {}
        for size in sizes:
            rest = images - self.decode(levels) if levels else images
            levels[f"level_{len(levels)}"] = interpolate(rest, size=size, mode="area")
        return levels

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Enlarge all levels bilinearly, and add them up."""
        levels = [parameters[name] for name in sorted(parameters)]  # in one order, whatever read them
        levels = levels if index is None else [level[index] for level in levels]
        return sum(interpolate(level, size=self.shape[1:], mode="bilinear") for level in levels)  # type: ignore[return-value]
