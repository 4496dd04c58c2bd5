"""DSA: every operation against a loop over images and pixels, and what a differentiable augmentation must keep."""

import functools
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from ftd_lightning.functional import Augmentation, augment, dsa, make_generator
from ftd_lightning.functional import augment as dsa_operations

OPERATIONS = ["color", "crop", "cutout", "flip", "scale", "rotate"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ANY_OPERATION = pytest.mark.parametrize("name", OPERATIONS)


def batch(seed=0, shape=(5, 3, 8, 9), dtype=torch.float64):
    """Values well outside of [0, 1], as normalised images have; 8 and 9 px, an even and an odd cutout."""
    return 2 * torch.randn(shape, generator=make_generator(seed, "images"), dtype=dtype)


# References: one image, one pixel at a time, with the draws in the order that the operations promise to keep.


def flip_reference(images, generator):
    u = torch.rand(len(images), 1, 1, 1, generator=generator).flatten()
    out = images.clone()
    for n, y, x in pixels(images):
        if u[n] < 0.5:
            out[n, :, y, x] = images[n, :, y, images.shape[3] - 1 - x]
    return out


def crop_reference(images, generator):
    count, _, height, width = images.shape
    reach = [int(size * 0.125 + 0.5) for size in (height, width)]
    shift_y, shift_x = (
        torch.randint(0, 2 * r + 1, (2, count), generator=generator)[i] - r for i, r in enumerate(reach)
    )
    out = torch.zeros_like(images)
    for n, y, x in pixels(images):
        from_y, from_x = y + int(shift_y[n]), x + int(shift_x[n])
        if 0 <= from_y < height and 0 <= from_x < width:
            out[n, :, y, x] = images[n, :, from_y, from_x]
    return out


def cutout_reference(images, generator):
    count, _, *sizes = images.shape
    sides = [int(size * 0.5 + 0.5) for size in sizes]
    centres = [
        torch.randint(0, size + 1 - side % 2, (2, count), generator=generator)[axis]
        for axis, (size, side) in enumerate(zip(sizes, sides, strict=True))
    ]
    out = images.clone()
    for n in range(count):
        tops = [int(centre[n]) - side // 2 for centre, side in zip(centres, sides, strict=True)]
        for y, x in itertools.product(*(range(top, top + side) for top, side in zip(tops, sides, strict=True))):
            if 0 <= y < sizes[0] and 0 <= x < sizes[1]:
                out[n, :, y, x] = 0
    return out


def color_reference(images, generator):
    brightness, saturation, contrast = (
        torch.rand(len(images), 1, 1, 1, generator=generator).flatten().double() for _ in range(3)
    )
    out = images.clone()
    for n, y, x in pixels(images):
        pixel = out[n, :, y, x] + (brightness[n] - 0.5)
        grey = sum(pixel) / len(pixel)
        out[n, :, y, x] = (pixel - grey) * 2 * saturation[n] + grey
    for n, image in enumerate(out):
        mean = sum(image.flatten()) / image.numel()
        out[n] = (image - mean) * (contrast[n] + 0.5) + mean
    return out


def scale_reference(images, generator):
    u = torch.rand(len(images), 2, generator=generator).double()
    factors = 1 / 1.2 + u * (1.2 - 1 / 1.2)
    return torch.stack([warp(i, ((f[0], 0.0), (0.0, f[1]))) for i, f in zip(images, factors, strict=True)])


def rotate_reference(images, generator):
    angles = [math.radians(15 * (2 * u - 1)) for u in torch.rand(len(images), generator=generator).tolist()]
    turns = [((math.cos(a), -math.sin(a)), (math.sin(a), math.cos(a))) for a in angles]
    return torch.stack([warp(image, turn) for image, turn in zip(images, turns, strict=True)])


def warp(image, matrix):
    """Bilinear with zeros outside; the matrix maps distances from the centre, in pixels."""
    _, height, width = image.shape
    out, centre = torch.zeros_like(image), ((height - 1) / 2, (width - 1) / 2)
    for y, x in itertools.product(range(height), range(width)):
        u, v = x - centre[1], y - centre[0]
        from_x = matrix[0][0] * u + matrix[0][1] * v + centre[1]
        from_y = matrix[1][0] * u + matrix[1][1] * v + centre[0]
        for near_y, near_x in itertools.product(*((math.floor(c), math.floor(c) + 1) for c in (from_y, from_x))):
            if 0 <= near_y < height and 0 <= near_x < width:
                weight = (1 - abs(from_y - near_y)) * (1 - abs(from_x - near_x))
                out[:, y, x] += weight * image[:, near_y, near_x]
    return out


def pixels(images):
    return itertools.product(range(len(images)), range(images.shape[2]), range(images.shape[3]))


REFERENCES = {name: globals()[f"{name}_reference"] for name in OPERATIONS}


@ANY_OPERATION
def test_operation_equals_a_loop_over_pixels(name):
    seed = 1
    images = batch(seed)
    result = dsa_operations.OPERATIONS[name](images, make_generator(seed))
    torch.testing.assert_close(result, REFERENCES[name](images, make_generator(seed)), rtol=1e-9, atol=1e-9)
    assert not result.equal(images)


@ANY_OPERATION
def test_gradient_in_the_images(name):
    images = batch(shape=(2, 3, 4, 5)).requires_grad_()
    assert gradcheck(lambda x: dsa_operations.OPERATIONS[name](x, make_generator(4)), (images,))


def test_multiple_applies_the_operations_in_the_strategys_order():
    images = batch()
    for strategy in (augment.STRATEGY, "flip_crop", "crop_flip", ""):
        generator, expected = make_generator(1), images
        for name in filter(None, strategy.split("_")):
            expected = dsa_operations.OPERATIONS[name](expected, generator)
        assert dsa(images, make_generator(1), strategy=strategy, mode="multiple").equal(expected)


def test_single_draws_one_operation_for_the_batch_before_its_parameters():
    images, drawn = batch(), set()
    for seed in range(30):
        generator = make_generator(seed)
        name = OPERATIONS[int(torch.randint(6, (1,), generator=generator))]
        assert dsa(images, make_generator(seed)).equal(dsa_operations.OPERATIONS[name](images, generator))
        drawn.add(name)
    assert drawn == set(OPERATIONS)


def test_pure_function_of_images_and_generator():
    images = batch()
    original, state = images.clone(), torch.get_rng_state()
    for strategy in (augment.STRATEGY, *OPERATIONS, ""):
        first, second = (dsa(images, make_generator(2), strategy=strategy, mode="multiple") for _ in range(2))
        assert first.equal(second)
        if strategy:
            first.fill_(9.0)  # the result is the caller's: writing into it must not reach the input
    assert images.equal(original)
    assert torch.get_rng_state().equal(state)


@ANY_OPERATION
def test_lower_precision_sees_the_same_augmentation_and_keeps_shape_and_dtype(name):
    images = batch(shape=(4, 3, 32, 16)).bfloat16()
    double, single, half = (dsa(images.to(t), make_generator(0), strategy=name) for t in DTYPES)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    assert half.equal(single.bfloat16())
    assert half.shape == images.shape


# The settings in one object.


def test_augmentation_is_dsa_with_its_settings():
    images = batch()
    settings = {"strategy": "scale_rotate", "mode": "multiple", "align_corners": False}
    for siamese in (False, True):
        expected = dsa(images, make_generator(1), **settings, siamese=siamese)
        assert Augmentation(**settings)(images, make_generator(1), siamese=siamese).equal(expected)
    assert Augmentation()(images, make_generator(1)).equal(dsa(images, make_generator(1)))
    assert Augmentation("")(images, make_generator(1)).equal(images)


def test_augmentation_from_plain_values_and_back():
    unaligned = Augmentation("crop", "multiple", align_corners=False)
    for value in ({"strategy": "crop", "mode": "multiple"}, unaligned, unaligned.plain(), unaligned.describe()):
        assert Augmentation.of(value, align_corners=False) == unaligned
    assert Augmentation.of("flip", align_corners=False) == Augmentation("flip", align_corners=False)
    assert unaligned.describe() == {"strategy": "crop", "mode": "multiple", "align_corners": False}
    assert Augmentation("crop").describe() == {"strategy": "crop", "mode": "single"}, "as in all stores and sets"


def test_only_sampling_on_cuda_is_not_deterministic():
    cuda = torch.device("cuda", 0)
    deterministic = {name for name in OPERATIONS if Augmentation(f"flip_{name}").deterministic_on(cuda)}
    assert deterministic == {"color", "crop", "cutout", "flip"}
    assert Augmentation().deterministic_on(torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("flip_zoom", ["'zoom'", "rotate"]),
        ({"strategy": "flip", "mode": "all"}, ["'all'", "multiple"]),
        ({"stratgy": "flip"}, ["'stratgy'", "strategy", "align_corners"]),
        (None, ["augment=None", "strategy"]),
        (True, ["augment=True", "strategy"]),
    ],
    ids=str,
)
def test_augmentations_that_do_not_exist_are_refused(value, parts, refused):
    with refused(*parts):
        Augmentation.of(value)


def test_images_of_version_0_1_come_out_again():
    """Sums recorded with version 0.1.0, whose teachers and sets a seed must keep giving."""
    recorded = {
        "color": -1.530678681691485,
        "crop": -0.6073932199946408,
        "cutout": 0.4983082779712693,
        "flip": -0.2252463997454195,
        "scale": 0.7803148721454949,
        "rotate": 1.417389839850368,
        augment.STRATEGY: -0.8245847201174743,
    }
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8).div(100).sin()
    weights = torch.arange(images.numel(), dtype=torch.float64).view(images.shape).cos()
    sums = {
        name: float((weights * dsa(images, make_generator(0), strategy=name, mode="multiple")).sum())
        for name in recorded
    }
    assert sums == pytest.approx(recorded, rel=1e-9)


