"""What ``compile="auto"`` means for a fit: compile where the fit is long enough to repay it.

The choice rests on settings alone, never on a clock, on what is left of a fit, or on the number of ranks, so that the
same command computes the same bits anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.flop_counter import FlopCounterMode

from ftd_lightning.functional.compiling import Compile, compiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SMALL_BATCH = 1 << 16  # pixel values of an inner batch up to which launching kernels takes most of a step's time


class Worth(NamedTuple):
    """From when on compiling repays.

    Attributes:
        operations: floating-point operations of the whole job, on a CPU. One core does 1 to 3e10 a second.
        steps: optimizer steps of the whole job, on a GPU.
    """

    operations: float
    steps: float


# Eager, these take about one, four and two minutes on one core, of which compiling saves a third to a half; it costs a
# third of a minute for teachers and evaluations and one minute for both functions of an inner step. Narrow networks do
# fewer operations a second, so that compiling repays for them earlier still.
TEACHER = Worth(1e12, 1000)
MATCHING = Worth(5e12, 500)
EVALUATION = Worth(3e12, float("inf"))  # on a GPU tracing takes longer than an evaluation


class CompileNotice:
    """Says once on the first rank, in one line, how long compilation took, and again only where more was compiled.

    Args:
        what: was compiled.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._told = 0.0

    def __call__(self, seconds: float) -> None:
        """Report the seconds of all compilations so far; 0 says nothing."""
        if seconds > self._told:
            self._told = seconds
            rank_zero_info(f"compiling {self.what} took {seconds:.1f} s, which are no part of its speed")


def forward_operations(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Count the floating-point operations of a forward pass for one image: those of convolutions and matrix products.

    Args:
        network: of any device and dtype; neither its buffers nor any generator are changed.
        image_shape: (C, H, W).

    Example:
        >>> forward_operations(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), (1, 2, 2))
        24
    """
    training = network.training
    like = next(network.parameters(), torch.zeros(()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(like.new_zeros(1, *image_shape))
    network.train(training)
    return int(counter.get_total_flops())


def training_operations(network: nn.Module, image_shape: tuple[int, ...], images: float) -> float:
    """Count the operations of forward and backward passes over so many images."""
    return 3 * images * forward_operations(network, image_shape)


def choose_compile(
    compile: Compile,  # noqa: A002
    device: torch.device,
    worth: Worth,
    *,
    steps: float,
    operations: Callable[[], float],
    batch_values: int | None = None,
) -> Compile:
    """Resolve "auto".

    Args:
        compile: the setting.
        device: where the fit runs.
        worth: of its kind.
        steps: that it takes in all; NaN where that is not known, which does not repay.
        operations: counts its floating-point operations; asked on a CPU only.
        batch_values: pixel values of a batch, where CUDA graphs are an option.

    Returns:
        ``compile`` itself unless it is "auto"; then whether to compile, or "cuda_graphs" for small batches on a GPU.

    Raises:
        InputError: for an unknown setting.

    Example:
        >>> cpu = torch.device("cpu")
        >>> [choose_compile("auto", cpu, MATCHING, steps=500, operations=lambda: size) for size in (3e11, 7e13)]
        [False, True]
    """
    compiles(compile, device)  # refuses an unknown setting
    if compile != "auto":
        return compile
    if device.type == "cuda":
        if not steps >= worth.steps:
            return False
        return "cuda_graphs" if batch_values is not None and batch_values <= SMALL_BATCH else True
    return device.type == "cpu" and steps > 0 and operations() >= worth.operations
