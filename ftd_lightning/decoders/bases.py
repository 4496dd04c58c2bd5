"""Decoders of linear combinations: shared bases (RTP) and frequencies (FreD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import interpolate

from ftd_lightning.bounds import check_bounds
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.sizes import sides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftd_lightning.contracts import ImageShape


@dataclass
class Bases(Decoder):
    """Makes every image of all classes as a combination of the same bases (RTP, Deng and Russakovsky, NeurIPS 2022).

    ``image_i = enlarge(sum_b coefficients[i, b] * bases[b])``, bilinearly. There are as many images as the numbers of
    ipc plain ones allow: for CIFAR-10, ipc 1 and 16 bases of half size, 115 of each class.

    It begins with the best approximation of real images, their singular vectors; ``init="noise"`` begins with that of
    noise. The published start is smaller noise in both factors. Bases beyond the number of images begin as noise.

    Args:
        bases: number of bases.
        downscale: sides of the images over sides of the bases.
    """

    bases: int = 16
    downscale: int = 2

    name: ClassVar[str] = "bases"

    def __post_init__(self) -> None:
        check_bounds(Bases, vars(self))

    def _small(self, height: int, width: int) -> tuple[int, int]:
        if height % self.downscale or width % self.downscale:
            raise InputError(f"decoder: downscale={self.downscale} does not divide {height} x {width} px")
        return height // self.downscale, width // self.downscale

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return how many images have coefficients in what the bases leave."""
        height, width = sides(shape.image_size)
        whole = ipc * shape.num_classes * shape.in_channels * height * width
        left = whole - self.bases * shape.in_channels * math.prod(self._small(height, width))
        return self.at_least_one(left / (shape.num_classes * self.bases), "lower bases, or raise downscale or ipc")

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Approximate shrunk images by their first singular vectors, the values shared evenly by both factors."""
        small = interpolate(images, size=self._small(*self.shape[1:]), mode="area").flatten(1)
        left, values, right = torch.linalg.svd(small, full_matrices=False)
        rank, root = min(self.bases, len(values)), values.sqrt()
        # Bases without an image get a gradient through their coefficients, which are 0, only if they are not 0 too.
        bases = torch.randn(self.bases, small.shape[1], generator=make_generator(0, "bases")).to(small) * small.std()
        coefficients = small.new_zeros(len(small), self.bases)
        coefficients[:, :rank], bases[:rank] = (left * root)[:, :rank], (root[:, None] * right)[:rank]
        return {"coefficients": coefficients, "bases": bases}

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Combine the bases and enlarge."""
        coefficients = parameters["coefficients"] if index is None else parameters["coefficients"][index]
        small = (coefficients @ parameters["bases"]).unflatten(1, (self.shape[0], *self._small(*self.shape[1:])))
        return interpolate(small, size=self.shape[1:], mode="bilinear")


def cosine_basis(length: int) -> Tensor:
    """Return the orthonormal DCT-II as a matrix, (length, length) float64: row k has frequency k.

    Example:
        >>> torch.allclose(cosine_basis(4) @ cosine_basis(4).T, torch.eye(4, dtype=torch.float64))
        True
    """
    places = torch.arange(length, dtype=torch.float64)
    basis = torch.cos(math.pi / length * places[:, None] * (places + 0.5)) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


@dataclass
class Frequencies(Decoder):
    """Stores some coefficients of each image's cosine transform (FreD, Shin et al., NeurIPS 2023).

    Every channel of all images of a class has coefficients at the same positions, which never change. Of the channels'
    mean, these have the largest variance over the images that it begins with; of a single image, the largest squares.

    The transform is orthonormal, unlike the published one: published learning rates are to be divided by ``4 H W``,
    1e8 at 32 px is 2.4e4.

    Args:
        kept: coefficients of each channel; ``H * W // kept`` images take the numbers of one.
    """

    kept: int = 64

    name: ClassVar[str] = "frequencies"

    def __post_init__(self) -> None:
        check_bounds(Frequencies, vars(self))

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return ``ipc * H * W // kept``."""
        height, width = sides(shape.image_size)
        if self.kept > height * width:
            raise InputError(f"decoder: kept={self.kept} is more than the {height * width} frequencies of an image")
        return ipc * height * width // self.kept

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Transform the images and choose the positions of each class, (K, kept) int16 or int32."""
        rows, columns = (cosine_basis(side).to(images) for side in self.shape[1:])
        found = (rows @ images @ columns.T).flatten(2).unflatten(0, (self.num_classes, -1))  # (K, n, C, H * W)
        means = found.mean(2)  # (K, n, H * W)
        varies = means.var(1, correction=0) if means.shape[1] > 1 else means.square().squeeze(1)
        positions = varies.topk(self.kept).indices.sort().values
        kept = found.gather(3, positions[:, None, None].expand(-1, *found.shape[1:3], -1))
        few = torch.int16 if found.shape[3] <= torch.iinfo(torch.int16).max else torch.int32
        return {"coefficients": kept.flatten(0, 1), "positions": positions.to(few)}

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Transform back; coefficients elsewhere are 0."""
        kept, (channels, height, width) = parameters["coefficients"], self.shape
        classes = torch.arange(len(kept), device=kept.device) // (len(kept) // self.num_classes)
        if index is not None:
            kept, classes = kept[index], classes[index]
        places = parameters["positions"].long()[classes][:, None].expand(-1, channels, -1)
        whole = kept.new_zeros(len(kept), channels, height * width).scatter(2, places, kept)
        rows, columns = (cosine_basis(side).to(kept) for side in (height, width))
        return rows.T @ whole.unflatten(2, (height, width)) @ columns
