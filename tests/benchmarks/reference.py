"""What ours is compared with: the same mathematics as a straightforward script would do it, without this library.

A competent script: nothing is computed twice or copied for nothing, and metrics stay on the device until an epoch ends.
It takes the network and DSA of this library, so that both sides do the same arithmetic, and draws the same
augmentations at the same places: their costs differ from one operation to another. What it does not have is what is
measured: images held as one tensor on the device, the adjoint gradient, networks trained side by side, files read by
segments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

Batches = Iterable[tuple[Tensor, Tensor]]


def sample_loader(images: Tensor, labels: Tensor, *, batch_size: int) -> DataLoader:
    """A DataLoader over single samples, shuffled, with the default collation.

    Workers and pinned memory where there is a GPU to keep busy; on the CPU they would take cores from the network.
    """
    on_gpu = torch.cuda.is_available()
    workers = min(4, os.cpu_count() or 1) if on_gpu else 0
    return DataLoader(
        TensorDataset(images, labels),
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        num_workers=workers,
        pin_memory=on_gpu,
        persistent_workers=workers > 0,
    )


def gsam_epoch(
    network: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    rho: float,
    alpha: float,
    augment: Callable[[Tensor, int], Tensor],
) -> tuple[float, float]:
    """Train one epoch by GSAM (plain ball) in eager float32; give its mean loss and accuracy.

    ``augment(images, step)`` is called once a batch, for both passes.
    """
    parameters = list(network.parameters())
    device = parameters[0].device
    total, right, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for step, (images, labels) in enumerate(batches):
        labels = labels.to(device, non_blocking=True)
        images = augment(images.to(device, non_blocking=True), step)
        optimizer.zero_grad()
        logits = network(images)
        loss = cross_entropy(logits, labels)
        loss.backward()
        gradients = [p.grad for p in parameters]
        with torch.no_grad():
            norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            weights = [p.clone() for p in parameters]
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(rho * g / norm)
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        with torch.no_grad():
            dot = torch.stack([(g * p.grad).sum() for g, p in zip(gradients, parameters, strict=True)]).sum()
            along = dot / torch.stack([p.grad.square().sum() for p in parameters]).sum()
            for p, g, w in zip(parameters, gradients, weights, strict=True):
                p.copy_(w)
                p.grad -= alpha * (g - along * p.grad)
        optimizer.step()
        total += loss.detach() * len(labels)
        right += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
    return float(total) / seen, float(right) / seen


def matching_loss(
    network: nn.Module,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    *,
    batches: Sequence[Tensor],
    augment: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The matching loss with the graph of all inner steps kept for the backward run."""
    named = dict(network.named_parameters())
    sizes = [p.numel() for p in named.values()]
    weights = start.clone().requires_grad_()
    for step, index in enumerate(batches):
        x, y = augment(images[index], step), labels[index]
        views = {n: v.view_as(p) for (n, p), v in zip(named.items(), weights.split(sizes), strict=True)}
        loss = cross_entropy(functional_call(network, views, (x,)), y)
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights = weights - step_size * gradient
    return (weights - target).square().sum() / (start - target).square().sum()


def train_network(
    network: nn.Module,
    epoch_batches: Callable[[int], Batches],
    *,
    epochs: int,
    lr: float,
    augment: Callable[[Tensor, int, int], Tensor],
) -> None:
    """Train one network on a synthetic set by the protocol of this line: SGD, the step size x0.1 at half way."""
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    network.train()
    for epoch in range(epochs):
        if epoch == max(1, epochs // 2):
            optimizer.param_groups[0]["lr"] = 0.1 * lr
        for step, (images, labels) in enumerate(epoch_batches(epoch)):
            labels = labels.to(device, non_blocking=True)
            images = augment(images.to(device, non_blocking=True), epoch, step)
            optimizer.zero_grad()
            cross_entropy(network(images), labels).backward()
            optimizer.step()
