"""Losses on frozen features: class means are the gradient of a zero head, and ridge regression is its primal form."""

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from ftd_lightning.functional import centred_class_means, class_mean_loss, ridge_cross_entropy

K, D = 3, 7
pytestmark = pytest.mark.usefixtures("doubles")


def batch(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` features of each class around a mean of the class, and an offset that all share."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(K).repeat(count)
    means = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    return 5 + means[labels] + torch.randn(len(labels), D, generator=generator), labels


def head_gradient(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    head = torch.nn.Linear(D, K)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(cross_entropy(head(features), labels), head.parameters())]
    )


def test_class_means_are_the_gradient_of_a_zero_head_on_a_balanced_batch():
    features, labels = batch(4, 1)
    weights, biases = head_gradient(features, labels).split([K * D, K])
    torch.testing.assert_close(weights, -centred_class_means(features, labels, K).flatten() / K, rtol=0, atol=1e-14)
    torch.testing.assert_close(biases, torch.zeros(K), rtol=0, atol=1e-14)


def test_their_loss_is_linear_gradient_matching():
    real, synthetic = batch(40, 1), batch(2, 2)
    ours = class_mean_loss(centred_class_means(*synthetic, K), centred_class_means(*real, K))
    one, other = head_gradient(*synthetic), head_gradient(*real)
    assert float(ours) == pytest.approx(1 - float(one @ other / one.norm() / other.norm()), abs=1e-14)


def test_classes_of_different_size_count_alike():
    features, labels = batch(4, 1)
    more = torch.cat([features, features[labels == 0]]), torch.cat([labels, labels[labels == 0]])
    torch.testing.assert_close(centred_class_means(*more, K), centred_class_means(features, labels, K))


def test_ridge_regression_in_the_features_is_the_same_in_the_weights():
    (synthetic, labels), (real, classes) = batch(2, 3), batch(5, 4)
    reg, temperature = 0.01, 0.1
    loss = ridge_cross_entropy(synthetic, labels, real, classes, num_classes=K, reg=reg, temperature=temperature)
    penalty = reg * synthetic.square().sum() / len(labels)
    gram = synthetic.T @ synthetic + penalty * torch.eye(D)
    weights = torch.linalg.solve(gram, synthetic.T @ one_hot(labels, K).double())
    # Centred targets move all logits of an image alike, which the softmax does not see.
    assert float(loss) == pytest.approx(float(cross_entropy(real @ weights / temperature, classes)), rel=1e-9)


@pytest.mark.parametrize("kind", ["class_means", "ridge"])
def test_gradients_are_those_of_differences(kind):
    (synthetic, labels), (real, classes) = batch(2, 3), batch(5, 4)

    def loss(synthetic, real):
        if kind == "class_means":
            means = (centred_class_means(x, y, K) for x, y in ((synthetic, labels), (real, classes)))
            return class_mean_loss(*means)
        options = {"num_classes": K, "reg": 0.1, "temperature": 0.5}
        return ridge_cross_entropy(synthetic, labels, real, classes, **options)

    assert torch.autograd.gradcheck(loss, (synthetic.requires_grad_(), real.requires_grad_()))
