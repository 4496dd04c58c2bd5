"""From pictures to the images that networks see, and back: standardisation or ZCA whitening.

Convention: pictures are float32 in [0, 1], (N, C, H, W); images lie around 0 and have no fixed range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from ftd_lightning.contracts import ImageTransform as ImageTransform  # noqa: TC001
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, write_tensors
from ftd_lightning.files.schema import check_tensor, is_number, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


@dataclass
class Standardization:
    """Subtract a mean and divide by a standard deviation, per channel.

    Args:
        mean: C values, of pictures in [0, 1].
        std: C values above 0.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        self.mean, self.std = list(self.mean), list(self.std)

    def _columns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def apply(self, pictures: Tensor) -> Tensor:
        """``(x - mean) / std``."""
        mean, std = self._columns(pictures)
        return (pictures - mean) / std

    def invert(self, images: Tensor) -> Tensor:
        """``x * std + mean``."""
        mean, std = self._columns(images)
        return images * std + mean

    def describe(self) -> dict[str, Any]:
        """Return the constants."""
        return {"kind": "standardization", "mean": self.mean, "std": self.std}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the description has all constants."""
        return {}


class Whitening:
    """ZCA whitening, fitted by kornia: ``(x - mean) W`` of flattened pictures, and its inverse.

    Args:
        mean: (1, D) with D = C * H * W, of the pictures that it was fitted on.
        inverse: (D, D), the inverse of W.
        eps: was added to the eigenvalues of the covariance.
        fitted_on: fingerprint of those pictures.
        matrix: W; None computes it from the inverse, in float64, when it is first needed.
    """

    def __init__(
        self, mean: Tensor, inverse: Tensor, *, eps: float, fitted_on: str, matrix: Tensor | None = None
    ) -> None:
        self.mean = mean
        self.inverse = inverse
        self.eps = eps
        self.fitted_on = fitted_on
        if matrix is not None:
            self.matrix = matrix

    @classmethod
    def fit(cls, pictures: Tensor, *, eps: float = 0.1, fitted_on: str | None = None) -> Whitening:
        """Fit on pictures (N, C, H, W) in [0, 1], of which ``fitted_on`` is the fingerprint, if it is known already."""
        from kornia.enhance import ZCAWhitening  # takes half a second to import, which few runs need

        zca = ZCAWhitening(eps=eps, compute_inv=True).fit(pictures)
        name = fitted_on or fingerprint(pictures)
        return cls(zca.mean_vector, zca.transform_inv, eps=eps, fitted_on=name, matrix=zca.transform_matrix)

    @cached_property
    def matrix(self) -> Tensor:
        """W, (D, D) float32."""
        return torch.linalg.inv(self.inverse.double()).float()  # seconds, at D = 3072

    def apply(self, pictures: Tensor) -> Tensor:
        """``(x - mean) W``."""
        rows = pictures.flatten(1) - self.mean.to(pictures)
        return (rows @ self.matrix.to(pictures)).view_as(pictures)

    def invert(self, images: Tensor) -> Tensor:
        """``y W^-1 + mean``."""
        return (images.flatten(1) @ self.inverse.to(images) + self.mean.to(images)).view_as(images)

    def describe(self) -> dict[str, Any]:
        """Return eps and the fingerprint of the pictures that it was fitted on, from which the matrices follow."""
        return {"kind": "zca", "eps": self.eps, "fitted_on": self.fitted_on}

    def tensors(self) -> dict[str, Tensor]:
        """Return "mean" (1, D) and "inverse" (D, D), from which W follows: one matrix travels instead of two."""
        return {"mean": self.mean, "inverse": self.inverse}

    def save(self, path: Path) -> None:
        """Write mean and both matrices to a file."""
        tensors = {**self.tensors(), "matrix": self.matrix}
        write_tensors(path, tensors, kind="whitening", metadata={"transform": self.describe()})

    @staticmethod
    def load(path: Path) -> Whitening:
        """Read the file that :meth:`save` wrote."""
        file = TensorFile(path, kind="whitening")
        return cast("Whitening", load_transform(file.metadata.get("transform"), file.with_prefix(""), where=path))


def _check_standardization(description: Mapping[str, Any], where: object, shape: Sequence[int] | None) -> None:
    means: Any = description.get("mean")
    deviations: Any = description.get("std")
    for key, values in (("mean", means), ("std", deviations)):
        if not isinstance(values, list) or not values or not all(map(is_number, values)):
            refuse(where, f"transform.{key}", f"is {values!r:.60}, finite numbers, one per channel, are needed")
    if min(deviations) <= 0:
        refuse(where, "transform.std", f"has a {min(deviations):g}, standard deviations are above 0")
    if len(deviations) != len(means):
        refuse(where, "transform", "has another number of means than of standard deviations")
    if shape is not None and len(means) not in (1, shape[0]):
        refuse(where, "transform", f"has {len(means)} channels, the images have {shape[0]}")


def _check_whitening(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], where: object, shape: Sequence[int] | None
) -> None:
    if not is_number(description.get("eps"), 0) or not isinstance(description.get("fitted_on"), str):
        refuse(where, "transform", "needs eps, a number of at least 0, and fitted_on; make it again")
    for name in ("mean", "inverse"):
        if name not in tensors:
            refuse(where, f"transform.{name}", "is missing; make it again")
    values = len(tensors["inverse"]) if tensors["inverse"].ndim else 0
    for name, rows in (("mean", 1), ("inverse", values), ("matrix", values)):
        if name in tensors:
            check_tensor(tensors[name], f"transform.{name}", where, (rows, values))
    if shape is not None and values != math.prod(shape):
        refuse(where, "transform", f"is of {values} values per image, the images have {math.prod(shape)}")


def check_transform(
    description: Any, tensors: Mapping[str, Tensor], where: object, shape: Sequence[int] | None = None
) -> None:
    """Refuse the description and tensors of a transform that cannot be built, or of another image shape (C, H, W)."""
    if not isinstance(description, dict):
        refuse(where, "transform", f"is {description!r:.60}, a mapping is needed; make it again")
    if description.get("kind") == "standardization":
        _check_standardization(description, where, shape)
    elif description.get("kind") == "zca":
        _check_whitening(description, tensors, where, shape)


def load_transform(description: Any, tensors: Mapping[str, Tensor], *, where: object = "this file") -> ImageTransform:
    """Build a transform from its ``describe()`` and ``tensors()``; ``where`` names the file in an InputError."""
    check_transform(description, tensors, where)
    kind = description.get("kind")
    if kind == "standardization":
        return Standardization(description["mean"], description["std"])
    if kind == "zca":
        eps, fitted_on, matrix = description["eps"], description["fitted_on"], tensors.get("matrix")
        return Whitening(tensors["mean"], tensors["inverse"], eps=eps, fitted_on=fitted_on, matrix=matrix)
    raise InputError(f"{where}: has the unknown image transform {kind!r:.60}: it needs a newer ftd_lightning")
