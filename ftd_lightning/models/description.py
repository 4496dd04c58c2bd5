"""Descriptions of networks in files: enough to tell whether weights of one fit another.

Convention: a description is plain values. A network of this library is ``{"name", "options", "in_channels",
"num_classes", "image_size"}``; any other is ``{"name", "parameters": [[name, shape], ...]}``, with the former's keys
beside them where it was given by import path. Version 0.2 left out those parameters. Version 0.1 wrote ``{"name",
"shapes": {name: shape}}``, which does not tell the order.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.models.registry import NETWORKS, build_network, recorded_network

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

Shapes = list[tuple[str, tuple[int, ...]]]
SHAPE = ("in_channels", "num_classes", "image_size")


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Describe a network by its parameters."""
    network = dict(network.named_children()).get("_orig_mod", network)  # of torch.compile
    kind = type(network)
    parameters = [[name, list(parameter.shape)] for name, parameter in network.named_parameters()]
    return {"name": f"{kind.__module__}.{kind.__qualname__}", "parameters": parameters}


def parameter_shapes(description: Mapping[str, Any]) -> Shapes:
    """Return names and shapes of a network's parameters, in the order of ``network.parameters()``.

    The "shapes" of version 0.1 are sorted by name. No network is imported.

    Raises:
        InputError: for values that do not describe a network, or a network of this library that cannot be built.
    """
    ours = {"name", "options", *SHAPE} <= description.keys() and description["name"] in NETWORKS
    if "parameters" in description and not ours:
        return [(name, tuple(shape)) for name, shape in description["parameters"]]
    if "shapes" in description:
        return sorted((name, tuple(shape)) for name, shape in description["shapes"].items())
    if not ours:
        raise InputError(f"{dict(description)} describes no network's parameters")
    name, options = recorded_network(description, "description", "describe it by its parameters")
    build = partial(build_network, name, **{key: description[key] for key in SHAPE}, **options)
    try:
        with torch.device("meta"):  # takes no memory and no random numbers
            network = build()
    except RuntimeError as error:  # sizes that overflow
        raise InputError(f"{dict(description)} describes a network that cannot be built: {error}") from error
    return [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]


def same_network(a: Any, b: Any) -> bool:
    """Return whether the weights of one network fit the other: parameters of the same names, shapes and order.

    A prefix of all names, such as a LightningModule adds, makes no difference. Anything else than a description equals
    only itself.
    """
    a, b = json.loads(json.dumps(a)), json.loads(json.dumps(b))
    if a == b:
        return True
    try:
        for one, other in ((a, b), (b, a)):  # version 0.2 left the parameters out
            if "options" in one and one == {key: value for key, value in other.items() if key != "parameters"}:
                return True
        ours, theirs = parameter_shapes(a), parameter_shapes(b)
    except (InputError, AttributeError, TypeError):
        return False
    if "shapes" in a or "shapes" in b:
        return dict(ours) == dict(theirs)
    return _unwrapped(ours) == _unwrapped(theirs)


def only_first(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List parameters of one network that another lacks, "0.bias (10,)"; names of a part may lack a prefix."""
    try:
        ours, theirs = (_unwrapped(parameter_shapes(one)) for one in (a, b))
    except InputError:  # version 0.2 left the parameters out
        return []

    def known(name: str, shape: tuple[int, ...]) -> bool:
        names = [f".{other}" for other, size in theirs if size == shape]
        return any(f".{name}".endswith(other) or other.endswith(f".{name}") for other in names)

    return [f"{name} {shape}" for name, shape in ours if not known(name, shape)]


def _unwrapped(shapes: Shapes) -> Shapes:
    """Drop a prefix that all names share, and the prefixes of torch.compile."""
    names = [name.replace("_orig_mod.", "") for name, _ in shapes]
    while len({name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
        names = [name.partition(".")[2] for name in names]
    return [(name, shape) for name, (_, shape) in zip(names, shapes, strict=True)]
