"""The decoder that is a network (GTN)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import one_hot

from ftd_lightning.bounds import check_bounds
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import make_generator, to_device
from ftd_lightning.sizes import sides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftd_lightning.contracts import ImageShape

LARGEST = 2.0  # pixel, as published: images are normalised, not whitened


@dataclass
class Generator(Decoder):
    """Makes every image from noise and its class by a small network (GTN, Such et al., ICML 2020).

    Two linear layers make ``2 * width`` maps of a quarter of the sides, two convolutions after enlargements make the
    image, which ``2 * tanh`` bounds. ``width=64, noise=128`` are the published sizes. BatchNorm normalises over all
    images of the set, where the published one normalises over each mini-batch of the student, so that an image does not
    depend on which others are decoded. Left out: weight normalisation.

    It compresses nothing: ``ipc`` does not bound what is stored, which :meth:`numbers` counts, and is more than plain
    images of small sizes take. It begins with random weights, not with real images, of which it takes only the shape.

    Args:
        per_class: images of each class.
        noise: numbers of noise for each image.
        width: maps before the last convolution.
        learn_noise: learn the noise too, and store it, so that each image has its place among the mini-batches (a
            curriculum, with ``schedule="fixed"``); else it comes from the seed.
        seed: of weights and noise at the start.
    """

    per_class: int = 60
    noise: int = 64
    width: int = 32
    learn_noise: bool = True
    seed: int = 0

    name: ClassVar[str] = "generator"
    begins_with_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bounds(Generator, vars(self))

    def images_per_class(self, ipc: int, shape: ImageShape) -> int:
        """Return ``per_class``, whatever ``ipc`` is."""
        for side in sides(shape.image_size):
            if side % 4:
                raise InputError(f"decoder: Generator makes images of multiples of 4 px, not of {side}")
        return self.per_class

    def restore(self, shape: tuple[int, int, int], labels: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Take the place of a fitted decoder, and build the network's layers, without weights."""
        super().restore(shape, labels, parameters)
        channels, height, width = shape
        maps, small = 2 * self.width, (height // 4, width // 4)

        def normalised(of: type[nn.BatchNorm1d | nn.BatchNorm2d], features: int) -> list[nn.Module]:
            return [of(features, track_running_stats=False), nn.LeakyReLU(0.1)]

        def enlarged(before: int, after: int, *, bias: bool) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, 1, 1, bias=bias, padding_mode="reflect")]

        with torch.device("meta"):
            self._network = nn.Sequential(
                nn.Linear(self.noise + self.num_classes, 16 * self.width, bias=False),
                *normalised(nn.BatchNorm1d, 16 * self.width),
                nn.Linear(16 * self.width, maps * small[0] * small[1], bias=False),
                *normalised(nn.BatchNorm1d, maps * small[0] * small[1]),
                nn.Unflatten(1, (maps, *small)),
                *enlarged(maps, self.width, bias=False),
                *normalised(nn.BatchNorm2d, self.width),
                *enlarged(self.width, channels, bias=True),
                nn.Tanh(),
            )

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Draw the weights as Kaiming et al., and the noise from a standard normal."""
        generator, drawn = make_generator(self.seed, "generator"), {}
        for name, value in self._network.named_parameters():
            weights = torch.full(value.shape, float(name.endswith("weight")), dtype=images.dtype)
            if value.ndim > 1:
                nn.init.kaiming_normal_(weights, 0.1, generator=generator)
            drawn[name.replace(".", "_")] = weights
        return drawn | ({"noise": self._drawn_noise(images)} if self.learn_noise else {})

    def _drawn_noise(self, like: Tensor) -> Tensor:
        generator = make_generator(self.seed, "noise")
        return to_device(torch.randn(len(self._labels), self.noise, generator=generator), like.device, like.dtype)

    def decode(self, parameters: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Run the network on all images, because these are normalised together; return those of the index."""
        weights = {name: parameters[name.replace(".", "_")] for name, _ in self._network.named_parameters()}
        like = weights["0.weight"]
        noise = parameters["noise"] if self.learn_noise else self._drawn_noise(like)
        classes = one_hot(to_device(self._labels, like.device), self.num_classes).to(like.dtype)
        images: Tensor = LARGEST * functional_call(self._network, weights, (torch.cat([noise, classes], 1),))
        return images if index is None else images[index]
