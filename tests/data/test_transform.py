import numpy as np
import pytest
import torch

from ftd_lightning.files import Standardization, Whitening
from ftd_lightning.files.safetensors_io import write_tensors
from ftd_lightning.files.transforms import load_transform


def smooth_pictures(count, seed, *, channels=3, size=5):
    """Pictures in [0, 1] whose neighbouring pixels and channels are alike, as in photographs."""
    rng = np.random.default_rng(seed)
    noise = rng.random((count, channels, size, size)) + rng.random((count, 1, size, size))
    smooth = noise.cumsum(-1).cumsum(-2)
    return torch.from_numpy(smooth / smooth.max()).float()


def reference(pictures, eps):
    """ZCA in float64 numpy: mean (D,), U diag(1/sqrt(s+eps)) U^T and U diag(sqrt(s+eps)) U^T, (D, D)."""
    rows = pictures.double().numpy().reshape(len(pictures), -1)
    mean = rows.mean(0)
    centred = rows - mean
    s, u = np.linalg.eigh(centred.T @ centred / (len(rows) - 1))
    return mean, (u / np.sqrt(s + eps)) @ u.T, (u * np.sqrt(s + eps)) @ u.T


def relative_error(found, wanted):
    return np.linalg.norm(found.double().numpy().reshape(wanted.shape) - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def fitted_on():
    return smooth_pictures(400, seed=0)


@pytest.fixture(scope="module")
def others():
    return smooth_pictures(30, seed=1)


@pytest.mark.parametrize("eps", [0.1, 0.001])
@pytest.mark.parametrize("count", [400, 50], ids=["full rank", "fewer pictures than values"])
def test_whitening_is_that_of_a_float64_eigendecomposition(others, eps, count):
    pictures = smooth_pictures(count, seed=0)
    whitening = Whitening.fit(pictures, eps=eps)
    mean, matrix, inverse = reference(pictures, eps)
    assert relative_error(whitening.mean, mean) < 1e-5
    assert relative_error(whitening.matrix, matrix) < 1e-4
    assert relative_error(whitening.inverse, inverse) < 1e-4
    for batch in (pictures, others):
        wanted = (batch.double().numpy().reshape(len(batch), -1) - mean) @ matrix
        assert whitening.apply(batch).shape == batch.shape
        assert relative_error(whitening.apply(batch), wanted) < 1e-4


def test_eps_makes_a_difference(fitted_on):
    # Guards the comparison above: eps 0.1 and 0.11 are 100 times further apart than its tolerance.
    _, wanted, _ = reference(fitted_on, 0.11)
    assert relative_error(Whitening.fit(fitted_on, eps=0.1).matrix, wanted) > 1e-2


def test_covariance_is_divided_by_n_minus_one():
    pictures = smooth_pictures(12, seed=0, channels=1, size=2)
    mean, matrix, _ = reference(pictures, 0.001)
    whitened = Whitening.fit(pictures, eps=0.001).apply(pictures)
    rows = pictures.double().numpy().reshape(12, -1) - mean
    assert relative_error(whitened, rows @ matrix) < 1e-4
    s, u = np.linalg.eigh(rows.T @ rows / 12)
    assert relative_error(whitened, rows @ ((u / np.sqrt(s + 0.001)) @ u.T)) > 1e-3


def test_inverse_undoes_the_whitening(fitted_on, others):
    whitening = Whitening.fit(fitted_on)
    for batch in (fitted_on, others, others[:1]):
        assert (whitening.invert(whitening.apply(batch)) - batch).abs().max() < 1e-4


def test_whitening_a_part_is_whitening_the_whole(fitted_on):
    # Nothing is taken from the batch: one picture comes out as it does among others.
    whitening = Whitening.fit(fitted_on)
    assert torch.allclose(whitening.apply(fitted_on[3:5]), whitening.apply(fitted_on)[3:5], atol=1e-5)


def test_whitening_lets_gradients_through(fitted_on, others):
    images = others.clone().requires_grad_()
    whitening = Whitening.fit(fitted_on)
    whitening.invert(images).square().sum().backward()
    assert images.grad.isfinite().all()
    assert not whitening.inverse.requires_grad


def test_whitening_without_its_matrix_is_built_from_the_inverse(fitted_on, others):
    whitening = Whitening.fit(fitted_on)
    tensors = whitening.tensors()
    assert "matrix" not in tensors  # one (D, D) tensor in a synthetic set is enough
    built = Whitening.build(whitening.describe(), tensors)
    assert relative_error(built.matrix, whitening.matrix.double().numpy()) < 1e-4
    assert torch.allclose(built.apply(others), whitening.apply(others), atol=1e-4)
    assert (built.invert(built.apply(others)) - others).abs().max() < 1e-4
    assert built.describe() == whitening.describe()


def test_whitening_without_its_matrix_inverts_nothing_until_pictures_are_whitened(fitted_on, others, monkeypatch):
    # 3 s at 3 x 32 x 32, and whoever reads the numbers in a set's metadata, or shows its pictures, needs none of it.
    calls, inv = [], torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: calls.append(matrix.shape) or inv(matrix))
    whitening = Whitening.fit(fitted_on)
    built = Whitening.build(whitening.describe(), whitening.tensors())
    assert (built.invert(whitening.apply(others)) - others).abs().max() < 1e-4
    assert not calls
    built.apply(others)
    built.apply(others)
    assert len(calls) == 1


