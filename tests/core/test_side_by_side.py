from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from ftd_lightning.core import losses as side_by_side
from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.losses import SideBySide
from ftd_lightning.errors import InputError
from ftd_lightning.functional import seeded
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import compiled
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.models import ConvNet

AUGMENT = Augmentation("crop_scale", "multiple")
DRAWS = {"seeds": [3, 4], "augment": AUGMENT}
IMAGES = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10)


def two_networks(norm: str = "batch") -> list[ConvNet]:
    networks = []
    for seed in range(2):
        with seeded(seed):
            networks.append(ConvNet(1, 10, 8, width=4, depth=1, norm=norm))
    return networks


def gradients(networks: list[ConvNet], losses: torch.Tensor) -> list[torch.Tensor]:
    (losses * torch.tensor([1.0, 4.0])).sum().backward()  # powers of two: no rounding of their own
    return [p.grad for network in networks for p in network.parameters()] + [
        buffer for network in networks for buffer in network.buffers()
    ]


@pytest.fixture
def expected() -> list[torch.Tensor]:
    networks = two_networks()
    losses = [
        cross_entropy(network(AUGMENT(IMAGES, make_generator(seed))), LABELS)
        for network, seed in zip(networks, DRAWS["seeds"], strict=True)
    ]
    return [torch.stack(losses).detach(), *gradients(networks, torch.stack(losses))]


@pytest.mark.parametrize("small", [0, 10**6], ids=["one by one", "one graph"])
def test_losses_gradients_and_running_statistics(monkeypatch, expected, small: int) -> None:
    monkeypatch.setattr(side_by_side, "SMALL_BATCH", small)
    networks = two_networks()
    losses = SideBySide("auto", torch.device("cpu"))(networks, IMAGES, LABELS, **DRAWS)
    found = [losses.detach(), *gradients(networks, losses)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "the same bits either way"


def test_compiled_they_are_the_same_and_networks_share_one_graph(monkeypatch, expected) -> None:
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(side_by_side, "compiled", partial(compiled, backend=backend))
    networks = two_networks()
    side_by_side_losses = SideBySide(True, torch.device("cpu"))
    losses = side_by_side_losses(networks, IMAGES, LABELS, **DRAWS)
    side_by_side_losses(two_networks(), IMAGES, LABELS, **DRAWS)
    for a, b in zip([losses.detach(), *gradients(networks, losses)], expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_weights_that_are_frozen_or_unused_stay_without_gradient(monkeypatch) -> None:
    monkeypatch.setattr(side_by_side, "SMALL_BATCH", 0)
    network = two_networks()[0]
    network[0].weight.requires_grad_(False)
    network.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    losses = SideBySide(False, torch.device("cpu"))([network], IMAGES, LABELS, seeds=[0], augment=Augmentation(""))
    losses.sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without == {"0.weight", "unused"}


def test_a_share_of_networks_is_augmented_by_its_own_numbers() -> None:
    both, second = two_networks(), two_networks()[1:]
    protocol = EvaluationProtocol(epochs=2, lr=0.1, augment=Augmentation("crop_scale"))
    train_fresh_networks(both, IMAGES, LABELS, protocol)
    train_fresh_networks(second, IMAGES, LABELS, protocol, indices=[1])
    assert all(torch.equal(a, b) for a, b in zip(both[1].parameters(), second[0].parameters(), strict=True))


def test_another_setting_of_compile_is_refused() -> None:
    with pytest.raises(InputError, match="compile='sometimes' is unknown"):
        train_fresh_networks(two_networks(), IMAGES, LABELS, EvaluationProtocol(epochs=1), compile="sometimes")
