"""ConvNet and the dict of networks: sizes that the papers fix, every option, and what is refused."""

import copy
import itertools
from typing import get_args

import pytest
import torch
from torch import nn

from ftd_lightning.errors import InputError
from ftd_lightning.functional import make_generator, seeded
from ftd_lightning.models import ConvNet, build_network
from ftd_lightning.models.convnet import Activation, Norm, Pooling


def pictures(count, size, channels=3):
    return torch.randn(count, channels, size, size, generator=make_generator(size))


def tiny_network(in_channels, num_classes, image_size, scale=1.0):
    """A network of someone's own, given to build_network by its import path."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
    network.scale = scale
    return network


@pytest.mark.parametrize(
    ("classes", "size", "depth", "count"),
    [(10, 32, 3, 320_010), (100, 32, 3, 504_420), (200, 64, 4, 857_160), (10, 128, 5, 615_690)],
    ids=["CIFAR-10", "CIFAR-100", "Tiny ImageNet", "ImageNet subset"],
)
def test_parameter_counts_of_the_papers_networks(classes, size, depth, count):
    assert sum(p.numel() for p in ConvNet(3, classes, size, depth=depth).parameters()) == count


OPTIONS = list(itertools.product(get_args(Norm), get_args(Activation), get_args(Pooling)))


def test_every_option_runs_and_is_another_network():
    found = set()
    for norm, activation, pooling in OPTIONS:
        with seeded(0):
            network = ConvNet(3, 5, 8, width=8, depth=2, norm=norm, activation=activation, pooling=pooling)
        images = pictures(4, 8).requires_grad_()
        logits = network(images)
        logits.square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in network.parameters())
        assert bool((images.grad.flatten(1).norm(dim=1) > 0).all())
        found.add(tuple(logits.flatten().tolist()))
    assert len(found) == len(OPTIONS) == 45


def test_instance_norm_is_torchs_affine_instance_norm():
    with seeded(0):
        network = ConvNet(3, 10, 16, width=8, depth=2).double()
        for p in network.parameters():
            nn.init.normal_(p)  # scales and offsets that are not 1 and 0
    reference = copy.deepcopy(network)
    names = [name for name, module in reference.named_children() if isinstance(module, nn.GroupNorm)]
    assert len(names) == 2
    for name in names:
        norm = nn.InstanceNorm2d(8, affine=True).double()
        norm.load_state_dict(network.get_submodule(name).state_dict())
        setattr(reference, name, norm)
    images = pictures(4, 16).double()
    torch.testing.assert_close(network(images), reference(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 3e-2)])
def test_norm_and_pooling_as_they_are_compiled_are_those_of_torch_with_two_derivatives(dtype, tolerance):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with seeded(0):
        layers = nn.Sequential(*list(ConvNet(3, 10, (8, 16), width=8, depth=1))[1:4]).to(dtype)
        for p in layers.parameters():
            nn.init.normal_(p)
        maps, direction = (torch.randn(4, 8, 8, 16, dtype=dtype) for _ in range(2))
    results = []
    for run in (layers, torch.compile(layers, backend=backend, fullgraph=True)):
        leaves = [maps.clone().requires_grad_(), *layers.parameters()]
        out = run(leaves[0])
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad((first[0] * direction).sum(), leaves)
        results.append([tensor.detach() for tensor in (out, *first, *second)])
    for eager, fast in zip(*results, strict=True):
        assert fast.dtype == eager.dtype
        assert float((fast - eager).norm()) <= tolerance * float(eager.norm())
    called = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert "var_mean" in called
    assert "group_norm" not in called
    assert "avg_pool" not in called


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("convnett", {}, "unknown network 'convnett': did you mean 'convnet'"),
        ("convnet", {"norm": "swish"}, r"ConvNet has no norm 'swish': choose from \['"),
        ("nowhere.at_all.network", {}, "network 'nowhere.at_all.network' cannot be imported"),
        (f"{__name__}.tiny_network", {"colour": "blue"}, "tiny_network': .*'colour'"),
    ],
)
def test_networks_and_options_that_do_not_exist_are_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        build_network(name, 3, 10, 32, **options)


def test_build_network_by_import_path():
    network = build_network(f"{__name__}.tiny_network", 3, 10, 8, scale=2.0)
    assert network(pictures(2, 8)).shape == (2, 10)
    assert network.scale == 2.0
