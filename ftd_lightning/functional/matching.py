"""The matching loss (Eq. 4-5): how far the student lands from where the teacher went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftd_lightning.functional.pruning import pruned_distance
from ftd_lightning.functional.robust import compared_end
from ftd_lightning.functional.unroll import unroll as unroll_student

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ftd_lightning.functional.compiling import Compile
    from ftd_lightning.functional.robust import Residual
    from ftd_lightning.functional.unroll import Augment, Unroll


def normalized_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Divide the student's squared distance from the target by the teacher's own squared distance.

    ``||theta_n - theta*_{t+m}||^2 / ||theta*_t - theta*_{t+m}||^2``, summed over all parameters.

    Convention: 1 is a student that did not move, 0 one that arrived. Equal ``start`` and ``target`` give inf or nan.

    Args:
        student: theta_n, (P,).
        start: theta*_t, (P,).
        target: theta*_{t+m}, (P,).

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> normalized_distance(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([2.0, 0.0]))
        tensor(0.2500)
    """
    return (student - target).square().sum() / (start - target).square().sum()


def trajectory_matching_loss(
    network: nn.Module,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    *,
    batches: Sequence[Tensor],
    augment: Augment | None = None,
    seed: int = 0,
    unroll: Unroll = "adjoint",
    noise: Tensor | None = None,
    residual: Residual = "displacement",
    keep: Callable[[Tensor, Tensor], Tensor] | None = None,
    compile: Compile = "auto",  # noqa: A002
    cuda_graphs: bool = False,
) -> Tensor:
    """Unroll a student from the teacher's weights on the synthetic set and measure where it lands (Eq. 4-5).

    Args:
        network: the architecture; its own weights and buffers are neither used nor changed.
        start: theta*_t, (P,), in the order of ``network.parameters()``.
        target: theta*_{t+m}, (P,).
        images: (N, C, H, W), normalised or whitened as the teachers saw theirs.
        labels: (N,) int64 classes, or (N, K) probabilities.
        step_size: the inner learning rate, a scalar tensor > 0.
        batches: one index tensor into ``images`` per inner step; n is their number. See ``chunked_permutations``.
        augment: ``augment(batch, generator) -> batch``, differentiable and random only through the generator.
        seed: decides what the generators draw; inner step i always gets the same.
        unroll: "adjoint" (exact gradient, memory of one step) or "graph" (the whole graph kept).
        noise: eps of Eq. 9 (robust learning), (P,): the student starts at ``start + noise``, and the distance is
            divided by the teacher's own all the same. See ``start_noise``.
        residual: with noise, whether the student's displacement or its end point is compared; see ``compared_end``.
        keep: ``keep(theta_n, theta*_{t+m}) -> (P,) bool``, the parameters that the distance is taken over: a
            ``keep_mask`` with its rule chosen (parameter pruning); None takes all.
        compile: whether "adjoint" compiles its steps: True, False, or "auto": on a GPU only; see ``unroll``.
        cuda_graphs: record CUDA graphs of compiled steps, on a GPU.

    Returns:
        A scalar, differentiable in ``images`` and ``step_size`` (and in ``start`` and soft ``labels``).

    Raises:
        ValueError: for weights of another network, labels that do not fit the images, a network with active dropout, or
            an unknown unrolling, residual or setting of ``compile``.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> start, target = torch.zeros(10), torch.ones(10)
        >>> images = torch.randn(2, 1, 2, 2, requires_grad=True)
        >>> steps = [torch.tensor([0, 1])] * 3
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> loss = trajectory_matching_loss(net, start, target, images, torch.tensor([0, 1]), lr, batches=steps)
        >>> loss.backward(); images.grad.shape
        torch.Size([2, 1, 2, 2])
    """
    if target.shape != start.shape:
        raise ValueError(f"the target has shape {tuple(target.shape)}, the start {tuple(start.shape)}")
    begin = start if noise is None else start + noise
    student = unroll_student(
        network,
        begin,
        images,
        labels,
        step_size,
        batches=batches,
        augment=augment,
        seed=seed,
        method=unroll,
        compile=compile,
        cuda_graphs=cuda_graphs,
    )
    if noise is not None:
        student = compared_end(student, noise, residual=residual)
    if keep is None:
        return normalized_distance(student, start, target)
    return pruned_distance(student, start, target, keep(student.detach(), target))
