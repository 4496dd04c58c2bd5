"""The ranges of the numbers that users may choose: one table, which constructors check their arguments against."""

from __future__ import annotations

import inspect
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Count:
    """A whole number from ``least`` to ``most``."""

    least: int = 1
    most: int = 10**9  # beyond it nothing ends, and lengths overflow

    def problem(self, value: Any) -> str | None:
        """Describe the problem with a value; None for a good one."""
        try:
            number = operator.index(value)
        except (TypeError, RuntimeError):  # the latter of a tensor that holds more than one number
            return "must be a whole number"
        if number < self.least:
            return f"must be at least {self.least}"
        return f"must be at most {self.most}" if number > self.most else None


@dataclass(frozen=True)
class Range:
    """A finite number from ``least`` to ``most``, each included unless it is open."""

    least: float
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def problem(self, value: Any) -> str | None:
        """Describe the problem with a value; None for a good one."""
        try:
            number = float(value)
        except OverflowError:  # a whole number that no float can hold
            number = math.inf
        except (TypeError, ValueError, RuntimeError):
            return "must be a number"
        above = number > self.least or (number == self.least and not self.open_least)
        below = number < self.most or (number == self.most and not self.open_most)
        if above and below and math.isfinite(number):
            return None
        if math.isinf(self.most):
            return f"must be {'above' if self.open_least else 'at least'} {self.least:g} and finite"
        return f"must lie in {'[('[self.open_least]}{self.least:g}, {self.most:g}{'])'[self.open_most]}"


AT_LEAST_0, ABOVE_0 = Range(0), Range(0, open_least=True)
BELOW_1, SHARE = Range(0, 1, open_most=True), Range(0, 1)
PIXEL_RATE = Range(0, 1e12)  # images learned at larger rates overflow in pictures and histograms

# By the argument's name, which means the same wherever it occurs.
RANGES: dict[Count | Range, str] = {
    ABOVE_0: (
        "lr real_lr learning_rates lr_network lr_pool step_size_init clip eps threshold zca_eps minutes temperature"
    ),
    AT_LEAST_0: "weight_decay rho alpha kappa discrimination level_weights reg bias_variance stop_after",
    PIXEL_RATE: "lr_images lr_labels lr_step_size lr_momentum",
    BELOW_1: "momentum decay betas rate",
    SHARE: "epsilon lambda_1 lambda_2",
    Range(0, 0.9): "val_fraction",
    Range(0, 0.9, open_least=True): "test_fraction",
    # 0: the first epoch or teacher, never, or as many as published
    Count(0): "first teacher teacher_epochs every_n_epochs measure_every patience lr_milestones",
    Count(1): (
        "teachers epochs real_epochs rounds iterations outer_loops inner_epochs outer_max inner_max window syn_steps "
        "expert_epochs max_start_epoch ceiling growth_iterations segments_per_step networks_per_step "
        "max_steps_per_network iterations_per_epoch ipc max_per_class per_class batch_size batch_real batch_target "
        "pool_batch syn_batch query bases downscale factor kept gaussians fit_steps noise copies"
    ),
    Count(2): "architectures real_architectures",  # one alone has no rank
    Count(1, 64): "depth depths",
    Count(1, 1024): "image_size in_channels",
    Count(0, 1024): "num_workers channels",
    Count(1, 8192): "width widths",
    Count(1, 10_000): "networks lr_networks pool_size",  # all at once
    Count(1, 10**6): "num_classes",
    Count(0, 2**63 - 1): "seed",
}
BOUNDS = {name: bound for bound, names in RANGES.items() for name in names.split()}


def check_bounds(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse the first argument that is out of its range; None is fine where the annotation names it.

    Args:
        owner: the class or function that is called; its signature names the arguments.
        values: at least the arguments by name: ``locals()`` of a constructor. Of a list, every number is checked.

    Example:
        >>> def train(lr: float, epochs: int | None = None) -> None:
        ...     check_bounds(train, locals())
        >>> train(lr=-1.0)
        Traceback (most recent call last):
        ftd_lightning.errors.InputError: train: lr=-1.0 must be above 0 and finite
    """
    for name, parameter in inspect.signature(owner).parameters.items():
        bound = BOUNDS.get(name)
        if bound is None or name not in values or (values[name] is None and "None" in str(parameter.annotation)):
            continue
        given = values[name]
        if isinstance(given, str) and repr(given) in str(parameter.annotation):  # a word of a Literal
            continue
        several = isinstance(given, (list, tuple))
        for index, value in enumerate(given if several else [given]):
            problem = "must be a number" if isinstance(value, (bool, str)) else bound.problem(value)
            if problem:
                label = f"{name}[{index}]" if several else name
                raise InputError(f"{owner.__name__}: {label}={value!r} {problem}")
