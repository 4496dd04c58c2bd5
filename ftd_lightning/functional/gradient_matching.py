"""Gradients of networks and their distance (DC: Zhao et al., ICLR 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """List the batch normalisation layers of a network."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


EPSILON = 1e-6  # DC's; added to the denominator, so that rows without a gradient contribute 1 instead of nan


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over weight tensors and their rows of one minus the cosine (the layer-wise distance of DC).

    ``D = sum_tensors sum_rows (1 - <a, b> / (||a|| ||b|| + 1e-6))``, neither averaged nor weighted by layer.

    Convention: a row is a slice along the first axis, the weights of one output. Tensors of one axis (biases, weights
    of other norms than layer norm) contribute nothing. With R rows D lies in [0, 2 R]; R is 394 for the ConvNet of
    depth 3 with 10 classes.

    Args:
        synthetic: one gradient per weight tensor, as :func:`loss_gradients` returns them.
        real: the same tensors' gradients on real images; the caller detaches them where they need no gradient.

    Returns:
        A scalar, differentiable in both.

    Example:
        >>> gradient_distance([torch.tensor([[1.0, 0.0], [0.0, 2.0]])], [torch.tensor([[0.0, 1.0], [0.0, -1.0]])])
        tensor(3.0000)
    """
    distance = synthetic[0].new_zeros(())
    for synthetic_gradient, real_gradient in zip(synthetic, real, strict=True):
        if synthetic_gradient.ndim >= 2:
            a, b = synthetic_gradient.flatten(1), real_gradient.flatten(1)
            norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
            distance = distance + (1 - (a * b).sum(dim=1) / (norms + EPSILON)).sum()
    return distance


def loss_gradients(network: nn.Module, images: Tensor, labels: Tensor, *, keep_graph: bool = False) -> list[Tensor]:
    """Differentiate the mean cross entropy of a batch in all of a network's weights.

    Convention: the network is taken at its own weights and in the mode it is in; neither it nor its running statistics
    change, and no ``.grad`` is written. Frozen weights are differentiated like others.

    Args:
        network: from (N, C, H, W) to logits (N, K).
        images: (N, C, H, W).
        labels: (N,) int64 classes, or (N, K) probabilities.
        keep_graph: make the result differentiable in ``images`` (the synthetic side); False returns detached tensors.

    Returns:
        One tensor per parameter, in shapes and order of ``network.parameters()``; zeros for parameters that the loss
        does not depend on.
    """
    with torch.enable_grad():
        weights = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
        # BatchNorm updates the buffers that it is passed: copies, so that the caller's statistics do not change.
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        loss = cross_entropy(functional_call(network, {**weights, **buffers}, (images,)), labels)
        gradients = torch.autograd.grad(
            loss, list(weights.values()), create_graph=keep_graph, allow_unused=True, materialize_grads=True
        )
    return list(gradients)
