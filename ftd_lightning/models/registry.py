"""Networks by name, or by import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from ftd_lightning.errors import InputError
from ftd_lightning.models.alexnet import AlexNet
from ftd_lightning.models.convnet import ConvNet
from ftd_lightning.models.resnet import ResNet18, resnet18_ap
from ftd_lightning.models.vgg import VGG11

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from ftd_lightning.sizes import ImageSize

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
    "resnet18_ap": resnet18_ap,
}


def build_network(name: str, in_channels: int, num_classes: int, image_size: ImageSize, **options: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: a key of ``NETWORKS``, or the import path of a class or function that takes the same arguments.
        in_channels: C of the images.
        num_classes: K, length of the logits.
        image_size: of the images, in pixels, or (height, width).
        options: further arguments of that network.

    Returns:
        An ``nn.Module`` from (N, C, H, W) to logits (N, K).

    Raises:
        InputError: for an unknown name (the nearest ones are offered) or options that the network does not take.
    """
    try:
        return find_network(name)(in_channels, num_classes, image_size, **options)
    except TypeError as error:
        raise InputError(f"network {name!r}: {error}") from error


def recorded_network(description: Mapping[str, Any], where: object, instead: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of a network that a file describes; import paths in files are not followed.

    Raises an InputError for others than this library's. It names the file, ``where``, and ``instead``, how to pass one.
    """
    name, options = description.get("name"), description.get("options")
    if not isinstance(name, str) or name not in NETWORKS or not isinstance(options, dict):
        raise InputError(f"{where}: its network {name!r:.60} is not of this library: {instead}")
    taken = inspect.signature(NETWORKS[name]).parameters.keys() - {"in_channels", "num_classes", "image_size"}
    for option in options:
        if option not in taken:
            raise InputError(
                f"{where}: its network {name!r:.60} has no option {option!r:.60}: choose from {sorted(taken)}"
            )
    return name, options


def find_network(name: str) -> Callable[..., nn.Module]:
    """Return a network's constructor by its name or import path; raises InputError where there is none."""
    if name in NETWORKS:
        return NETWORKS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name.lower(), NETWORKS, n=3, cutoff=0.6) or sorted(NETWORKS)
        raise InputError(f"unknown network {name!r}: did you mean {' or '.join(map(repr, near))}?")
    try:
        constructor: Callable[..., nn.Module] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"network {name!r} cannot be imported: {error}") from error
    return constructor
