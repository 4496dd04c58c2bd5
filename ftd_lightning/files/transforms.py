"""From pictures to the images that networks see, and back: standardisation or ZCA whitening.

Convention: pictures are float32 in [0, 1], (N, C, H, W); images lie around 0 and have no fixed range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.contracts import ImageTransform as ImageTransform  # noqa: TC001
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, write_tensors
from ftd_lightning.files.schema import check_transform, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


class Standardization:
    """Subtract a mean and divide by a standard deviation, per channel.

    Args:
        mean: C values, of pictures in [0, 1].
        std: C values, likewise.

    Example:
        >>> t = Standardization([0.5], [0.25])
        >>> float(t.apply(torch.ones(1, 1, 1, 1))), float(t.invert(t.apply(torch.ones(1, 1, 1, 1))))
        (2.0, 1.0)
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)

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
        """Name the constants."""
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
        self._matrix = matrix

    @classmethod
    def fit(cls, pictures: Tensor, *, eps: float = 0.1, fitted_on: str | None = None) -> Whitening:
        """Fit on pictures (N, C, H, W) in [0, 1]; eps is added to the eigenvalues of the covariance.

        ``fitted_on`` is the pictures' fingerprint, where the caller knows it already.

        Example:
            >>> x = torch.rand(50, 1, 2, 2)
            >>> w = Whitening.fit(x)
            >>> bool(torch.allclose(w.invert(w.apply(x)), x, atol=1e-5))
            True
        """
        from kornia.enhance import ZCAWhitening  # takes half a second to import, which few runs need

        zca = ZCAWhitening(eps=eps, compute_inv=True).fit(pictures)
        return cls(
            zca.mean_vector,
            zca.transform_inv,
            eps=eps,
            fitted_on=fitted_on or fingerprint(pictures),
            matrix=zca.transform_matrix,
        )

    @property
    def matrix(self) -> Tensor:
        """W, (D, D) float32."""
        if self._matrix is None:  # seconds, at D = 3072
            self._matrix = torch.linalg.inv(self.inverse.double()).float()
        return self._matrix

    def apply(self, pictures: Tensor) -> Tensor:
        """``(x - mean) W``."""
        rows = pictures.flatten(1) - self.mean.to(pictures)
        return (rows @ self.matrix.to(pictures)).view_as(pictures)

    def invert(self, images: Tensor) -> Tensor:
        """``y W^-1 + mean``."""
        return (images.flatten(1) @ self.inverse.to(images) + self.mean.to(images)).view_as(images)

    def describe(self) -> dict[str, Any]:
        """Name eps and the pictures that it was fitted on; the matrices follow from them."""
        return {"kind": "zca", "eps": self.eps, "fitted_on": self.fitted_on}

    def tensors(self) -> dict[str, Tensor]:
        """Return "mean" (1, D) and "inverse" (D, D), from which W follows: one matrix travels instead of two."""
        return {"mean": self.mean, "inverse": self.inverse}

    def save(self, path: Path) -> None:
        """Write mean and both matrices to a file."""
        tensors = {**self.tensors(), "matrix": self.matrix}
        write_tensors(path, tensors, kind="whitening", metadata={"transform": self.describe()})

    @classmethod
    def load(cls, path: Path) -> Whitening:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: for a file that is missing, broken, or something else.
        """
        file = TensorFile(path, kind="whitening")
        tensors = {name: file[name] for name in ("mean", "inverse", "matrix")}
        check_transform(file.metadata.get("transform"), tensors, path)
        if file.metadata["transform"].get("kind") != "zca":
            refuse(path, "transform.kind", "is not zca; make it again")
        return cls.build(file.metadata["transform"], tensors)

    @classmethod
    def build(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Whitening:
        """Build from a description and tensors; "matrix" may be missing."""
        return cls(
            tensors["mean"],
            tensors["inverse"],
            eps=description["eps"],
            fitted_on=description["fitted_on"],
            matrix=tensors.get("matrix"),
        )


def load_transform(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: object = "this file"
) -> ImageTransform:
    """Build a transform again from what its ``describe()`` and ``tensors()`` returned.

    Args:
        description: of the transform.
        tensors: of the transform.
        where: names the file in messages.

    Raises:
        InputError: for an unknown kind, or constants that are missing or make no sense.

    Example:
        >>> t = Standardization([0.5], [0.25])
        >>> load_transform(t.describe(), t.tensors()).describe() == t.describe()
        True
    """
    check_transform(description, tensors, where)
    kind = description.get("kind")
    if kind == "standardization":
        return Standardization(description["mean"], description["std"])
    if kind == "zca":
        return Whitening.build(description, tensors)
    raise InputError(f"{where}: has the unknown image transform {kind!r:.60}: it needs a newer ftd_lightning")
