"""The perturbation and the direction of GSAM, by hand and by what must hold for any gradient."""

import pytest
import torch

from ftd_lightning.functional import gsam_direction, gsam_perturbation, make_generator


def tensors(seed, *, dtype=torch.float64):
    generator = make_generator(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 2), (5,), (1, 2, 2), ())]


def flat(values):
    return torch.cat([v.flatten() for v in values])


def test_plain_ball_by_hand():
    # L = w1 * w2 at w = (4, 3): g = (3, 4), ||g|| = 5, so eps = 5 * (3, 4) / 5 = (3, 4).
    eps = gsam_perturbation([torch.tensor(4.0), torch.tensor(3.0)], [torch.tensor(3.0), torch.tensor(4.0)], rho=5.0)
    assert [float(e) for e in eps] == pytest.approx([3.0, 4.0])


def test_adaptive_ball_by_hand():
    # w = (1, -2), g = (3, 2): w^2 g = (3, 8) and ||w g|| = ||(3, -4)|| = 5, so eps = 5 * (3, 8) / 5 = (3, 8).
    w, g = [torch.tensor([1.0]), torch.tensor([-2.0])], [torch.tensor([3.0]), torch.tensor([2.0])]
    eps = gsam_perturbation(w, g, rho=5.0, adaptive=True)
    assert [float(e) for e in eps] == pytest.approx([3.0, 8.0])


def test_direction_by_hand():
    # g = (3, 4), g_p = (7, 7): <g, g_p> / ||g_p||^2 = 49 / 98 = 1/2, so g splits into (3.5, 3.5) along g_p and
    # (-0.5, 0.5) across; g_p - 1/2 * (-0.5, 0.5) = (7.25, 6.75).
    g, g_p = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([7.0]), torch.tensor([7.0])]
    assert [float(d) for d in gsam_direction(g, g_p, alpha=0.5)] == pytest.approx([7.25, 6.75])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("seed", "rho"), [(0, 0.0), (1, 0.01), (2, 2.0)])
def test_perturbation_lies_on_the_ball_and_climbs_the_most(rho, seed, adaptive):
    w, g = flat(tensors(seed)), flat(tensors(seed + 100))
    eps = gsam_perturbation(tensors(seed), tensors(seed + 100), rho=rho, adaptive=adaptive)
    assert [e.shape for e in eps] == [p.shape for p in tensors(seed)]
    eps, size = flat(eps), w.abs() if adaptive else torch.ones_like(w)
    assert float((eps / size).norm()) == pytest.approx(rho, rel=1e-12)
    # No other point of the ball {||eps / size|| <= rho} climbs further to first order: rho * ||size g|| is the bound.
    assert float(eps @ g) == pytest.approx(rho * float((size * g).norm()), rel=1e-12)


@pytest.mark.parametrize(("seed", "alpha"), [(0, 0.1), (1, 1.0)])
def test_alphas_part_is_orthogonal_to_the_perturbed_gradient(alpha, seed):
    g, g_p = tensors(seed), tensors(seed + 100)
    direction = gsam_direction(g, g_p, alpha=alpha)
    assert [d.shape for d in direction] == [p.shape for p in g]
    part = (flat(g_p) - flat(direction)) / alpha
    assert float(part.norm()) > 0
    assert abs(float(part @ flat(g_p))) < 1e-12 * float(part.norm() * flat(g_p).norm())
    # What is left of g lies along g_p: the part is g's own orthogonal component and nothing else.
    rest = flat(g) - part
    assert abs(float(torch.cosine_similarity(rest, flat(g_p), dim=0))) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("adaptive", "dtype"), [(False, torch.float32), (True, torch.float64)])
def test_zero_gradient_gives_zeros_and_no_nan(adaptive, dtype):
    w = tensors(0, dtype=dtype)
    zero = [torch.zeros_like(p) for p in w]
    assert all(bool(e.eq(0).all()) for e in gsam_perturbation(w, zero, rho=0.1, adaptive=adaptive))
    assert all(bool(d.eq(0).all()) for d in gsam_direction(zero, zero, alpha=1.0))
    assert all(bool(d.isfinite().all()) for d in gsam_direction(w, zero, alpha=1.0))
    assert all(bool(d.eq(p).all()) for d, p in zip(gsam_direction(zero, w, alpha=1.0), w, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("magnitude", [1e-35, 1e25])
def test_the_radius_does_not_depend_on_the_size_of_the_gradient(magnitude, adaptive):
    """Squares of float32 values below 1e-23 are 0: a norm that is not scaled sends the weights to 1e11."""
    weights = tensors(0, dtype=torch.float32)
    gradients = [magnitude * g for g in tensors(1, dtype=torch.float32)]
    eps = gsam_perturbation(weights, gradients, rho=0.01, adaptive=adaptive)
    measured = [e / w.abs() if adaptive else e for e, w in zip(eps, weights, strict=True)]
    assert float(flat(measured).norm()) == pytest.approx(0.01, rel=1e-4)
