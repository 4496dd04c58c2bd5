"""A student of the inner loop: what all of its steps have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ftd_lightning.errors import InputError
from ftd_lightning.functional.inner_step import InnerStep, draws_random_numbers
from ftd_lightning.functional.seeding import make_generator

Augment = Callable[[Tensor, torch.Generator], Tensor]

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# The modes (of all modules) in which a network was seen to be a function of its weights.
_functions: WeakKeyDictionary[nn.Module, set[tuple[bool, ...]]] = WeakKeyDictionary()


class Student(NamedTuple):
    """What all inner steps have in common."""

    network: nn.Module
    batches: Sequence[Tensor]
    augment: Augment | None
    seed: int
    step: InnerStep

    def augmented(self, images: Tensor, step: int) -> Tensor:
        """Augment the mini-batch of a step; a repeated step draws the same augmentation."""
        return images if self.augment is None else self.augment(images, make_generator(self.seed, "inner", step))

    def batch(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the augmented images and the labels of a step, detached."""
        index = self.batches[step]
        return self.augmented(images.detach()[index], step), labels.detach()[index]


def step_size_of(step_size: Tensor, step: int) -> Tensor:
    """Return the step size of a step, a scalar, from one for all or one for each."""
    return step_size[step] if step_size.ndim else step_size


def require_function(network: nn.Module, weights: Tensor, images: Tensor, index: Tensor) -> None:
    """Refuse a network that draws random numbers; once per network and mode, on the first mini-batch."""
    for name, module in network.named_modules():
        if isinstance(module, DROPOUT) and module.training and module.p > 0:
            raise InputError(f"dropout {name!r} is active: a student must be a function of its weights; set p to 0")
    mode = tuple(module.training for module in network.modules())
    seen = _functions.setdefault(network, set())
    if mode not in seen:
        if draws_random_numbers(network, images.detach()[index], weights=weights.detach()):
            raise InputError(
                f"{type(network).__name__} draws random numbers (dropout, drop path): a student must be a function of "
                "its weights; switch that off"
            )
        seen.add(mode)
