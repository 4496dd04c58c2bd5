"""Mean and standard deviation of the pixels of a data set."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1000  # pictures measured at a time: bounds the memory that it takes


def measure(pictures: Tensor) -> dict[str, list[float]]:
    """Measure mean and standard deviation of all pixels, per channel, on the scale [0, 1].

    A channel of one value gets the deviation 1, because images are divided by it.

    Args:
        pictures: (N, C, H, W), uint8 or float32 in [0, 1].

    Returns:
        "mean" and "std", C values each, rounded to 6 digits.

    Example:
        >>> measure(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
        {'mean': [0.5], 'std': [0.5]}
        >>> measure(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
        {'mean': [0.5], 'std': [0.5]}
    """
    mean, variance = _moments_of_bytes(pictures) if pictures.dtype == torch.uint8 else _moments(pictures)
    std = variance.sqrt()
    std[variance < 1e-20] = 1  # rounding leaves a little of the variance of a constant
    return {key: [round(value, 6) for value in found.tolist()] for key, found in (("mean", mean), ("std", std))}


def _moments_of_bytes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    # Counts of the 256 values: exact, whatever the order of the images.
    counts = torch.zeros(pictures.shape[1], 256, dtype=torch.float64)
    for chunk in pictures.split(CHUNK):
        for channel, values in enumerate(chunk.transpose(0, 1)):
            counts[channel] += values.flatten().bincount(minlength=256)
    values, shares = torch.arange(256, dtype=torch.float64) / 255, counts / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1)
    return mean, (shares * (values - mean.unsqueeze(1)).square()).sum(1)


def _moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    count = pictures.numel() // pictures.shape[1]
    mean = (
        sum((chunk.double().sum((0, 2, 3)) for chunk in pictures.split(CHUNK)), torch.zeros(pictures.shape[1])) / count
    )
    squares = ((chunk.double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for chunk in pictures.split(CHUNK))
    return mean, sum(squares, torch.zeros(pictures.shape[1])) / count
