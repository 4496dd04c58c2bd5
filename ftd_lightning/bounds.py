"""The ranges of all numbers that a user may choose: one table, which constructors ask before they keep anything."""

from __future__ import annotations

import inspect
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@dataclass(frozen=True)
class Count:
    """A whole number from ``least`` to ``most``.

    Example:
        >>> Count(1).problem(0), Count(1, 8).problem(9), Count(1).problem(2.5), Count(1).problem(2)
        ('must be at least 1', 'must be at most 8', 'must be a whole number', None)
    """

    least: int = 1
    most: int = 10**9  # beyond it nothing ends, and lengths no longer fit into what holds them

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None for nothing."""
        try:
            number = operator.index(value)
        except (TypeError, RuntimeError):  # the latter of a tensor that holds more than one number
            return "must be a whole number"
        if number < self.least:
            return f"must be at least {self.least}"
        return f"must be at most {self.most}" if number > self.most else None


@dataclass(frozen=True)
class Range:
    """A finite number from ``least`` to ``most``, each included unless it is said to be open.

    Example:
        >>> Range(0, 1, open_most=True).problem(1.5), Range(0, open_least=True).problem(float("nan"))
        ('must lie in [0, 1)', 'must be above 0 and finite')
    """

    least: float
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None for nothing."""
        try:
            number = float(value)
        except OverflowError:  # a whole number that no float can hold
            number = math.inf
        except (TypeError, ValueError, RuntimeError):
            return "must be a number"
        above = number > self.least or (number == self.least and not self.open_least)
        below = number < self.most or (number == self.most and not self.open_most)
        if above and below and math.isfinite(number):  # NaN is on no side of anything
            return None
        if math.isinf(self.most):
            return f"must be {'above' if self.open_least else 'at least'} {self.least:g} and finite"
        return f"must lie in {'[('[self.open_least]}{self.least:g}, {self.most:g}{'])'[self.open_most]}"


AT_LEAST_0, ABOVE_0 = Range(0), Range(0, open_least=True)
BELOW_1, SHARE = Range(0, 1, open_most=True), Range(0, 1)
# Far above any that learns; images beyond it overflow in whatever is computed of them, pictures and histograms too.
PIXEL_RATE = Range(0, 1e12)
# A seed is a key, of which any 63 bits will do: those that derive_seed returns among them.
SEED = Count(0, 2**63 - 1)

# By the argument's name, which means the same wherever it occurs.
BOUNDS: dict[str, Count | Range] = {
    # Rates and other weights
    "lr": ABOVE_0,
    "real_lr": ABOVE_0,
    "learning_rates": ABOVE_0,
    "lr_network": ABOVE_0,
    "step_size_init": ABOVE_0,
    "lr_images": PIXEL_RATE,
    "lr_labels": PIXEL_RATE,
    "lr_pool": ABOVE_0,
    "lr_step_size": PIXEL_RATE,  # 0: the step size is not learned
    "momentum": BELOW_1,
    "weight_decay": AT_LEAST_0,
    "rho": AT_LEAST_0,
    "alpha": AT_LEAST_0,
    "decay": BELOW_1,
    "clip": ABOVE_0,
    "betas": BELOW_1,
    "eps": ABOVE_0,
    "discrimination": AT_LEAST_0,
    "level_weights": AT_LEAST_0,
    "reg": AT_LEAST_0,
    "bias_variance": AT_LEAST_0,
    # Of matching rules and of CAFE's loops
    "kappa": AT_LEAST_0,
    "rate": BELOW_1,
    "epsilon": SHARE,
    "threshold": ABOVE_0,
    "first": Count(0),
    "ceiling": Count(),
    "growth_iterations": Count(),
    "lambda_1": SHARE,
    "lambda_2": SHARE,
    "outer_max": Count(),
    "inner_max": Count(),
    "window": Count(),
    # How much is trained or learned
    "teachers": Count(),
    "teacher_epochs": Count(0),  # 0: as many as published
    "networks": Count(1, 10_000),  # all at once
    "lr_networks": Count(1, 10_000),
    "epochs": Count(),
    "real_epochs": Count(),
    "rounds": Count(),
    "iterations": Count(),
    "outer_loops": Count(),
    "inner_epochs": Count(),
    "syn_steps": Count(),
    "expert_epochs": Count(),
    "max_start_epoch": Count(),
    "segments_per_step": Count(),
    "networks_per_step": Count(),
    "pool_size": Count(1, 10_000),  # all at once
    "max_steps_per_network": Count(),
    "iterations_per_epoch": Count(),
    "every_n_epochs": Count(0),  # 0: never
    "measure_every": Count(0),  # 0: not before the end
    "lr_milestones": Count(0),
    "architectures": Count(2),  # one alone has no rank
    "real_architectures": Count(2),
    # Images
    "ipc": Count(),
    "max_per_class": Count(),
    "per_class": Count(),
    "batch_size": Count(),
    "batch_real": Count(),
    "batch_target": Count(),
    "pool_batch": Count(),
    "syn_batch": Count(),
    "query": Count(),
    "val_fraction": Range(0, 0.9),  # enough must be left to train on
    "test_fraction": Range(0, 0.9, open_least=True),
    "zca_eps": ABOVE_0,  # pixels that are the same in all images have an eigenvalue of 0
    # Networks
    "image_size": Count(1, 1024),
    "in_channels": Count(1, 1024),
    "num_classes": Count(1, 10**6),
    "width": Count(1, 8192),
    "widths": Count(1, 8192),
    "depth": Count(1, 64),
    "depths": Count(1, 64),
    # Everything else
    "seed": SEED,
    "teacher": Count(0),
    "num_workers": Count(0, 1024),
    "threads": Count(1, 1024),
    "minutes": ABOVE_0,
    "stop_after": AT_LEAST_0,
}


def check_bounds(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse the first argument that is out of its range, or not finite.

    None is fine where it is the default. Of a list, every number is looked at.

    Args:
        owner: the class or function that is called; its signature says what is an argument.
        values: arguments by name, and whatever else there is: ``locals()`` of a constructor, ``vars(self)`` of a
            dataclass.

    Raises:
        InputError: naming the owner, the argument and its range.

    Example:
        >>> def train(lr: float, epochs: int | None = None) -> None:
        ...     check_bounds(train, locals())
        >>> train(lr=0.1)
        >>> train(lr=-1.0)
        Traceback (most recent call last):
        ftd_lightning.errors.InputError: train: lr=-1.0 must be above 0 and finite
    """
    parameters = inspect.signature(owner).parameters
    for name, parameter in parameters.items():
        bound = BOUNDS.get(name)
        if bound is None or name not in values or (values[name] is None and parameter.default is None):
            continue
        for label, value in _numbers(name, values[name]):
            problem = "must be a number" if isinstance(value, (bool, str)) else bound.problem(value)
            if problem:
                raise InputError(f"{owner.__name__}: {label}={value!r} {problem}")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((f"{name}[{index}]", entry) for index, entry in enumerate(value))
    else:
        yield name, value