def test_whitening_comes_back_from_its_file(fitted_on, others, tmp_path):
    whitening = Whitening.fit(fitted_on, eps=0.05)
    whitening.save(tmp_path / "zca.safetensors")
    back = Whitening.load(tmp_path / "zca.safetensors")
    assert torch.equal(back.apply(others), whitening.apply(others))
    assert torch.equal(back.invert(others), whitening.invert(others))
    assert back.describe() == whitening.describe()


def test_broken_or_foreign_whitening_file_is_refused(fitted_on, refused, tmp_path):
    path = tmp_path / "zca.safetensors"
    with refused(path):
        Whitening.load(path)
    Whitening.fit(fitted_on).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with refused(path):
        Whitening.load(path)
    write_tensors(path, {"mean": torch.zeros(1)}, kind="synthetic_set", metadata={})
    with refused(path, "synthetic set"):
        Whitening.load(path)


def test_equal_descriptions_mean_equal_whitenings(fitted_on):
    description = Whitening.fit(fitted_on, eps=0.1).describe()
    assert description == Whitening.fit(fitted_on.clone(), eps=0.1).describe()
    assert description != Whitening.fit(fitted_on, eps=0.2).describe()
    assert description != Whitening.fit(fitted_on[:-1], eps=0.1).describe()
    assert description != Whitening.fit(fitted_on.flip(0), eps=0.1).describe()
    assert description != Standardization([0.5], [0.5]).describe()
    assert description["kind"] == "zca"
    assert description["eps"] == 0.1


def test_standardization_is_per_channel():
    transform = Standardization([0.5, 0.2], [0.25, 0.1])
    pictures = torch.stack([torch.full((3, 3), 1.0), torch.full((3, 3), 0.0)]).expand(4, 2, 3, 3)
    images = transform.apply(pictures)
    assert torch.allclose(images[:, 0], torch.tensor(2.0))
    assert torch.allclose(images[:, 1], torch.tensor(-2.0))
    assert torch.allclose(transform.invert(images), pictures)
    assert images.dtype == torch.float32


def test_standardised_images_have_mean_0_and_deviation_1(fitted_on):
    mean, std = fitted_on.mean((0, 2, 3)), fitted_on.std((0, 2, 3))
    images = Standardization(mean.tolist(), std.tolist()).apply(fitted_on)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_equal_descriptions_mean_equal_standardizations(others):
    # Given as a tuple or as a list, which is what JSON makes of it.
    a, b = Standardization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), Standardization([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    assert a.describe() == b.describe()
    assert torch.equal(a.apply(others), b.apply(others))
    assert a.describe() != Standardization([0.5, 0.4, 0.3], [0.1, 0.2, 0.31]).describe()


def test_transforms_are_built_again_from_what_they_say(fitted_on, others, refused):
    for transform in (Standardization([0.5, 0.4, 0.3], [0.1, 0.2, 0.3]), Whitening.fit(fitted_on)):
        back = load_transform(transform.describe(), transform.tensors())
        assert type(back) is type(transform)
        assert torch.allclose(back.apply(others), transform.apply(others), atol=1e-4)
    with refused("'fourier'"):
        load_transform({"kind": "fourier"}, {})
