"""DM and CAFE: their losses number by number, and the features that any network gives."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from ftd_lightning.functional import (
    alignment_loss,
    class_means,
    discrimination_loss,
    distribution_distance,
    embed,
    feature_levels,
    level_weights,
    make_generator,
)
from ftd_lightning.models import NETWORKS, ConvNet, build_network


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=make_generator(seed, "features"), dtype=dtype)


def test_distance_against_a_loop_over_features():
    synthetic, real = draw(3, 7), draw(5, 7, seed=1)
    expected = sum((sum(r) / 5 - sum(s) / 3) ** 2 for r, s in zip(real.T.tolist(), synthetic.T.tolist(), strict=True))
    assert float(distribution_distance(synthetic, real)) == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize(("depth", "activation"), [(1, "relu"), (3, "leakyrelu")])
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


# The losses of CAFE.


def test_class_means_against_a_loop():
    features = draw(6, 2, 3)
    means = class_means(features, counts=[1, 3, 2])
    assert means.shape == (3, 2, 3)
    for c, rows in enumerate([[0], [1, 2, 3], [4, 5]]):
        for i in range(2):
            for j in range(3):
                expected = sum(float(features[n, i, j]) for n in rows) / len(rows)
                assert float(means[c, i, j]) == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda f: class_means(f, counts=[1, 3, 2]), features.requires_grad_())


def test_alignment_against_a_loop_over_levels_classes_and_entries():
    shapes, weights = [(2, 3, 4), (2, 5)], [0.1, 2.0]
    ours, theirs = ([draw(*s, seed=seed) for s in shapes] for seed in (0, 1))
    expected = 0.0
    for w, a, b in zip(weights, ours, theirs, strict=True):
        for c in range(2):
            entries = zip(a[c].flatten().tolist(), b[c].flatten().tolist(), strict=True)
            expected += w * sum((q - p) ** 2 for p, q in entries)
    assert float(alignment_loss(ours, theirs, weights=weights)) == pytest.approx(expected, rel=1e-12)
    assert float(alignment_loss(ours, ours, weights=weights)) == 0


def test_the_last_level_of_a_convnet_counts_twice():
    net, real, synthetic = ConvNet(3, 2, 16, width=4), draw(6, 3, 16, 16).float(), draw(4, 3, 16, 16, seed=1).float()
    theirs = [class_means(f, counts=[3, 3]) for f in feature_levels(net, real)]
    ours = [class_means(f, counts=[2, 2]) for f in feature_levels(net, synthetic)]
    weights = level_weights(len(ours))
    assert weights == [0.1, 0.1, 1.0, 1.0, 1.0], "the released script's"
    assert (level_weights(3), level_weights(6)) == ([1.0] * 3, [0.1] * 3 + [1.0] * 3)
    terms = [alignment_loss([a], [b], weights=[1.0]) for a, b in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(terms[3], terms[4])
    twice = alignment_loss(ours[:4], theirs[:4], weights=[0.1, 0.1, 1.0, 2.0])
    torch.testing.assert_close(alignment_loss(ours, theirs, weights=weights), twice)


def test_discrimination_against_a_loop_over_images():
    real, centres, labels = draw(5, 3), draw(4, 3, seed=1), [0, 3, 1, 3, 2]
    expected = 0.0
    for f, y in zip(real.tolist(), labels, strict=True):
        logits = [sum(p * q for p, q in zip(f, centre, strict=True)) for centre in centres.tolist()]
        expected += math.log(sum(map(math.exp, logits))) - logits[y]
    loss = discrimination_loss(real, torch.tensor(labels), centres)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