# Siamese: one operation and one set of parameters for a batch, whatever its size.


def draw(count, size=12, dtype=torch.float64):
    return torch.randn(count, 3, size, size, generator=make_generator("images"), dtype=dtype)


@ANY_OPERATION
def test_every_image_is_augmented_as_it_would_be_alone(name):
    """A batch of one is the same with parameters of its own, which other tests compare with loops over pixels."""
    copies = draw(1).expand(32, -1, -1, -1)
    assert len(dsa(copies, make_generator(0), strategy=name).unique(dim=0)) > 1
    assert len(dsa(copies, make_generator(0), strategy=name, siamese=True).unique(dim=0)) == 1
    images = draw(7)
    for seed in range(2):
        options = {"strategy": name, "align_corners": seed % 2 == 0}
        together = dsa(images, make_generator(seed), siamese=True, **options)
        alone = [dsa(image[None], make_generator(seed), **options) for image in images]
        torch.testing.assert_close(together, torch.cat(alone))


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


def test_unaligned_corners_against_a_loop_over_pixels():
    seed = 2
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


@pytest.mark.parametrize("align_corners", [True, False])
def test_quarter_turn_of_a_rectangle(align_corners):
    """In pixels: the middle square turns, and the sides come from outside of the image."""
    images, seed = batch(shape=(1, 3, 5, 9)), 3
    (u,) = torch.rand(1, generator=make_generator(seed)).double().tolist()
    got = dsa_operations.rotate(images, make_generator(seed), degrees=90 / (2 * u - 1), align_corners=align_corners)
    torch.testing.assert_close(got[..., 2:7], images[..., 2:7].rot90(dims=(2, 3)))
    torch.testing.assert_close(got[..., [0, 1, 7, 8]], torch.zeros(1, 3, 5, 4, dtype=torch.float64))
