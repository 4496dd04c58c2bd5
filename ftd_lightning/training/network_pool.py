"""A pool of networks, each trained a little whenever it was used, and replaced when it is old (FRePo)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.functional.ridge import half_squared_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


class _Member:
    """One place of the pool: its present network, that network's optimizer, and how often it was trained."""

    def __init__(self, network: nn.Module, lr: float, age: int, generation: int) -> None:
        self.network, self.age, self.generation = network, age, generation
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr)


class NetworkPool:
    """Networks of different ages.

    At the start all weights are fresh, but ages are spread evenly over [0, max_steps): otherwise all networks would be
    replaced at about the same time, and the images would meet only young networks for a while.

    Args:
        build: makes the network of a place and a generation, on its device and in training mode; equal arguments give
            equal weights.
        size: number of places.
        max_steps: steps after which a network is replaced by a fresh one.
        lr: of Adam.
    """

    def __init__(self, build: Callable[[int, int], nn.Module], size: int, max_steps: int, lr: float) -> None:
        self._build, self._max_steps, self._lr = build, max_steps, lr
        self._members = [_Member(build(place, 0), lr, place * max_steps // size, 0) for place in range(size)]

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, place: int) -> nn.Module:
        """Return the present network of a place."""
        return self._members[place].network

    @property
    def ages(self) -> list[int]:
        """Steps of each network, counted from what it began with."""
        return [member.age for member in self._members]

    def train(self, place: int, images: Tensor, targets: Tensor) -> None:
        """Take one step on half the squared error, or replace the network where that was its last.

        Args:
            place: in [0, size).
            images: (N, C, H, W).
            targets: (N, K), without gradient.
        """
        member = self._members[place]
        member.optimizer.zero_grad()
        half_squared_error(member.network(images), targets).backward()  # type: ignore[no-untyped-call]
        member.optimizer.step()
        member.age += 1
        if member.age >= self._max_steps:
            generation = member.generation + 1
            self._members[place] = _Member(self._build(place, generation), self._lr, 0, generation)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return weights, states of the optimizers, ages and generations, place by place."""
        return [
            {
                "network": member.network.state_dict(),
                "optimizer": member.optimizer.state_dict(),
                "age": member.age,
                "generation": member.generation,
            }
            for member in self._members
        ]

    def load_state_dict(self, states: list[Mapping[str, Any]]) -> None:
        """Continue with what :meth:`state_dict` returned for a pool of the same size and network."""
        for member, state in zip(self._members, states, strict=True):
            member.network.load_state_dict(state["network"])
            member.optimizer.load_state_dict(state["optimizer"])
            member.age, member.generation = state["age"], state["generation"]
