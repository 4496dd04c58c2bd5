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


def reference(pictures, eps, ddof=1):
    """ZCA in float64 numpy: mean (D,), U diag(1/sqrt(s+eps)) U^T and U diag(sqrt(s+eps)) U^T, (D, D)."""
    rows = pictures.double().numpy().reshape(len(pictures), -1)
    mean = rows.mean(0)
    centred = rows - mean
    s, u = np.linalg.eigh(centred.T @ centred / (len(rows) - ddof))
    return mean, (u / np.sqrt(s + eps)) @ u.T, (u * np.sqrt(s + eps)) @ u.T


def relative_error(found, wanted):
    return np.linalg.norm(found.double().numpy().reshape(wanted.shape) - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def fitted_on():
    return smooth_pictures(400, seed=0)


@pytest.fixture(scope="module")
def whitening(fitted_on):
    return Whitening.fit(fitted_on)


@pytest.fixture(scope="module")
def others():
    return smooth_pictures(30, seed=1)


@pytest.mark.parametrize("eps", [0.1, 0.001])
@pytest.mark.parametrize("count", [400, 50], ids=["full rank", "fewer pictures than values"])
def test_whitening_is_a_float64_eigendecomposition(others, eps, count):
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
    # Another eps, or a covariance divided by n, would be found.
    assert relative_error(whitening.matrix, reference(pictures, eps * 1.1)[1]) > 1e-2
    few = smooth_pictures(12, seed=0, channels=1, size=2)
    assert relative_error(Whitening.fit(few, eps=eps).matrix, reference(few, eps)[1]) < 1e-4
    assert relative_error(Whitening.fit(few, eps=eps).matrix, reference(few, eps, ddof=0)[1]) > 1e-3


def test_inverse_undoes_the_whitening_of_whole_and_parts(whitening, fitted_on, others):
    for batch in (fitted_on, others, others[:1]):
        assert (whitening.invert(whitening.apply(batch)) - batch).abs().max() < 1e-4
    assert torch.allclose(whitening.apply(fitted_on[3:5]), whitening.apply(fitted_on)[3:5], atol=1e-5)
    images = others.clone().requires_grad_()
    whitening.invert(images).square().sum().backward()
    assert images.grad.isfinite().all()
    assert not whitening.inverse.requires_grad


def test_whitening_without_its_matrix_inverts_it_once_and_only_to_whiten(whitening, others, monkeypatch):
    # 3 s at 3 x 32 x 32, and whoever reads the numbers in a set's metadata, or shows its pictures, needs none of it.
    calls, inv = [], torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: calls.append(matrix.shape) or inv(matrix))
    assert "matrix" not in whitening.tensors()  # one (D, D) tensor in a synthetic set is enough
    built = load_transform(whitening.describe(), whitening.tensors())
    assert (built.invert(whitening.apply(others)) - others).abs().max() < 1e-4
    assert not calls
    assert torch.allclose(built.apply(others), whitening.apply(others), atol=1e-4)
    assert relative_error(built.matrix, whitening.matrix.double().numpy()) < 1e-4
    assert len(calls) == 1
    assert built.describe() == whitening.describe()


def test_whitening_comes_back_from_its_file(whitening, others, tmp_path, refused):
    path = tmp_path / "zca.safetensors"
    whitening.save(path)
    back = Whitening.load(path)
    assert torch.equal(back.apply(others), whitening.apply(others))
    assert torch.equal(back.invert(others), whitening.invert(others))
    assert back.describe() == whitening.describe()
    write_tensors(path, {"mean": torch.zeros(1)}, kind="synthetic_set", metadata={})
    with refused(path, "synthetic set"):
        Whitening.load(path)


def test_equal_descriptions_mean_equal_transforms(whitening, fitted_on, others):
    description = whitening.describe()
    assert (description["kind"], description["eps"]) == ("zca", 0.1)
    assert description == Whitening.fit(fitted_on.clone(), eps=0.1).describe()
    different = [Whitening.fit(fitted_on, eps=0.2), Whitening.fit(fitted_on[:-1]), Whitening.fit(fitted_on.flip(0))]
    assert all(description != other.describe() for other in different)
    # Given as a tuple or as a list, which is what JSON makes of it.
    a, b = Standardization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), Standardization([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    assert a.describe() == b.describe()
    assert a.describe() != Standardization([0.5, 0.4, 0.3], [0.1, 0.2, 0.31]).describe()
    back = load_transform(a.describe(), {})
    assert torch.equal(back.apply(others), a.apply(others))


def test_standardization_is_per_channel(fitted_on):
    transform = Standardization([0.5, 0.2], [0.25, 0.1])
    pictures = torch.stack([torch.full((3, 3), 1.0), torch.full((3, 3), 0.0)]).expand(4, 2, 3, 3)
    images = transform.apply(pictures)
    assert torch.allclose(images[:, 0], torch.tensor(2.0))
    assert torch.allclose(images[:, 1], torch.tensor(-2.0))
    assert torch.allclose(transform.invert(images), pictures)


def test_descriptions_that_make_no_transform_are_refused(whitening, refused):
    zca, standard, tensors = whitening.describe(), Standardization([0.5], [0.5]).describe(), whitening.tensors()
    for description, given, word in [
        ({"kind": "fourier"}, {}, "'fourier'"),
        ([1], {}, "mapping"),
        ({**standard, "std": [0.0]}, {}, "std"),
        ({**standard, "mean": []}, {}, "mean"),
        ({**zca, "eps": -1}, tensors, "eps"),
        (zca, {"mean": tensors["mean"]}, "inverse"),
        (zca, {**tensors, "mean": tensors["mean"][:, 1:]}, "mean"),
    ]:
        with refused("this file", word):
            load_transform(description, given)
