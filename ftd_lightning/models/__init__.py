"""Networks of the paper, a dict of their constructors, and anyone's own by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftd_lightning.errors import InputError
from ftd_lightning.models.alexnet import AlexNet
from ftd_lightning.models.convnet import ConvNet
from ftd_lightning.models.description import describe_network, parameter_shapes, same_network
from ftd_lightning.models.registry import NETWORKS, build_network, find_network
from ftd_lightning.models.resnet import ResNet18
from ftd_lightning.models.vgg import VGG11

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "NETWORKS",
    "VGG11",
    "AlexNet",
    "ConvNet",
    "ResNet18",
    "build_network",
    "describe_network",
    "find_network",
    "parameter_shapes",
    "reset_parameters",
    "same_network",
]


def reset_parameters(network: nn.Module) -> None:
    """Draw a network's initial weights again, in place, from torch's global generator.

    Raises:
        InputError: if some weight belongs to a module without ``reset_parameters``: such a network is given as a
            function that builds it instead.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 2); before = net.weight.clone()
        >>> reset_parameters(net); bool(net.weight.equal(before))
        False
    """
    for name, module in network.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise InputError(
                f"{type(network).__name__} cannot be initialised again: its part {name or 'itself'!r} "
                f"({type(module).__name__}) has no reset_parameters(); give a function that builds the network instead"
            )
