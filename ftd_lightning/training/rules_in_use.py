"""What the rules of a matching say together."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.functional.rules import having, only_one
from ftd_lightning.functional.seeding import make_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ftd_lightning.contracts import Images
    from ftd_lightning.functional.rules import MatchingRule, Teachers


def start_window(rules: Sequence[MatchingRule], max_start_epoch: int) -> Callable[[int], range]:
    """Return the start epochs of an iteration as a function of its number.

    Raises:
        InputError: where the first iteration has none, or some outside {0 .. max_start_epoch - 1}.
    """
    rule = only_one(rules, "start_epochs")
    everything = range(max_start_epoch)
    if rule is None:
        return lambda iteration: everything

    def epochs(iteration: int) -> range:
        found = rule.start_epochs(iteration, max_start_epoch)
        if found is None:
            return everything
        if not found or not all(end in everything for end in (found[0], found[-1])):
            raise InputError(
                f"{rule}: iteration {iteration} has start epochs {found.start} to {found.stop - 1}, but "
                f"max_start_epoch={max_start_epoch} allows 0 to {max_start_epoch - 1}"
            )
        return found

    epochs(0)
    return epochs


def choose_images(rule: MatchingRule, real: Images, ipc: int, seed: int, teachers: Teachers) -> Images:
    """Take ipc real images of each class, class by class, as a rule chooses them.

    Raises:
        InputError: where a class has fewer than ipc images, or the rule says so.
    """
    members = []
    for label in real.labels.unique().tolist():
        of_class = (real.labels == label).nonzero()[:, 0]
        if len(of_class) < ipc:
            raise InputError(f"class {label} has {len(of_class)} images, ipc={ipc} are needed")
        order = torch.randperm(len(of_class), generator=make_generator(seed, "initial images", label))
        members.append(of_class[order.to(of_class.device)])
    chosen = rule.initial_images([real.images[index] for index in members], ipc, teachers)
    if chosen is None:
        chosen = [torch.arange(ipc)] * len(members)
    picked = [index[choice.to(index.device)] for index, choice in zip(members, chosen, strict=True)]
    if any(len(index.unique()) != ipc for index in picked):
        raise InputError(f"{rule}: initial_images has to choose ipc={ipc} different images of each class")
    return real.take(torch.cat(picked))


def accepted(rules: Sequence[MatchingRule], loss: Callable[[], Tensor]) -> Tensor | None:
    """Say whether all rules accept a step, a bool scalar; None where none has a say.

    Args:
        rules: are asked.
        loss: returns the loss, averaged over ranks; called where a rule may refuse it.
    """
    gates = having(rules, "accepts")
    value = loss() if gates else None
    said = [answer for rule in gates if value is not None and (answer := rule.accepts(value)) is not None]
    return reduce(torch.logical_and, said) if said else None


def weigh_gradient(rules: Sequence[MatchingRule], images: Tensor, iteration: int) -> None:
    """Multiply the gradient of the images with the weights of all rules, in place."""
    for rule in rules:
        weights = rule.weights(images.detach(), iteration)
        if weights is not None and images.grad is not None:
            images.grad.mul_(weights)
