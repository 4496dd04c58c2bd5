"""Siamese DSA: one operation and one set of parameters for a batch, whatever its size."""

import functools
import itertools

import pytest
import torch
from torch.autograd import gradcheck

from ftd_lightning.functional import augment as dsa_operations
from ftd_lightning.functional import dsa, make_generator

ANY_OPERATION = pytest.mark.parametrize("name", list(dsa_operations.OPERATIONS))


def draw(count, size=12, dtype=torch.float64):
    return torch.randn(count, 3, size, size, generator=make_generator("images"), dtype=dtype)


@ANY_OPERATION
def test_copies_of_an_image_come_out_alike_whatever_the_batch(name):
    image = draw(1, dtype=torch.float32)
    for seed, mode in enumerate(("single", "multiple", "single", "multiple")):
        alone = dsa(image, make_generator(seed), strategy=name, mode=mode, siamese=True)
        for count in (10, 256):
            batch = dsa(image.expand(count, -1, -1, -1), make_generator(seed), strategy=name, mode=mode, siamese=True)
            assert batch.equal(batch[:1].expand_as(batch))
            torch.testing.assert_close(batch[:1], alone, rtol=1e-6, atol=1e-6)


@ANY_OPERATION
def test_every_image_is_augmented_as_it_would_be_alone(name):
    """A batch of one is the same with parameters of its own, which other tests compare with loops over pixels."""
    images = draw(7)
    for seed in range(5):
        options = {"strategy": name, "align_corners": seed % 2 == 0}
        together = dsa(images, make_generator(seed), siamese=True, **options)
        alone = [dsa(image[None], make_generator(seed), **options) for image in images]
        torch.testing.assert_close(together, torch.cat(alone))


@ANY_OPERATION
def test_without_siamese_images_of_a_batch_differ(name):
    copies = draw(1).expand(32, -1, -1, -1)
    assert len(dsa(copies, make_generator(0), strategy=name).unique(dim=0)) > 1
    assert len(dsa(copies, make_generator(0), strategy=name, siamese=True).unique(dim=0)) == 1


def test_generators_in_the_same_state_choose_the_same_operation_and_stay_in_step():
    real, synthetic = draw(256, dtype=torch.float32), draw(10, dtype=torch.float32)
    found = set()
    for mode, seed in itertools.product(("single", "multiple"), range(30)):
        one, other = make_generator(seed), make_generator(seed)
        a, b = (dsa(x, g, mode=mode, siamese=True) for x, g in ((real, one), (synthetic, other)))
        torch.testing.assert_close(a[:10], b, rtol=1e-5, atol=1e-5)  # the first ten images are the same
        assert one.get_state().equal(other.get_state())
        found.add(float(b.sum()))
    assert len(found) > 20, "draws differ from seed to seed"


@ANY_OPERATION
def test_gradcheck(name):
    images = draw(2, size=5)[:, :, :, :4].clone().requires_grad_()

    def augmented(x):
        return dsa(x, make_generator(1), strategy=name, siamese=True, align_corners=False)

    assert gradcheck(augmented, images)


def warp(image, matrix):
    """Bilinear with zeros outside; -1 and 1 are the outer edges of the outermost pixels, which are squares."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        u, v = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
        from_x = ((matrix[0][0] * u + matrix[0][1] * v + 1) * width - 1) / 2
        from_y = ((matrix[1][0] * u + matrix[1][1] * v + 1) * height - 1) / 2
        for near_y, near_x in itertools.product(range(height), range(width)):
            weight = max(0, 1 - abs(from_y - near_y)) * max(0, 1 - abs(from_x - near_x))
            out[:, y, x] += weight * image[:, near_y, near_x]
    return out


@pytest.mark.parametrize("seed", range(3))
def test_unaligned_corners_against_a_loop_over_pixels(seed):
    image = draw(1, size=9)[0, :, :, :8]
    unaligned = functools.partial(dsa, mode="multiple", align_corners=False)  # "multiple" draws no operation
    factors = 1 / 1.2 + torch.rand(2, generator=make_generator(seed)).double() * (1.2 - 1 / 1.2)
    expected = warp(image, ((factors[0], 0), (0, factors[1])))
    got = unaligned(image[None], make_generator(seed), strategy="scale", siamese=True)[0]
    torch.testing.assert_close(got, expected)
    angle = (2 * torch.rand(1, generator=make_generator(seed)).double() - 1) * torch.pi / 12
    expected = warp(image, ((angle.cos(), -angle.sin()), (angle.sin(), angle.cos())))
    got = unaligned(image[None], make_generator(seed), strategy="rotate")[0]
    torch.testing.assert_close(got, expected)


def test_an_operation_of_two_arguments_still_serves(monkeypatch):
    monkeypatch.setitem(dsa_operations.OPERATIONS, "negative", lambda images, generator: -images)
    images = draw(2)
    assert dsa(images, make_generator(0), strategy="negative", align_corners=False).equal(-images)
