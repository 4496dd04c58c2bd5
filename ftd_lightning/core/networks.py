"""Networks by name, import path or function: fresh ones, and those that teachers can be matched with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import seeded
from ftd_lightning.functional.unroll import flatten_parameters, require_function
from ftd_lightning.models.description import describe_network, only_first, same_network
from ftd_lightning.models.registry import NETWORKS, build_network, find_network, recorded_network

if TYPE_CHECKING:
    from torchmetrics import MeanMetric

    from ftd_lightning.contracts import ImageShape
    from ftd_lightning.files.trajectory_store import TrajectoryStore


def refuse_dropout(network: nn.Module, images: Tensor) -> None:
    """Refuse a network in training mode with dropout in any form, tried on a few images (N, C, H, W)."""
    require_function(network, flatten_parameters(network), images, torch.arange(len(images)))


MOST = 3  # parameters that an error names
Network = str | nn.Module | Callable[[], nn.Module]


class NetworkFactory:
    """Builds networks of one architecture.

    Args:
        network: a name or import path for ``build_network``; a function that builds one, drawing from torch's global
            generator; or a module, which is one network and serves as an architecture only.
        options: for ``build_network``.
        shape: channels, classes and size for a named network.

    Raises:
        InputError: for a named network without a shape.
    """

    def __init__(self, network: Network, options: Mapping[str, Any] | None, shape: ImageShape | None) -> None:
        self.network = network
        self.options = dict(options or {})
        self.shape = shape
        if isinstance(network, str):
            find_network(network)  # refuses an unknown name before anything else is done
            if shape is None:
                raise InputError(
                    f"network {network!r} needs to know the images: fit with a DistillationDataModule (from_datamodule "
                    "wraps your own), or give a function that builds the network"
                )

    def build(self, *seed: int | str) -> nn.Module:
        """Build a network on the CPU; equal seeds give equal weights."""
        refuse_object(self.network)
        with seeded(*seed):
            return self._construct()

    def architecture(self) -> nn.Module:
        """Return a network whose weights are of no interest."""
        with seeded(0):
            return copy.deepcopy(self.network) if isinstance(self.network, nn.Module) else self._construct()

    def _construct(self) -> nn.Module:
        if isinstance(self.network, str):
            assert self.shape is not None
            return build_network(self.network, **self.shape._asdict(), **self.options)
        built = self.network()
        if not isinstance(built, nn.Module):
            raise InputError(f"network={self.network!r} returned {type(built).__name__}, not an nn.Module")
        return built

    def describe(self) -> dict[str, Any]:
        """Describe the architecture as stores and sets record it; see ``models.description``."""
        named: dict[str, Any] = {}
        if isinstance(self.network, str):
            assert self.shape is not None
            named = {"name": self.network, "options": self.options, **self.shape._asdict()}
        # No reader of a file imports a network, so files record the parameters of networks from elsewhere.
        return named if named.get("name") in NETWORKS else {**describe_network(self.architecture()), **named}

    @cached_property
    def backbone(self) -> str | None:
        """The fingerprint of a linear probe's backbone, which its description does not identify; None for others."""
        found = getattr(self.architecture(), "backbone_fingerprint", None)
        return found() if callable(found) else None


def refuse_object(network: Network | None) -> None:
    """Raise an InputError for a module where several fresh networks are needed."""
    if isinstance(network, nn.Module):
        raise InputError(
            f"network is one {type(network).__name__} object, but several fresh networks are needed: give the function "
            "or class that builds it"
        )


def student_networks(
    store: TrajectoryStore,
    network: Network | None = None,
    options: Mapping[str, Any] | None = None,
    shape: ImageShape | None = None,
) -> NetworkFactory:
    """Return the networks that the teachers of a store can be matched with; None takes the teachers' own.

    Refuses parameters of other names or shapes. ``shape`` is for stores that do not know it.
    """
    recorded = store.metadata["network"]
    if network is None:
        network, options = recorded_network(recorded, store.path, "pass it as network")
    fresh = NetworkFactory(network, options, store.shape or shape)
    both = (recorded, fresh.describe())
    if not same_network(*both):
        listed = (", ".join(f"{key}={value}" for key, value in one.get("options", {}).items()) for one in both)
        theirs, ours = (f"{one['name']}({each})" for one, each in zip(both, listed, strict=True))
        lists = zip(("theirs", "this"), (only_first(*both), only_first(*reversed(both))), strict=True)
        said = [
            f"; only {whose} has {', '.join(found[:MOST])}{', ...' * (len(found) > MOST)}"
            for whose, found in lists
            if found
        ]
        raise InputError(
            f"{store.path}: its teachers are {theirs}, which has other parameters than {ours}{''.join(said)}; change "
            "network and network_options, or record a part of a module by TrajectoryRecorder(network=...)"
        )
    return fresh


def add_to_mean(metric: MeanMetric, total: Tensor, count: int) -> None:
    """Add values of known total (a scalar) and count to a mean; ``update`` takes the host several times as long."""
    metric.mean_value.add_(total)
    metric.weight.add_(count)


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Mark correct classifications: (N,) float, 1 or 0, for logits (N, K) and classes (N,)."""
    return (logits.argmax(1) == labels).float()
