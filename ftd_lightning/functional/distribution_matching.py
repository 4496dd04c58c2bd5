"""Distances between features: of DM (Zhao and Bilen 2023) and of CAFE (Wang et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU)


def distribution_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """Measure the squared distance of two mean embeddings, those of one class (DM).

    ``|| mean_i real_i - mean_j synthetic_j ||^2``, summed over the features and not averaged: published learning rates
    of the images refer to the sum.

    Args:
        synthetic: embeddings (n, D).
        real: embeddings (m, D); m may differ from n. The caller detaches them where they need no gradient.

    Returns:
        A scalar, differentiable in both; classes add up.
    """
    return (real.mean(dim=0) - synthetic.mean(dim=0)).square().sum()


def _features(
    network: nn.Module, images: Tensor, weights: Mapping[str, Tensor] | None, kinds: tuple[type[nn.Module], ...]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Run a network and return activations and inputs of flattenings, of the kinds watched, and the embedding."""
    outputs: list[Tensor] = []
    flattened: list[Tensor] = []
    inputs: list[Tensor] = []

    def watch(module: nn.Module) -> RemovableHandle:
        if isinstance(module, ACTIVATIONS):
            return module.register_forward_hook(lambda _, args, out: outputs.append(out))
        seen = inputs if isinstance(module, nn.Linear) else flattened
        return module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    handles = [watch(module) for module in network.modules() if isinstance(module, (nn.Linear, *kinds))]
    try:
        # Without weights the network's own are used. Buffers are copies, so that running statistics do not change.
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        functional_call(network, {**buffers, **(weights or {})}, (images,))
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        raise InputError(
            f"{type(network).__name__} runs no nn.Linear, but the embedding is the input of the last one: add one"
        )
    return outputs, flattened or inputs, inputs[-1].flatten(1)


def embed(network: nn.Module, images: Tensor, *, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the input of a network's last linear layer: its embedding of the images.

    Convention: "last" is the ``nn.Linear`` that runs last, wherever it is defined in the network. The network is taken
    in the mode it is in; it and its running statistics do not change.

    Args:
        network: any module from (N, C, H, W) to logits (N, K) that ends in an ``nn.Linear``.
        images: (N, C, H, W).
        weights: parameters by name to use instead of the network's own, as ``torch.func.functional_call`` takes them.

    Returns:
        (N, D), differentiable in images and weights; D is 2048 for the ConvNet of depth 3 at 32 px.

    Raises:
        InputError: for a network that runs no ``nn.Linear``. Hooks do not reach into a compiled network: pass the
            original.
    """
    return _features(network, images, weights, ())[2]


def feature_levels(network: nn.Module, images: Tensor, *, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """Return the features of all depths that CAFE aligns (Wang et al., CVPR 2022).

    For a ConvNet of depth L: f_1 .. f_L, the activation of each block before its pooling; f_{L+1}, the output of the
    last pooling; and f_{L+2}, the same numbers flattened: the embedding. CAFE aligns both, which doubles the weight of
    the last level.

    Convention: levels are outputs of modules among ``ACTIVATIONS`` in the order in which they run (activations written
    as functions, as after the shortcuts of ResNet18 here, are not levels), then the input of the last ``nn.Flatten``
    (without one: of the last ``nn.Linear``), then the embedding.

    Arguments, mode, statistics and errors are those of :func:`embed`.

    Returns:
        L + 2 tensors (N, ...), differentiable in images and weights.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
        >>> [tuple(f.shape) for f in feature_levels(net, torch.ones(5, 1, 6, 6))]
        [(5, 3, 4, 4), (5, 3, 2, 2), (5, 12)]
    """
    levels, flattened, embedding = _features(network, images, weights, (*ACTIVATIONS, nn.Flatten))
    return [*levels, flattened[-1], embedding]


def class_means(features: Tensor, *, counts: Sequence[int]) -> Tensor:
    """Average features (N, ...), grouped by class, in groups of ``counts``, each at least 1: (C, ...)."""
    return torch.stack([part.mean(dim=0) for part in features.split(list(counts))])


def level_weights(levels: int) -> list[float]:
    """Return CAFE's weights of the levels: 1 for the last three, 0.1 for those before.

    Convention: the released script supports depth 3 (five levels) only; the weights of other depths are our extension.
    """
    return [0.1] * (levels - 3) + [1.0] * min(levels, 3)


def alignment_loss(synthetic: Sequence[Tensor], real: Sequence[Tensor], *, weights: Sequence[float]) -> Tensor:
    """Sum the squared distances of the class means over levels, classes and features.

    Args:
        synthetic: the class means of each level, (C, ...).
        real: the same of real images; the caller detaches them where they need no gradient.
        weights: w_l, one per level; see :func:`level_weights`.

    Returns:
        A scalar, differentiable in both.
    """
    terms = [w * (r - s).square().sum() for w, s, r in zip(weights, synthetic, real, strict=True)]
    return torch.stack(terms).sum()


def discrimination_loss(real: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Classify real features by their inner products with the synthetic class centres.

    ``sum_i CE((<real_i, centre_c>)_c, y_i)``: a sum over the real images, so its size grows with their number. CAFE
    weights it by 0.01; the caller does that.

    Args:
        real: embeddings of real images, (N, D); the caller detaches them where they need no gradient.
        labels: their classes, (N,) int64.
        centres: mean embeddings of the synthetic images of each class, (C, D).

    Returns:
        A scalar, differentiable in ``real`` and ``centres``.
    """
    return cross_entropy(real @ centres.T, labels, reduction="sum")
