"""Ridge regression: against the normal equations of the features that the kernel is made of."""

import torch

from ftd_lightning.functional import centred_targets, half_squared_error, ridge_predictions, target_probabilities


def draw(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_predictions_are_those_of_the_normal_equations() -> None:
    """Weights w = (F'F + c I)^-1 F'y in the features: the same ridge, by a system of another size."""
    features, others, y = draw(7, 4), draw(5, 4, seed=1), draw(7, 3, seed=2)
    kernel = features @ features.T
    amount = 0.03 * float(kernel.trace()) / 7
    weights = torch.linalg.inv(features.T @ features + amount * torch.eye(4).double()) @ features.T @ y
    predicted = ridge_predictions(others @ features.T, kernel, y, reg=0.03)
    torch.testing.assert_close(predicted, others @ weights, rtol=1e-9, atol=1e-9)


def test_gradients() -> None:
    inputs = [draw(3, 4).requires_grad_(), draw(4, 6, seed=1).requires_grad_(), draw(4, 2, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda t, f, y: ridge_predictions(t, f @ f.T, y, reg=0.1), inputs)


def test_float32_targets_lose_no_more_than_their_own_rounding() -> None:
    """Eigenvalues from 1 to 1e-9 and reg 1e-6: solved in float32 the answer would be off by tens of per cent."""
    basis = torch.linalg.qr(draw(8, 8)).Q
    kernel = basis @ torch.diag(torch.logspace(0, -9, 8, dtype=torch.float64)) @ basis.T
    exact = ridge_predictions(kernel, kernel, draw(8, 2), reg=1e-6)
    rounded = ridge_predictions(kernel, kernel, draw(8, 2).float(), reg=1e-6)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_singular_system_is_no_error() -> None:
    assert not torch.isfinite(ridge_predictions(torch.ones(1, 2), torch.zeros(2, 2), torch.ones(2, 1), reg=0.0)).any()


def test_targets_and_probabilities_are_inverse_for_classes() -> None:
    labels = torch.tensor([0, 2, 1])
    for scale in (1.0, 0.5):
        targets = centred_targets(labels, 3, scale=scale)
        torch.testing.assert_close(targets.sum(1), torch.zeros(3))
        assert torch.equal(target_probabilities(targets, scale=scale), torch.eye(3)[labels])


def test_any_targets_become_probabilities() -> None:
    made = target_probabilities(torch.cat([3 * draw(50, 4).float(), torch.full((1, 4), -9.0)]))
    assert float(made.min()) == 0.0
    torch.testing.assert_close(made.sum(1), torch.ones(51))
    assert torch.equal(made[-1], torch.full((4,), 0.25))


def test_the_loss_is_half_the_mean_of_squared_norms() -> None:
    predictions, targets = draw(5, 3), draw(5, 3, seed=1)
    each = [sum((p - t) ** 2 for p, t in zip(*pair, strict=True)) for pair in zip(predictions, targets, strict=True)]
    torch.testing.assert_close(half_squared_error(predictions, targets), sum(each) / 10)
