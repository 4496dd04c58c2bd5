"""SAM while training on the synthetic set ("MTT + flat minimum", Sec. 4.3)."""

from pathlib import Path

import pytest
import torch
from fits import make_trainer, small_data
from torch.nn.functional import cross_entropy

from ftd_lightning import SyntheticEvaluation
from ftd_lightning.core.losses import IndependentLosses
from ftd_lightning.functional import Augmentation, flatten_parameters, load_flat, make_generator
from ftd_lightning.models import ConvNet

CPU = torch.device("cpu")


def batch(networks: int, norm: str = "instance"):
    torch.manual_seed(0)
    built = [ConvNet(1, 4, 8, width=4, depth=1, norm=norm).double() for _ in range(networks)]
    return built, torch.randn(6, 1, 8, 8).double(), torch.tensor([0, 1, 2, 3, 0, 1])


def gradient(network, images, labels) -> torch.Tensor:
    loss = cross_entropy(network(images), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_each_network_gets_the_gradient_at_its_own_worst_point(rho: float) -> None:
    networks, images, labels = batch(3)
    kwargs = {"seeds": [5, 6, 7], "augment": Augmentation("crop_scale")}
    losses = IndependentLosses(False, CPU, rho=rho)(networks, images, labels, **kwargs)
    losses.sum().backward()
    for network, seed, loss in zip(networks, kwargs["seeds"], losses, strict=True):
        found, weights = torch.cat([p.grad.flatten() for p in network.parameters()]), flatten_parameters(network)
        x = Augmentation("crop_scale")(images, make_generator(seed))
        torch.testing.assert_close(loss, cross_entropy(network(x), labels))
        g = gradient(network, x, labels)
        load_flat(network, weights + rho * g / g.norm())
        torch.testing.assert_close(found, gradient(network, x, labels), rtol=1e-9, atol=1e-12)


def test_weights_come_back_bit_for_bit_and_statistics_move_once() -> None:
    (network,), images, labels = batch(1, "batch")
    (plain,), _, _ = batch(1, "batch")
    before = flatten_parameters(network)
    for one, rho in ((network, 0.5), (plain, 0.0)):
        IndependentLosses(False, CPU, rho=rho)([one], images, labels, seeds=[0], augment=Augmentation(""))
    assert torch.equal(flatten_parameters(network), before)
    for found, expected in zip(network.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected)


def evaluate(folder: Path, **options) -> list[torch.Tensor]:
    data = small_data(synthetic="random", ipc=2)
    module = SyntheticEvaluation(network_options={"width": 4, "depth": 1}, networks=2, augment="crop", **options)
    make_trainer(folder, max_epochs=4).fit(module, datamodule=data)
    return [flatten_parameters(network) for network in module.networks]


def test_rho_0_is_the_plain_evaluation_bit_for_bit_and_another_is_not(tmp_path: Path) -> None:
    plain, zero, flat = evaluate(tmp_path), evaluate(tmp_path, rho=0.0), evaluate(tmp_path, rho=0.1)
    for a, b, c in zip(plain, zero, flat, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
