"""AlexNet, VGG11, ResNet18: layers counted by hand, image sizes, norms, and their use as teacher and student."""

import functools
from typing import get_args

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F  # noqa: N812
from torch.nn.functional import cross_entropy

from ftd_lightning.errors import InputError
from ftd_lightning.functional import flatten_parameters, make_generator, seeded, trajectory_matching_loss
from ftd_lightning.models import NETWORKS, VGG11, AlexNet, ResNet18, build_network
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


def test_these_are_the_networks():
    assert list(NETWORKS) == ["convnet", *NAMES]
    assert [type(network_of(name)) for name in NAMES] == [AlexNet, VGG11, ResNet18, ResNet18]


def count_alexnet(channels, classes, size):
    """Kernel area times channels in, plus a bias, times channels out; the last map has an eighth of the size."""
    last = (size + 4) // 8 if channels == 1 else size // 8
    convolutions = (25 * channels + 1) * 128 + (25 * 128 + 1) * 192
    convolutions += (9 * 192 + 1) * 256 + (9 * 256 + 1) * 192 + (9 * 192 + 1) * 192
    return convolutions + (192 * last * last + 1) * classes


def count_vgg11(channels, classes, size):
    first = (9 * channels + 1) * 64 + (9 * 64 + 1) * 128
    middle = (9 * 128 + 1) * 256 + (9 * 256 + 1) * 256
    last = (9 * 256 + 1) * 512 + 3 * (9 * 512 + 1) * 512
    norms = 2 * (64 + 128 + 256 + 256 + 4 * 512)
    return first + middle + last + norms + (512 + 1) * classes


def count_resnet18(channels, classes, size, *, last=1):
    stem = 9 * channels * 64 + 2 * 64
    stages = 4 * 9 * 64 * 64 + 4 * 2 * 64
    for wide in (128, 256, 512):
        narrow = wide // 2
        stages += 9 * narrow * wide + 3 * 9 * wide * wide + narrow * wide  # the last is the shortcut
        stages += 5 * 2 * wide
    return stem + stages + (512 * last * last + 1) * classes


def count_resnet18_ap(channels, classes, size):
    return count_resnet18(channels, classes, size, last=size // 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "classes", "size"), [(3, 10, 32), (1, 10, 32), (1, 7, 60), (3, 200, 64)])
def test_parameter_counts(name, channels, classes, size):
    counts = dict(zip(NAMES, (count_alexnet, count_vgg11, count_resnet18, count_resnet18_ap), strict=True))
    count = counts[name](channels, classes, size)
    assert sum(p.numel() for p in network_of(name, channels, classes, size).parameters()) == count


def test_parameter_counts_that_others_state_for_cifar_10():
    assert count_vgg11(3, 10, 32) == 9_231_114
    assert count_resnet18(3, 10, 32) == 11_173_962


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_image_sizes_forward_and_backward(name, channels, size):
    network = network_of(name, channels, 5, size)
    images = pictures(1, size, channels).clone().requires_grad_()
    logits = network(images)
    assert logits.shape == (1, 5)
    logits.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in network.parameters())
    assert bool(images.grad.isfinite().all())
    assert bool(images.grad.any())


