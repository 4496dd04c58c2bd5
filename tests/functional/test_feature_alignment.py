"""CAFE: its losses number by number."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from ftd_lightning.functional import (
    alignment_loss,
    class_means,
    discrimination_loss,
    feature_levels,
    level_weights,
    make_generator,
)
from ftd_lightning.models import ConvNet


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=make_generator(seed, "features"), dtype=dtype)


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


@pytest.mark.parametrize("counts", [[3, 2], [6, 0], [7, -1]])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="do not split 6 features"):
        class_means(draw(6, 2), counts=counts)


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


def test_alignment_gradcheck():
    ours, theirs = ([draw(*s, seed=seed).requires_grad_() for s in ((2, 3), (2, 2, 2))] for seed in (0, 1))
    assert gradcheck(lambda a, b, c, d: alignment_loss([a, b], [c, d], weights=[0.1, 1.0]), (*ours, *theirs))


def test_levels_and_weights_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="2 synthetic and 2 real levels, but 1 weights"):
        alignment_loss([draw(2, 2)] * 2, [draw(2, 2)] * 2, weights=[1.0])


def test_the_last_level_of_a_convnet_counts_twice():
    net, real, synthetic = ConvNet(3, 2, 16, width=4), draw(6, 3, 16, 16).float(), draw(4, 3, 16, 16, seed=1).float()
    theirs = [class_means(f, counts=[3, 3]) for f in feature_levels(net, real)]
    ours = [class_means(f, counts=[2, 2]) for f in feature_levels(net, synthetic)]
    weights = level_weights(len(ours))
    assert weights == [0.1, 0.1, 1.0, 1.0, 1.0], "the released script's"
    terms = [alignment_loss([a], [b], weights=[1.0]) for a, b in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(terms[3], terms[4])
    twice = alignment_loss(ours[:4], theirs[:4], weights=[0.1, 0.1, 1.0, 2.0])
    torch.testing.assert_close(alignment_loss(ours, theirs, weights=weights), twice)


def test_weights_of_other_depths():
    assert level_weights(3) == [1.0, 1.0, 1.0]
    assert level_weights(6) == [0.1, 0.1, 0.1, 1.0, 1.0, 1.0]


def test_discrimination_against_a_loop_over_images():
    real, centres, labels = draw(5, 3), draw(4, 3, seed=1), [0, 3, 1, 3, 2]
    expected = 0.0
    for f, y in zip(real.tolist(), labels, strict=True):
        logits = [sum(p * q for p, q in zip(f, centre, strict=True)) for centre in centres.tolist()]
        expected += math.log(sum(map(math.exp, logits))) - logits[y]
    loss = discrimination_loss(real, torch.tensor(labels), centres)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_discrimination_is_a_sum_that_far_centres_bring_to_zero():
    labels = torch.tensor([0, 1, 2])
    features = torch.eye(3, dtype=torch.float64)
    assert float(discrimination_loss(features, labels, 100 * features)) < 1e-30
    doubled = discrimination_loss(features.repeat(2, 1), labels.repeat(2), features)
    torch.testing.assert_close(doubled, 2 * discrimination_loss(features, labels, features))


def test_discrimination_gradcheck():
    labels = torch.tensor([0, 3, 1, 3, 2])
    inputs = (draw(5, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_())
    assert gradcheck(lambda real, centres: discrimination_loss(real, labels, centres), inputs)
