"""What images go through before a network sees them, and the way back: standardisation or ZCA whitening.

Convention: pictures are float32 in [0, 1], (N, C, H, W); transformed images lie around 0 and have no fixed range.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ftd_lightning.data.files import TensorFile, fingerprint, write_tensors
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kornia.enhance import ZCAWhitening
    from torch import Tensor


class ImageTransform(Protocol):
    """An invertible map of images that a file can carry."""

    def apply(self, pictures: Tensor) -> Tensor:
        """Map pictures to what networks see."""

    def invert(self, images: Tensor) -> Tensor:
        """Map what networks see to pictures; values may lie outside [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """Say what it is and was made from; equal descriptions mean the same map."""

    def tensors(self) -> dict[str, Tensor]:
        """Give what :func:`load_transform` needs to build it again."""


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
        """Nothing: the description says it all."""
        return {}


def _zca(eps: float) -> ZCAWhitening:
    from kornia.enhance import ZCAWhitening  # not at the top: half a second that only whitened images are worth

    return ZCAWhitening(eps=eps, compute_inv=True)


class Whitening:
    """ZCA whitening by kornia, with its inverse.

    Args:
        zca: fitted, with its inverse computed.
        fitted_on: fingerprint of the images that it was fitted on.
    """

    def __init__(self, zca: ZCAWhitening, *, fitted_on: str) -> None:
        self.zca = zca
        self.fitted_on = fitted_on

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
        zca = _zca(eps).fit(pictures)
        return cls(zca, fitted_on=fitted_on or fingerprint(pictures))

    @staticmethod
    def estimate_seconds(values: int, *, probe: int = 768) -> float:
        """Guess how long a fit takes on this machine: the decomposition's cost grows with the cube of the values.

        Args:
            values: C * H * W of an image.
            probe: size of a decomposition that is timed for it; smaller images take under a second. Much smaller probes
                tell nothing: on a busy machine their time is that of waking threads.

        Example:
            >>> Whitening.estimate_seconds(64)
            0.0
        """
        if values <= probe:
            return 0.0
        square = torch.randn(probe, probe, generator=torch.Generator().manual_seed(0))
        times = []
        for _ in range(2):  # the first call loads libraries
            began = time.perf_counter()
            torch.linalg.svd(square @ square.T)
            times.append(time.perf_counter() - began)
        return min(times) * (values / probe) ** 3

    def apply(self, pictures: Tensor) -> Tensor:
        """Whiten."""
        whitened: Tensor = self.zca.to(pictures.device)(pictures)
        return whitened

    def invert(self, images: Tensor) -> Tensor:
        """Undo the whitening."""
        pictures: Tensor = self.zca.to(images.device).inverse_transform(images)
        return pictures

    def describe(self) -> dict[str, Any]:
        """Name eps and the images that it was fitted on; the matrices follow from them."""
        return {"kind": "zca", "eps": self.zca.eps, "fitted_on": self.fitted_on}

    def tensors(self) -> dict[str, Tensor]:
        """Give mean (1, D) and inverse (D, D); the whitening matrix is the inverse of that, so one of them travels."""
        return {"mean": self.zca.mean_vector, "inverse": self.zca.transform_inv}

    def save(self, path: Path) -> None:
        """Write mean and both matrices to a file."""
        tensors = {**self.tensors(), "matrix": self.zca.transform_matrix}
        write_tensors(path, tensors, kind="whitening", metadata={"transform": self.describe()})

    @classmethod
    def load(cls, path: Path) -> Whitening:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: for a file that is missing, broken, or something else.
        """
        file = TensorFile(path, kind="whitening")
        return cls.build(file.metadata["transform"], {name: file[name] for name in ("mean", "inverse", "matrix")})

    @classmethod
    def build(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Whitening:
        """Build from a description and tensors; without "matrix", it is computed from "inverse" in float64."""
        zca = _zca(description["eps"])
        matrix = tensors.get("matrix")
        if matrix is None:
            matrix = torch.linalg.inv(tensors["inverse"].double()).float()
        zca.load_state_dict(
            {"mean_vector": tensors["mean"], "transform_matrix": matrix, "transform_inv": tensors["inverse"]}
        )
        return cls(zca, fitted_on=description["fitted_on"])


def load_transform(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ImageTransform:
    """Build a transform again from what ``describe()`` and ``tensors()`` gave.

    Raises:
        InputError: for a kind that is not there.

    Example:
        >>> t = Standardization([0.5], [0.25])
        >>> load_transform(t.describe(), t.tensors()).describe() == t.describe()
        True
    """
    kind = description.get("kind")
    if kind == "standardization":
        return Standardization(description["mean"], description["std"])
    if kind == "zca":
        return Whitening.build(description, tensors)
    raise InputError(f"unknown image transform {kind!r}: this file needs a newer ftd_lightning")
