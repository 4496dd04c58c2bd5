"""The gradient of an unroll by its adjoint: the graph of one step at a time, whatever the number of steps.

Plain SGD, with ``g_i = grad_theta loss(theta_i, x_i)`` and ``theta_{i+1} = theta_i - lr_i * g_i``, going backwards from
``lam_n = dL/dtheta_n``::

    s         = <g_i(theta_i, x_i), lam_{i+1}>       the graph of one step, built and freed
    dL/dlr_i += -s
    dL/dx_i  += -lr_i * ds/dx_i
    lam_i     = lam_{i+1} - lr_i * ds/dtheta_i       a Hessian-vector product

Any other optimizer is a function ``(theta_{i+1}, state_{i+1}) = F(theta_i, g_i, state_i, lr_i)`` of vectors, whose own
derivatives are cheap. Its vector-Jacobian product with the adjoints of weights and state gives those of theta_i,
state_i and lr_i through F alone, and gamma, that of g_i. Then, with ``s = <g_i(theta_i, x_i), gamma>`` and gamma held
constant::

    dL/dx_i  += ds/dx_i
    lam_i    += ds/dtheta_i

The adjoint stores the weights at each inner step, and for other optimizers their state and the gradient too; memory of
activations is that of one step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftd_lightning.functional.student import Student, step_size_of

if TYPE_CHECKING:
    from ftd_lightning.functional.inner_optimizers import InnerOptimizer, State
    from ftd_lightning.functional.inner_step import Wanted


def _zeros(want: Wanted, *tensors: Tensor) -> list[Tensor | None]:
    return [torch.zeros_like(tensor) if wanted else None for tensor, wanted in zip(tensors, want, strict=True)]


class PlainAdjoint(torch.autograd.Function):
    """theta_n as a function of the weights after so many steps, images, labels and step size, for plain SGD."""

    @staticmethod
    def forward(
        ctx: Any, student: Student, done: int, start: Tensor, images: Tensor, labels: Tensor, lr: Tensor
    ) -> Tensor:
        """Run the steps and keep the weights before each."""
        weights, path = start.detach().clone(), []
        for step in range(done, len(student.batches)):
            path.append(weights)
            x, y = student.batch(step, images, labels)
            weights = student.step.forward(student.network, weights, x, y, step_size_of(lr, step).detach())
        ctx.student, ctx.done = student, done
        # Saved through autograd, so that a set changed in place before backward is an error, not a wrong gradient.
        ctx.save_for_backward(images, labels, lr, *path)
        return weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        """Go through the steps backwards."""
        images, labels, step_sizes, *path = (saved.detach() for saved in ctx.saved_tensors)
        student, done, want = ctx.student, ctx.done, ctx.needs_input_grad[3:5]
        grad_images, grad_labels = _zeros(want, images, labels)
        grad_lr = torch.zeros_like(step_sizes)
        for step in reversed(range(done, len(student.batches))):
            index = student.batches[step]
            raw = images[index].requires_grad_(want[0])
            with torch.enable_grad():
                x = student.augmented(raw, step)
            lr = step_size_of(step_sizes, step)
            s, adjoint, in_x, in_labels = student.step.adjoint(
                student.network, path[step - done], x.detach(), labels[index], adjoint, lr, want
            )
            step_size_of(grad_lr, step).sub_(s)
            # The augmentation is differentiated once, here. One that ignores its images has no gradient.
            if grad_images is not None and x.requires_grad:
                (in_raw,) = torch.autograd.grad(x, raw, in_x, allow_unused=True, materialize_grads=True)
                grad_images.index_add_(0, index, -lr * in_raw)
            if grad_labels is not None:
                grad_labels.index_add_(0, index, -lr * in_labels)
        return None, None, adjoint, grad_images, grad_labels, grad_lr


class OptimizerAdjoint(torch.autograd.Function):
    """The same for any optimizer, with how many steps it has made, and its state."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Student,
        rule: tuple[InnerOptimizer, int],
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        step_sizes: Tensor,
        *state: Tensor,
    ) -> Tensor:
        """Run the steps and keep the weights before each."""
        optimizer, done = rule
        weights, path = start.detach().clone(), []
        for step in range(done, len(student.batches)):
            gradient = student.step.gradient(student.network, weights, *student.batch(step, images, labels))
            path += [weights, gradient, *state]
            lr = step_size_of(step_sizes, step).detach()
            weights, state = optimizer.step(weights, gradient, state, lr, step + 1)
        ctx.student, ctx.rule, ctx.size = student, rule, 2 + len(state)
        # Saved through autograd, so that a set changed in place before backward is an error, not a wrong gradient.
        ctx.save_for_backward(images, labels, step_sizes, *path)
        return weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        """Go through the steps backwards."""
        images, labels, step_sizes, *path = (saved.detach() for saved in ctx.saved_tensors)
        student, (optimizer, done), size = ctx.student, ctx.rule, ctx.size
        want = ctx.needs_input_grad[3:5]
        grad_images, grad_labels = _zeros(want, images, labels)
        grad_sizes = torch.zeros_like(step_sizes)
        of_state: State = tuple(torch.zeros_like(adjoint) for _ in range(size - 2))
        for step in reversed(range(done, len(student.batches))):
            weights, gradient, *state = path[(step - done) * size : (step - done + 1) * size]
            lr = step_size_of(step_sizes, step)
            leaves = [leaf.detach().requires_grad_() for leaf in (weights, gradient, lr, *state)]
            with torch.enable_grad():
                after, states = optimizer.step(leaves[0], leaves[1], tuple(leaves[3:]), leaves[2], step + 1)
            through, gamma, in_lr, *of_state_before = torch.autograd.grad(
                [after, *states], leaves, [adjoint, *of_state], allow_unused=True, materialize_grads=True
            )
            step_size_of(grad_sizes, step).add_(in_lr)
            index = student.batches[step]
            raw = images[index].requires_grad_(want[0])
            with torch.enable_grad():
                x = student.augmented(raw, step)
            _, in_weights, in_x, in_labels = student.step.product(
                student.network, weights, x.detach(), labels[index], gamma, want
            )
            adjoint, of_state = through + in_weights, tuple(of_state_before)
            if grad_images is not None and x.requires_grad:
                (in_raw,) = torch.autograd.grad(x, raw, in_x, allow_unused=True, materialize_grads=True)
                grad_images.index_add_(0, index, in_raw)
            if grad_labels is not None:
                grad_labels.index_add_(0, index, in_labels)
        return None, None, adjoint, grad_images, grad_labels, grad_sizes, *(None for _ in of_state)
