"""Fresh networks: one architecture, built again and again, each time from a seed of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ftd_lightning.data.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import seeded
from ftd_lightning.models import build_network, find_network, reset_parameters

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

Network = str | nn.Module | Callable[[], nn.Module]


class FreshNetworks:
    """Builds networks of one architecture.

    Args:
        network: a name or import path for ``build_network``; a module, copied and initialised again; or a function that
            builds one, drawing from torch's global generator.
        options: for ``build_network``.
        datamodule: gives a named network its channels, classes and image size.

    Raises:
        InputError: for a named network without a datamodule that knows these.
    """

    def __init__(
        self, network: Network, options: dict[str, Any] | None, datamodule: LightningDataModule | None
    ) -> None:
        self.network = network
        self.options = dict(options or {})
        self.shape: dict[str, int] = {}
        if isinstance(network, str):
            find_network(network)  # complains of an unknown name before anything else is done
            for key in ("in_channels", "num_classes", "image_size"):
                value = getattr(datamodule, key, None)
                if value is None:
                    raise InputError(
                        f"network {network!r} needs a datamodule with in_channels, num_classes and image_size; "
                        "with one of your own, give a network object or a function that builds it"
                    )
                self.shape[key] = int(value)

    def build(self, *seed: int | str) -> nn.Module:
        """Build one; equal seeds give equal weights."""
        with seeded(*seed):
            if isinstance(self.network, str):
                return build_network(self.network, **self.shape, **self.options)
            if isinstance(self.network, nn.Module):
                network = copy.deepcopy(self.network)
                reset_parameters(network)
                return network
            return self.network()

    def describe(self) -> dict[str, Any]:
        """Name the architecture; equal descriptions mean that weights of one fit the other."""
        if isinstance(self.network, str):
            return {"name": self.network, "options": self.options, **self.shape}
        built = self.build(0)
        shapes = {name: list(p.shape) for name, p in built.named_parameters()}
        return {"name": f"{type(built).__module__}.{type(built).__qualname__}", "shapes": shapes}


def student_networks(
    store: TrajectoryStore,
    network: Network | None,
    options: dict[str, Any] | None,
    datamodule: LightningDataModule | None,
) -> FreshNetworks:
    """Give the networks that teachers of a store can be matched with.

    Args:
        store: the teachers.
        network: as for :class:`FreshNetworks`; None takes the teachers' own.
        options: for a named network.
        datamodule: as for :class:`FreshNetworks`.

    Raises:
        InputError: for another network than the teachers', or None where theirs was an object.
    """
    recorded = store.metadata["network"]
    if network is None:
        if "options" not in recorded:
            raise InputError(f"{store.path}: its network {recorded['name']} has no short name; give it as network")
        network, options = recorded["name"], recorded["options"]
    fresh = FreshNetworks(network, options, datamodule)
    check_compatible(store, {"network": fresh.describe()})
    return fresh


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Mark what is classified right: (N,) float, 1 or 0, for logits (N, K) and classes (N,).

    Example:
        >>> import torch
        >>> right_answers(torch.eye(2), torch.tensor([0, 0]))
        tensor([1., 0.])
    """
    return (logits.argmax(1) == labels).float()


def plain_settings(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Give a module's hyper-parameters as JSON holds them, without what LightningCLI adds for itself."""
    return {key: value for key, value in hparams.items() if not key.startswith("_")}


def plain_network(network: Network | None) -> list[str]:
    """Tell which init arguments to keep out of the saved hyper-parameters: a network that is an object.

    Checkpoints hold plain values only, so that they load without running code.
    """
    return [] if network is None or isinstance(network, str) else ["network"]
