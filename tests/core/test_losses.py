"""Losses of independent networks: one graph or one by one, compiled or eager, by given labels or by a teacher's."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from ftd_lightning.core import losses as losses_module
from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.errors import InputError
from ftd_lightning.functional import seeded
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import compiled
from ftd_lightning.functional.gsam import flatten
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.models import ConvNet

CPU = torch.device("cpu")
AUGMENT = Augmentation("crop_scale", "multiple")
DRAWS = {"seeds": [3, 4], "augment": AUGMENT}
IMAGES = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10)


def network(seed: int, norm: str = "batch") -> ConvNet:
    with seeded(seed):
        return ConvNet(1, 10, 8, width=4, depth=1, norm=norm)


def gradients(networks: list[ConvNet], losses: torch.Tensor) -> list[torch.Tensor]:
    (losses * torch.tensor([1.0, 4.0])).sum().backward()  # powers of two: no rounding of their own
    return [p.grad for network in networks for p in network.parameters()] + [
        buffer for network in networks for buffer in network.buffers()
    ]


@pytest.fixture
def expected() -> list[torch.Tensor]:
    networks = [network(0), network(1)]
    pairs = zip(networks, DRAWS["seeds"], strict=True)
    losses = torch.stack([cross_entropy(one(AUGMENT(IMAGES, make_generator(seed))), LABELS) for one, seed in pairs])
    return [losses.detach(), *gradients(networks, losses)]


@pytest.mark.parametrize("small", [0, 10**6], ids=["one by one", "one graph"])
def test_losses_gradients_and_running_statistics(monkeypatch, expected, small: int) -> None:
    monkeypatch.setattr(losses_module, "SMALL_BATCH", small)
    networks = [network(0), network(1)]
    losses = IndependentLosses("auto", CPU)(networks, IMAGES, LABELS, **DRAWS)
    found = [losses.detach(), *gradients(networks, losses)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "the same bits either way"


def test_compiled_they_are_the_same_and_networks_share_one_graph(monkeypatch, expected) -> None:
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(losses_module, "compiled", partial(compiled, backend=backend))
    networks, computed = [network(0), network(1)], IndependentLosses(True, CPU)
    losses = computed(networks, IMAGES, LABELS, **DRAWS)
    computed([network(0), network(1)], IMAGES, LABELS, **DRAWS)
    for a, b in zip([losses.detach(), *gradients(networks, losses)], expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_in_bf16_they_are_nearly_the_same_and_gradients_are_float32(monkeypatch, rho: float) -> None:
    monkeypatch.setattr(losses_module, "SMALL_BATCH", 0)
    monkeypatch.setattr(losses_module, "compiled", partial(compiled, backend="eager"))
    found = []
    for compiles in (False, True):
        networks = [network(0, "instance"), network(1, "instance")]
        with torch.autocast("cpu", torch.bfloat16):
            losses = IndependentLosses(compiles, CPU, rho=rho)(networks, IMAGES, LABELS, **DRAWS)
            found.append([losses.detach(), *gradients(networks, losses)])
    assert {value.dtype for value in found[1]} == {torch.float32}
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.01, atol=0)
    eager, fast = (flatten(values[1:]) for values in found)
    assert cosine_similarity(eager, fast, dim=0) > 0.97


def test_weights_that_are_frozen_or_unused_stay_without_gradient(monkeypatch) -> None:
    monkeypatch.setattr(losses_module, "SMALL_BATCH", 0)
    one = network(0)
    one[0].weight.requires_grad_(False)
    one.register_parameter("unused", nn.Parameter(torch.ones(1)))
    IndependentLosses(False, CPU)([one], IMAGES, LABELS, seeds=[0], augment=Augmentation("")).sum().backward()
    assert {name for name, p in one.named_parameters() if p.grad is None} == {"0.weight", "unused"}


def test_a_share_of_networks_is_augmented_by_its_own_numbers() -> None:
    both, second = [network(0), network(1)], [network(1)]
    protocol = EvaluationProtocol(epochs=2, lr=0.1, augment=Augmentation("crop_scale"))
    train_fresh_networks(both, IMAGES, LABELS, protocol)
    train_fresh_networks(second, IMAGES, LABELS, protocol, indices=[1])
    assert all(torch.equal(a, b) for a, b in zip(both[1].parameters(), second[0].parameters(), strict=True))
    with pytest.raises(InputError, match="compile='sometimes' is unknown"):
        train_fresh_networks(second, IMAGES, LABELS, protocol, compile="sometimes")
