"""GSAM as a torch optimizer that wraps another one."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftd_lightning.bounds import check_bounds
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.gsam import direction_of, flatten, perturbation_of, unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim.optimizer import ParamsT


@contextmanager
def frozen_running_statistics(network: nn.Module) -> Iterator[None]:
    """Freeze BatchNorm's running statistics in a ``with`` block; batches are normalised as in training."""
    norms = [norm for norm in batch_norms(network) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class GSAM(Optimizer):
    """Gap-guided sharpness-aware minimisation (Zhuang et al., ICLR 2022), the solver of Eq. 12-13.

    One step runs the closure twice: at the weights, and at the worst point of a ball of radius rho around them. The
    weights are restored bit for bit, and the base optimizer steps along ``g_p - alpha * orthogonal(g, g_p)``. With rho
    0 the closure runs once, and the base optimizer steps as usual; alpha 0 is SAM.

    Args:
        params: as for torch optimizers; one ball for all groups, with rho, alpha and adaptive of the first group.
        base_optimizer: an optimizer over the same parameters, or a callable that builds one from ``params``
            (``torch.optim.SGD``, ``functools.partial(torch.optim.SGD, lr=0.01)``).
        rho: radius of the ball, >= 0.
        alpha: weight of the orthogonal part, >= 0.
        adaptive: use the ASAM ball instead of the plain one.
        reduce: changes the list of final gradients in place before the base optimizer steps, such as by averaging over
            ranks in data-parallel training that synchronises neither pass.

    Attributes:
        perturbed: True during the second run, so that a closure can use :func:`frozen_running_statistics` then.

    Raises:
        InputError: (a ValueError) for a rho or alpha that is negative or not finite.
        ValueError: for a base optimizer over other parameters.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = GSAM([w], torch.optim.SGD([w], lr=0.1), rho=0.0)
        >>> def closure():
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = opt.step(closure); w.data
        tensor([0.8000, 1.6000])
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Optimizer | Callable[[ParamsT], Optimizer],
        rho: float = 0.01,
        alpha: float = 1.0,
        adaptive: bool = False,
        *,
        reduce: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        check_bounds(GSAM, locals())
        params = list(params)  # type: ignore[assignment]  # an iterator could not be read twice
        base = base_optimizer if isinstance(base_optimizer, Optimizer) else base_optimizer(params)
        super().__init__(params, {"rho": rho, "alpha": alpha, "adaptive": adaptive, **base.defaults})
        wrapped = {id(p) for group in base.param_groups for p in group["params"]}
        if wrapped != {id(p) for group in self.param_groups for p in group["params"]}:
            raise ValueError("base_optimizer has other parameters than params")
        for group in base.param_groups:
            for key, value in {"rho": rho, "alpha": alpha, "adaptive": adaptive}.items():
                group.setdefault(key, value)
        self.base_optimizer = base
        # Both share groups and state, so that learning-rate schedulers and checkpoints of either work for the other.
        self.param_groups = base.param_groups
        self.state = base.state
        self.reduce = reduce
        self.perturbed = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one GSAM step; ``closure`` runs forward and backward. Return its first result: the loss."""
        if closure is None:
            raise ValueError("GSAM needs a closure that runs forward and backward and returns the loss")

        def run() -> Any:
            with torch.enable_grad():
                return closure()

        settings = self.param_groups[0]
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.grad = None  # zero_grad does the same in several times the host's time
        loss = run()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if settings["rho"] > 0 and parameters:
            gradient, weights = flatten(self._gradients(parameters)), flatten(parameters)
            perturbation = perturbation_of(gradient, weights if settings["adaptive"] else None, rho=settings["rho"])
            torch._foreach_add_(parameters, unflatten(perturbation, parameters))
            for parameter in parameters:
                parameter.grad = None
            self.perturbed = True
            try:
                run()
                perturbed = flatten(self._gradients(parameters))
            finally:
                self.perturbed = False
                torch._foreach_copy_(parameters, unflatten(weights, parameters))
            direction = direction_of(gradient, perturbed, alpha=settings["alpha"])
            for parameter, value in zip(parameters, unflatten(direction, parameters), strict=True):
                parameter.grad = value
        if self.reduce is not None:
            self.reduce(self._gradients(parameters))
        self.base_optimizer.step()
        return loss

    @staticmethod
    def _gradients(parameters: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def __getstate__(self) -> dict[str, Any]:
        own = {"base_optimizer": self.base_optimizer, "reduce": self.reduce, "perturbed": self.perturbed}
        return {**super().__getstate__(), **own}  # torch's has the settings of its own class alone

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load parameter groups and the base optimizer's state."""
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups
        self.base_optimizer.state = self.state