@pytest.mark.parametrize(("channels", "size", "last"), [(3, 32, 4), (1, 32, 4), (1, 28, 4), (3, 64, 8), (3, 128, 16)])
def test_alexnets_linear_layer_follows_the_image_size(channels, size, last):
    network = AlexNet(channels, 10, size)
    assert network[-1].in_features == 192 * last * last
    padding = [module.padding for module in network if isinstance(module, nn.Conv2d)]
    assert padding == [(4, 4) if channels == 1 else (2, 2), (2, 2), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_linear_layer_takes_512_numbers_whatever_the_image_size(name):
    assert {network_of(name, size=size)[-1].in_features for size in (32, 64, 128)} == {512}


def last_map(network, images):
    """What the network takes the mean over."""
    return nn.Sequential(*list(network)[:-3])(images)


def test_vgg11_of_32_px_is_unchanged_by_the_mean():
    network = network_of("vgg11")
    last = last_map(network, pictures(2, 32))
    assert last.shape == (2, 512, 1, 1)
    assert network[-1](last.flatten(1)).equal(network(pictures(2, 32)))


def kinds(network):
    return [type(module) for module in network.modules() if not [*module.children()]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", get_args(Norm))
def test_every_norm_runs_forward_and_backward(name, norm):
    network = network_of(name, norm=norm)
    logits = network(pictures(2, 32))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in network.parameters())
    found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == (0 if norm == "none" else len(convolutions)), "a norm after every convolution"
    if norm in ("instance", "group"):
        assert all(m.num_groups == (m.num_channels if norm == "instance" else 4) and m.affine for m in found)


@pytest.mark.parametrize(("name", "default"), [("alexnet", "none"), *[(name, "instance") for name in NAMES[1:]]])
def test_default_norm(name, default):
    default = network_of(name, norm=default)
    assert kinds(network_of(name)) == kinds(default)
    assert [p.shape for p in network_of(name).parameters()] == [p.shape for p in default.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_order_of_layers_is_convolution_norm_relu(name):
    layers = kinds(network_of(name, norm="batch"))
    assert not [kind for kind in layers if issubclass(kind, nn.modules.dropout._DropoutNd)]
    layers = [kind for kind in layers if kind is not nn.Identity]
    assert layers[:3] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [layers.count(kind) for kind in (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)] == {
        "alexnet": [5, 5, 3, 0],
        "vgg11": [8, 8, 5, 0],
        "resnet18": [20, 9, 0, 0],  # a block's last ReLU comes after the sum
        "resnet18_ap": [20, 9, 0, 6],
    }[name]


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


def test_pooling_variant_has_weights_of_the_same_names():
    plain, pooling = (network_of(name).state_dict() for name in RESNETS)
    assert list(plain) == list(pooling)
    assert [name for name in plain if plain[name].shape != pooling[name].shape] == ["13.weight"]


def test_pooling_variant_by_option_is_the_one_by_name():
    with seeded(0, "resnet18_ap"):
        by_option = build_network("resnet18", 3, 10, 32, average_pooling=True)
    assert by_option(pictures(2, 32)).equal(network_of("resnet18_ap")(pictures(2, 32)))
    with pytest.raises(InputError, match=r"network 'resnet18_ap': .*'average_pooling'"):
        build_network("resnet18_ap", 3, 10, 32, average_pooling=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_adjoint_equals_the_full_graph(name):
    with seeded(0, "problem"):
        network = build_network(name, 3, 3, 32).double()
        start = flatten_parameters(network)
        target = start + 0.01 * torch.randn_like(start)
    images = pictures(2, 32).double().requires_grad_()
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    results = []
    for unroll in ("adjoint", "graph"):
        batches = [torch.tensor([0]), torch.tensor([1])]
        loss = trajectory_matching_loss(
            network, start, target, images, torch.tensor([0, 2]), lr, batches=batches, unroll=unroll
        )
        results.append([loss.detach(), *grad(loss, [images, lr])])
    for adjoint, graph in zip(*results, strict=True):
        assert graph.norm() > 0
        assert (adjoint - graph).norm() < 1e-10 * graph.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_lowers_the_loss(name):
    network, images, labels = network_of(name), pictures(4, 32), torch.tensor([0, 3, 5, 9])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss = cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    assert cross_entropy(network(images), labels) < loss


@pytest.mark.parametrize(
    ("name", "channels", "least", "options"),
    [
        ("alexnet", 3, 8, {}),
        ("alexnet", 1, 4, {}),
        ("vgg11", 3, 32, {}),
        *[(name, 3, 8, {"norm": norm}) for name in RESNETS for norm in ("none", "batch", "layer", "group")],
        ("vgg11", 1, 32, {}),
        ("resnet18", 3, 9, {}),
        ("resnet18_ap", 3, 16, {}),
    ],
)
def test_size_that_is_too_small_is_refused_and_the_least_is_not(name, channels, least, options, refused):
    with refused(LABELS[name], f"{least - 1} px is too small, it takes {least} px or more"):
        build_network(name, channels, 10, least - 1, **options)
    logits = network_of(name, channels, 10, least, **options)(pictures(3, least, channels))
    assert not logits[0].allclose(logits[1], rtol=1e-4), "what comes out depends on what goes in"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [33, 47])
@pytest.mark.parametrize("channels", [1, 3])
def test_layer_norm_knows_the_maps_of_sizes_that_halving_does_not_divide(name, size, channels):
    assert network_of(name, channels, 10, size, norm="layer")(pictures(1, size, channels)).shape == (1, 10)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_norm_is_refused_with_the_known_ones(name, refused):
    with refused(f"{LABELS[name]} has no norm 'swish': choose from", list(get_args(Norm))):
        build_network(name, 3, 10, 32, norm="swish")


@pytest.mark.parametrize("name", NAMES)
def test_options_that_the_network_does_not_take_are_refused(name, refused):
    with refused(f"network '{name}'", "'width'"):
        build_network(name, 3, 10, 32, width=64)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet", "resnet18"), ("ResNet18", "resnet18"), ("AlexNet", "alexnet"), ("alex", "alexnet"), ("VGG11", "vgg11")],
)
def test_unknown_name_offers_the_nearest(name, nearest, refused):
    with refused(f"unknown network '{name}': did you mean '{nearest}'"):
        build_network(name, 3, 10, 32)
