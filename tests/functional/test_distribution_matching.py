"""Distribution matching: the distance by hand, and the features that any network gives."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from ftd_lightning.functional import distribution_distance, embed, feature_levels, make_generator
from ftd_lightning.models import NETWORKS, ConvNet, build_network


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=make_generator(seed, "features"), dtype=dtype)


def test_distance_against_a_loop_over_features():
    synthetic, real = draw(3, 7), draw(5, 7, seed=1)
    expected = sum((sum(r) / 5 - sum(s) / 3) ** 2 for r, s in zip(real.T.tolist(), synthetic.T.tolist(), strict=True))
    assert float(distribution_distance(synthetic, real)) == pytest.approx(expected, rel=1e-12)


def test_distance_of_equal_batches_is_zero_and_copies_do_not_count():
    features = draw(4, 7)
    assert float(distribution_distance(features, features)) == 0
    assert float(distribution_distance(features, torch.cat([features, features]))) < 1e-28
    # A sum over features: a shift by 1 everywhere is worth their number.
    assert float(distribution_distance(features + 1, features)) == pytest.approx(7)


def test_distance_gradcheck():
    assert gradcheck(distribution_distance, (draw(3, 4).requires_grad_(), draw(5, 4, seed=1).requires_grad_()))


def test_classes_do_not_touch_each_other():
    net, real, images = ConvNet(1, 2, 8, width=4, depth=2).double(), draw(6, 1, 8, 8), draw(4, 1, 8, 8, seed=1)
    images.requires_grad_()

    def distance(real):
        parts = zip(embed(net, images).split(2), embed(net, real).split(3), strict=True)
        return sum(distribution_distance(synthetic, theirs.detach()) for synthetic, theirs in parts)

    changed = torch.cat([real[:3], real[3:] + draw(3, 1, 8, 8, seed=2)])
    one, other = (torch.autograd.grad(distance(r), images)[0] for r in (real, changed))
    torch.testing.assert_close(one[:2], other[:2])
    assert float((one[2:] - other[2:]).abs().max()) > 1e-6


WIDTHS = {"alexnet": 3072, "convnet": 2048, "resnet18_ap": 512 * 4 * 4}


@pytest.mark.parametrize(("name", "width"), [(n, WIDTHS.get(n, 512)) for n in NETWORKS])
def test_the_last_linear_layer_of_every_network_makes_logits_of_the_embedding(name, width):
    net = build_network(name, 3, 10, 32)
    images = draw(2, 3, 32, 32, dtype=torch.float32)
    features = embed(net, images)
    assert features.shape == (2, width)
    assert net[-1](features).equal(net(images))


class Twisted(nn.Module):
    """Its last linear layer is registered first, and what goes in has more than two axes."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(6, 2), nn.Linear(3, 6)

    def forward(self, x):
        return self.head(self.body(x).tanh()).mean(dim=1)


def test_the_last_layer_is_the_one_that_runs_last():
    net, x = Twisted(), draw(4, 5, 3, dtype=torch.float32)
    assert embed(net, x).equal(net.body(x).tanh().flatten(1))


def test_given_weights_are_used_and_differentiated():
    net, images = ConvNet(1, 2, 8, width=4, depth=2).double(), draw(3, 1, 8, 8)
    other = ConvNet(1, 2, 8, width=4, depth=2).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    for features in (embed, lambda *a, **k: feature_levels(*a, **k)[-1]):
        given = features(net, images, weights=weights)
        assert given.equal(features(other, images))
        assert not given.equal(features(net, images))
        gradients = torch.autograd.grad(given.square().sum(), list(weights.values()), allow_unused=True)
        assert float(gradients[0].abs().max()) > 0
        assert gradients[-1] is None, "the last layer comes after the embedding"


def test_embedding_inside_of_a_functional_transform():
    net, images = ConvNet(1, 2, 8, width=4, depth=1).double(), draw(2, 1, 8, 8)
    gradient = torch.func.grad(lambda x: embed(net, x).square().sum())(images)
    leaf = images.clone().requires_grad_()
    embed(net, leaf).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_embedding_gradcheck():
    net = ConvNet(1, 2, 4, width=2, depth=1, activation="sigmoid").double()
    assert gradcheck(lambda x: embed(net, x), draw(2, 1, 4, 4).requires_grad_())


@pytest.mark.parametrize("features", [embed, feature_levels])
def test_the_network_is_left_as_it_was(features):
    net = ConvNet(1, 2, 8, width=4, depth=2, norm="batch")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features(net, draw(3, 1, 8, 8, dtype=torch.float32))
    with pytest.raises(RuntimeError):
        features(net, draw(3, 2, 8, 8, dtype=torch.float32))
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("features", [embed, feature_levels])
def test_a_network_without_a_linear_layer_is_refused(features, refused):
    with refused("Sequential", "nn.Linear"):
        features(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(("depth", "activation"), [(1, "relu"), (3, "leakyrelu"), (4, "sigmoid")])
def test_levels_of_a_convnet_layer_by_layer(depth, activation):
    net, x = ConvNet(3, 5, 16, width=4, depth=depth, activation=activation), draw(2, 3, 16, 16, dtype=torch.float32)
    levels, layers, expected = feature_levels(net, x), list(net), []
    for block in range(depth):
        convolution, norm, act, pool = layers[4 * block : 4 * block + 4]
        expected.append(act(norm(convolution(x))))
        x = pool(expected[-1])
    expected += [x, x.reshape(2, -1)]
    assert len(levels) == depth + 2
    assert all(got.equal(want) for got, want in zip(levels, expected, strict=True))


def test_levels_under_functional_call_of_a_network_that_holds_another():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ConvNet(1, 2, 8, width=4, depth=2)

        def forward(self, x):
            return feature_levels(self.net, x)[0]

    holder, x = Holder(), draw(2, 1, 8, 8, dtype=torch.float32)
    zeros = {name: torch.zeros_like(p) for name, p in holder.named_parameters()}
    assert not functional_call(holder, zeros, (x,)).any()
    assert holder(x).any()
