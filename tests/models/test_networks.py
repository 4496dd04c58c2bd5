"""AlexNet, VGG11, ResNet18: layers counted by hand, image sizes, norms, and their use as teacher and student."""

import functools
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ftd_lightning.functional import make_generator, seeded
from ftd_lightning.models import NETWORKS, build_network
from ftd_lightning.models.layers import Norm

RESNETS = ["resnet18", "resnet18_ap"]
NAMES = ["alexnet", "vgg11", *RESNETS]
LABELS = {"alexnet": "AlexNet", "vgg11": "VGG11", "resnet18": "ResNet18", "resnet18_ap": "ResNet18"}


@functools.cache
def pictures(count, size, channels=3):
    return torch.randn(count, channels, size, size, generator=make_generator(size))


def network_of(name, channels=3, classes=10, size=32, **options):
    with seeded(0, name):
        return build_network(name, channels, classes, size, **options)


# Of the networks of DC and MTT, by their code.
COUNTS = {"alexnet": 1_872_202, "vgg11": 9_231_114, "resnet18": 11_173_962, "resnet18_ap": 11_250_762}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_and_the_linear_layer(name):
    assert sum(p.numel() for p in network_of(name).parameters()) == COUNTS[name]
    at_64 = {"alexnet": 192 * 8 * 8, "resnet18_ap": 512 * 8 * 8}
    assert network_of(name, size=64)[-1].in_features == at_64.get(name, 512)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", get_args(Norm))
def test_every_norm_runs_forward_and_backward(name, norm):
    """At a size that halving does not divide, where layer norm has to know each map."""
    network = network_of(name, 1, size=47, norm=norm)
    images = pictures(2, 47, 1).clone().requires_grad_()
    logits = network(images)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in [*network.parameters()])
    assert bool(images.grad.any())
    found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == (0 if norm == "none" else len(convolutions)), "a norm after every convolution"
    if norm in ("instance", "group"):
        assert all(m.num_groups == (m.num_channels if norm == "instance" else 4) and m.affine for m in found)


def convnet_by_hand(images, take):
    for first in (True, False, False):
        images = F.conv2d(images, *take(2), padding=3 if first and images.shape[1:] == (1, 28, 28) else 1)
        images = F.avg_pool2d(F.relu(F.instance_norm(images, None, None, *take(2))), 2)
    return F.linear(images.flatten(1), *take(2))


def alexnet_by_hand(images, take):
    for pool in (True, True, False, False, True):
        weight, bias = take(2)
        images = F.relu(F.conv2d(images, weight, bias, padding=4 if images.shape[1] == 1 else weight.shape[-1] // 2))
        images = F.max_pool2d(images, 2) if pool else images
    return F.linear(images.flatten(1), *take(2))


def vgg11_by_hand(images, take):
    for pool in (True, True, False, True, False, True, False, True):
        images = F.conv2d(images, *take(2), padding=3 if images.shape[1:] == (1, 28, 28) else 1)
        images = F.relu(F.instance_norm(images, None, None, *take(2)))
        images = F.max_pool2d(images, 2) if pool else images
    assert images.shape[2:] == (1, 1)
    return F.linear(images.flatten(1), *take(2))


def resnet18_by_hand(images, take, pooling):
    """Both blocks of DC: where the plain one strides, the other averages after a ReLU, or a shortcut's convolution."""

    def norm(x):
        return F.instance_norm(x, None, None, *take(2))

    x = F.relu(norm(F.conv2d(images, *take(1), padding=1)))
    for block in range(8):
        halves = block in (2, 4, 6)
        stride = 2 if halves and not pooling else 1
        residual = F.relu(norm(F.conv2d(x, *take(1), stride=stride, padding=1)))
        if halves and pooling:
            residual = F.avg_pool2d(residual, 2)
        residual = norm(F.conv2d(residual, *take(1), padding=1))
        if halves:
            x = F.conv2d(x, *take(1), stride=stride)
            x = norm(F.avg_pool2d(x, 2) if pooling else x)
        x = F.relu(residual + x)
    return F.linear(x.flatten(1) if pooling else x.mean((2, 3)), *take(2))


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_are_those_of_the_fields_layers_written_out(name, channels, size):
    network = network_of(name, channels, size=size).double()
    for p in network.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5)  # scales and offsets that are not 1 and 0
    weights = network.parameters()

    def take(count):
        return [next(weights) for _ in range(count)]

    by_hand = {
        "convnet": convnet_by_hand,
        "alexnet": alexnet_by_hand,
        "vgg11": vgg11_by_hand,
        "resnet18": functools.partial(resnet18_by_hand, pooling=False),
        "resnet18_ap": functools.partial(resnet18_by_hand, pooling=True),
    }[name]
    images = pictures(2, size, channels).double()
    torch.testing.assert_close(network(images), by_hand(images, take), rtol=1e-9, atol=1e-9)
    assert next(weights, None) is None


@pytest.mark.parametrize(
    ("name", "channels", "least", "options"),
    [
        ("alexnet", 3, 8, {}),
        ("alexnet", 1, 4, {}),
        ("vgg11", 3, 32, {}),
        ("resnet18", 3, 8, {"norm": "batch"}),
        ("resnet18_ap", 3, 8, {"norm": "batch"}),
        ("resnet18", 3, 9, {}),
        ("resnet18_ap", 3, 16, {}),
    ],
)
def test_size_that_is_too_small_is_refused_and_the_least_is_not(name, channels, least, options, refused):
    with refused(LABELS[name], f"{least - 1} px is too small, it takes {least} px or more"):
        build_network(name, channels, 10, least - 1, **options)
    logits = network_of(name, channels, 10, least, **options)(pictures(3, least, channels))
    assert not logits[0].allclose(logits[1], rtol=1e-4), "what comes out depends on what goes in"
