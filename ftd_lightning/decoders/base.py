"""The base of decoders: what a set stores in place of its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftd_lightning.contracts import ImageShape


class Decoder(ABC):
    """Makes images out of stored parameters; distillation learns these in place of pixels.

    Subclasses are dataclasses whose fields are their options. They define ``images_per_class``, ``begin`` and
    ``decode``. Of the parameters, floating-point tensors are learned, integers (positions) stay as they are.

    Convention: images are (N, C, H, W) float32 as networks see them, of no fixed range, class by class in label order,
    N / K of each of K classes.

    Attributes:
        name: short name, appended to the name of the method ("ftd+bases").
        begins_with_images: it needs as many real images as it makes to begin with; else their shape is enough.
        shape: C, H and W of the images, after :meth:`fit`.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Grey(Decoder):  # one channel in place of three, so three images for one
        ...     name = "grey"
        ...
        ...     def images_per_class(self, ipc, shape):
        ...         return ipc * shape.in_channels
        ...
        ...     def begin(self, images):
        ...         return {"grey": images.mean(1, keepdim=True)}
        ...
        ...     def decode(self, parameters, index=None):
        ...         grey = parameters["grey"] if index is None else parameters["grey"][index]
        ...         return grey.expand(-1, *self.shape)
        >>> decoder = Grey()
        >>> decoder.fit(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> decoder.decode(decoder.parameters()).shape, decoder.numbers() == 2 * 3 * 8 * 8
        (torch.Size([6, 3, 8, 8]), True)
    """

    name: ClassVar[str]
    begins_with_images: ClassVar[bool] = True
    shape: tuple[int, int, int]

    @abstractmethod
    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return how many images of each class are decoded from the numbers of ``ipc`` plain ones.

        Raises:
            InputError: for a shape that cannot be decoded, or an ``ipc`` too small for one image.
        """

    @abstractmethod
    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Return parameters that decode to images close to these, (N, C, H, W); ``shape`` and ``labels()`` are set.

        Names have no dots, and differ from the methods of a dictionary.
        """

    @abstractmethod
    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Return the images, (N, C, H, W), or those of an index (n,) int64; pure, differentiable, deterministic.

        The parameters are named as :meth:`parameters` names them, on any device.
        """

    def fit(self, images: Tensor, labels: Tensor) -> None:
        """Start from images (N, C, H, W) of classes (N,), as many of each as ``images_per_class`` says."""
        _, channels, height, width = images.shape
        self.restore((channels, height, width), labels, {})
        self._parameters = self.begin(images)

    def restore(self, shape: tuple[int, int, int], labels: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Take the place of a fitted decoder, as a file or a checkpoint describes it."""
        self.shape, self._labels, self._parameters = shape, labels, dict(parameters)

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters to start from, by name."""
        return self._parameters

    def labels(self, index: Tensor | None = None) -> Tensor:
        """Return the classes of the images, (N,) int64, or of those of an index."""
        return self._labels if index is None else self._labels[index]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return int(self._labels[-1]) + 1

    def numbers(self) -> int:
        """Return how many learned numbers are stored; ipc plain images of each class are ipc * K * C * H * W."""
        return sum(value.numel() for value in self._parameters.values() if value.is_floating_point())

    def bytes(self) -> int:
        """Return how many bytes a file takes for them, positions included; a plain image takes 4 * C * H * W."""
        positions = [value for value in self._parameters.values() if not value.is_floating_point()]
        return 4 * self.numbers() + sum(value.numel() * value.element_size() for value in positions)

    def at_least_one(self, count: float, least: str) -> int:
        """Round a number of images per class down; refuse 0, and say the least that is needed."""
        if count < 1:
            raise InputError(
                f"decoder: the numbers of this ipc are too few for one {type(self).__name__} image: {least}"
            )
        return int(count)
