"""DSA: every operation against a loop over images and pixels, and what a differentiable augmentation must keep."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradcheck

from ftd_lightning.functional import Augmentation, augment, dsa, make_generator
from ftd_lightning.functional import augment as dsa_operations

OPERATIONS = ["color", "crop", "cutout", "flip", "scale", "rotate"]
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
    """Bilinear with zeros outside; coordinates run from -1 to 1 between the centres of the outermost pixels."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        u, v = 2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1
        from_x = (matrix[0][0] * u + matrix[0][1] * v + 1) * (width - 1) / 2
        from_y = (matrix[1][0] * u + matrix[1][1] * v + 1) * (height - 1) / 2
        for near_y, near_x in itertools.product(*((math.floor(c), math.floor(c) + 1) for c in (from_y, from_x))):
            if 0 <= near_y < height and 0 <= near_x < width:
                weight = (1 - abs(from_y - near_y)) * (1 - abs(from_x - near_x))
                out[:, y, x] += weight * image[:, near_y, near_x]
    return out


def pixels(images):
    return itertools.product(range(len(images)), range(images.shape[2]), range(images.shape[3]))


REFERENCES = {name: globals()[f"{name}_reference"] for name in OPERATIONS}


@pytest.mark.parametrize("seed", [0, 1])
@ANY_OPERATION
def test_operation_equals_a_loop_over_pixels(name, seed):
    images = batch(seed)
    result = dsa_operations.OPERATIONS[name](images, make_generator(seed))
    torch.testing.assert_close(result, REFERENCES[name](images, make_generator(seed)), rtol=1e-9, atol=1e-9)
    assert not result.equal(images)


def test_the_strategy_names_every_operation():
    assert augment.STRATEGY.split("_") == list(dsa_operations.OPERATIONS) == OPERATIONS


def test_multiple_applies_all_operations_in_order():
    images, generator = batch(), make_generator(3)
    expected = images
    for name in OPERATIONS:
        expected = REFERENCES[name](expected, generator)
    torch.testing.assert_close(dsa(images, make_generator(3), mode="multiple"), expected, rtol=1e-9, atol=1e-9)


def test_the_strategy_decides_operations_and_order():
    images = batch()
    for strategy in ("flip_crop", "crop_flip", "scale_cutout"):
        generator, expected = make_generator(1), images
        for name in strategy.split("_"):
            expected = dsa_operations.OPERATIONS[name](expected, generator)
        assert dsa(images, make_generator(1), strategy=strategy, mode="multiple").equal(expected)
    assert dsa(images, make_generator(1), strategy="").equal(images)


def test_single_applies_one_operation_to_the_whole_batch_and_each_in_its_turn(monkeypatch):
    calls = []

    def tag(name):
        return lambda images, generator: calls.append((name, len(images))) or images

    for name in OPERATIONS:
        monkeypatch.setitem(dsa_operations.OPERATIONS, name, tag(name))
    draws, generator, images = 1200, make_generator(0), batch()
    for _ in range(draws):
        dsa(images, generator)
    assert len(calls) == draws
    assert {count for _, count in calls} == {len(images)}
    # Each of the six is binomial with mean 200 and standard deviation 12.9; five of those are allowed.
    counts = {name: sum(call == name for call, _ in calls) for name in OPERATIONS}
    assert all(abs(count - draws / 6) < 65 for count in counts.values()), counts


def test_single_draws_its_operation_before_its_parameters():
    images = batch()
    for seed in range(5):
        generator = make_generator(seed)
        name = OPERATIONS[int(torch.randint(6, (1,), generator=generator))]
        assert dsa(images, make_generator(seed)).equal(dsa_operations.OPERATIONS[name](images, generator))


@pytest.mark.parametrize("mode", ["single", "multiple"])
def test_pure_function_of_images_and_generator(mode):
    images = batch()
    original, state = images.clone(), torch.get_rng_state()
    for seed in range(12):
        first, second = (dsa(images, make_generator(seed), mode=mode) for _ in range(2))
        assert first.equal(second)
        first.fill_(9.0)  # the result is the caller's: writing into it must not reach the input
    assert images.equal(original)
    assert torch.get_rng_state().equal(state)
    assert len({float(dsa(images, make_generator(seed), mode="multiple").sum()) for seed in range(12)}) == 12


@ANY_OPERATION
def test_every_image_has_parameters_of_its_own(name):
    images = batch(shape=(1, 3, 16, 16)).expand(16, -1, -1, -1)
    result = dsa_operations.OPERATIONS[name](images, make_generator(0))
    distinct = {tuple(image.flatten().tolist()) for image in result}
    assert len(distinct) == 2 if name == "flip" else len(distinct) > 10


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 3, 8, 8), torch.bfloat16), ((1, 1, 5, 7), torch.float32), ((3, 3, 32, 16), torch.float64)],
    ids=str,
)
@ANY_OPERATION
def test_shape_and_dtype_are_kept(name, shape, dtype):
    result = dsa_operations.OPERATIONS[name](batch(shape=shape).to(dtype), make_generator(0))
    assert result.shape == shape
    assert result.dtype == dtype
    assert bool(result.isfinite().all())


@ANY_OPERATION
def test_float32_sees_the_augmentation_of_float64(name):
    for seed in range(5):
        double = dsa_operations.OPERATIONS[name](batch(), make_generator(seed))
        single = dsa_operations.OPERATIONS[name](batch().float(), make_generator(seed))
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@ANY_OPERATION
def test_gradient_in_the_images(name):
    images = batch(shape=(2, 3, 4, 5)).requires_grad_()
    assert gradcheck(lambda x: dsa_operations.OPERATIONS[name](x, make_generator(4)), (images,))


def test_gradient_through_all_operations():
    images = batch(shape=(2, 2, 4, 4)).requires_grad_()
    assert gradcheck(lambda x: dsa(x, make_generator(2), mode="multiple"), (images,))


def test_nothing_is_clamped():
    """Saturation and contrast keep the sum over an image, so the sum's gradient is brightness's: 1 at every pixel."""
    images = (10 * batch()).requires_grad_()
    for seed in range(5):
        result = dsa_operations.color(images, make_generator(seed))
        gradient = torch.autograd.grad(result.sum(), images)[0]
        torch.testing.assert_close(gradient, torch.ones_like(gradient))
    assert bool((images < -10).any() & (images > 10).any())


def test_brightness_saturation_and_contrast_ranges():
    count = 4000
    # Grey images with two values: saturation leaves them, brightness moves their mean, contrast scales their spread.
    grey = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(count, 3, 1, 2)
    out = dsa_operations.color(grey, make_generator(0))
    brightness, contrast = out.mean(dim=(1, 2, 3)), (out[:, 0, 0, 1] - out[:, 0, 0, 0]) / 2
    # One pixel with colours of mean 0 and spread 1: contrast times saturation, contrast known from the same draws.
    colored = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1).expand(count, 3, 1, 1)
    out = dsa_operations.color(colored, make_generator(0))
    saturation = (out[:, 2, 0, 0] - out[:, 0, 0, 0]) / 2 / contrast
    for values, low, high in ((brightness, -0.5, 0.5), (saturation, 0.0, 2.0), (contrast, 0.5, 1.5)):
        assert_uniform(values, low, high)


def assert_uniform(values, low, high):
    """Inside the range, and a mean and a variance that a uniform draw has, within five standard errors."""
    tolerance = 1e-6 * (high - low)
    assert float(values.min()) >= low - tolerance
    assert float(values.max()) <= high + tolerance
    width, count = high - low, len(values)
    assert abs(float(values.mean()) - (low + high) / 2) < 5 * width / math.sqrt(12 * count)
    # The fourth central moment of a uniform draw is width^4 / 80: the variance's error is width^2 / sqrt(180 n).
    assert abs(float(values.var()) - width**2 / 12) < 5 * width**2 / math.sqrt(180 * count)


def test_crop_shifts_by_whole_pixels_within_its_reach():
    """Where one bright pixel in the middle goes tells each image's shift: 12 px reach 2, 20 px reach 3."""
    count = 2000
    images = torch.zeros(count, 1, 12, 20)
    images[:, 0, 6, 10] = 1
    found = dsa_operations.crop(images, make_generator(0)).nonzero()
    assert found[:, 0].equal(torch.arange(count)), "one pixel in every image"
    for shift, reach in ((found[:, 2] - 6, 2), (found[:, 3] - 10, 3)):
        assert int(shift.min()) == -reach
        assert_even((shift + reach).bincount(), 2 * reach + 1)
    # The two axes are drawn apart from each other.
    assert len({(int(y), int(x)) for _, _, y, x in found}) == 5 * 7


def assert_even(counts, places):
    assert len(counts) == places
    mean = float(counts.sum()) / places
    assert float((counts - mean).abs().max()) < 5 * math.sqrt(mean), counts


@pytest.mark.parametrize(("size", "side", "places"), [(8, 4, 9), (9, 5, 9), (32, 16, 33), (5, 3, 5), (1, 1, 1)])
def test_cutout_is_a_square_clipped_at_the_border(size, side, places):
    count = 300 * places
    out = dsa_operations.cutout(torch.ones(count, 1, size, size), make_generator(0))[:, 0]
    assert set(out.unique().tolist()) == ({0.0, 1.0} if size > 1 else {0.0})
    hole = out == 0
    rows, columns = hole.any(dim=2), hole.any(dim=1)
    assert hole.equal(rows[:, :, None] & columns[:, None, :]), "a rectangle"
    for span in (rows, columns):
        first = span.int().argmax(dim=1)
        length = span.sum(dim=1)
        last = first + length - 1
        assert all(bool(s[a : b + 1].all()) for s, a, b in zip(span[:200], first, last, strict=False)), "without gaps"
        # What is shorter than the side touches the border, and half of the side is always inside.
        clipped = length < side
        assert bool(((first == 0) | (last == size - 1))[clipped].all())
        assert int(length.max()) == side
        assert int(length.min()) == (side + 1) // 2
        # The start of the unclipped square tells its centre; it stands at every place equally often.
        start = torch.where(first == 0, last + 1 - side, first)
        assert_even((start + side // 2).bincount(), places)


def test_flip_probability():
    images = torch.tensor([1.0, 2.0]).expand(4000, 1, 1, 2)
    mirrored = dsa_operations.flip(images, make_generator(0))[:, 0, 0, 0] == 2
    assert abs(float(mirrored.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert dsa_operations.flip(images, make_generator(0), probability=0.0).equal(images)


def test_scale_and_rotation_ranges():
    """On a ramp the sampled value is the sampled coordinate; read near the centre, where nothing leaves the image."""
    count, size = 4000, 9
    ramp = torch.linspace(-1, 1, size, dtype=torch.float64)
    across = ramp.expand(count, 1, size, size)
    down = across.transpose(2, 3)
    right, below = (slice(None), 0, 4, 5), (slice(None), 0, 5, 4)  # a step of 0.25 from the centre
    factors_x = dsa_operations.scale(across, make_generator(0))[right] / 0.25
    factors_y = dsa_operations.scale(down, make_generator(0))[below] / 0.25
    assert_uniform(factors_x, 1 / 1.2, 1.2)
    assert_uniform(factors_y, 1 / 1.2, 1.2)
    assert abs(float(torch.corrcoef(torch.stack([factors_x, factors_y]))[0, 1])) < 5 / math.sqrt(count)
    sine = dsa_operations.rotate(down, make_generator(0))[right] / 0.25
    cosine = dsa_operations.rotate(across, make_generator(0))[right] / 0.25
    assert_uniform(torch.atan2(sine, cosine).rad2deg(), -15, 15)


def test_unknown_operation_is_refused():
    with pytest.raises(ValueError, match=r"DSA has no operation 'zoom': choose from .*'rotate'"):
        dsa(batch(), make_generator(0), strategy="flip_zoom")


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"DSA mode 'all' is unknown: choose from \['single', 'multiple'\]"):
        dsa(batch(), make_generator(0), mode="all")


@ANY_OPERATION
def test_bfloat16_images_see_the_augmentation_that_float32_ones_see(name):
    images = torch.randn(8, 3, 32, 32, generator=make_generator(3)).bfloat16()
    expected = dsa(images.float(), make_generator(0), strategy=name).bfloat16()
    assert torch.equal(dsa(images, make_generator(0), strategy=name), expected)


# The settings in one object.


def test_augmentation_is_dsa_with_its_settings():
    images = batch()
    settings = {"strategy": "scale_rotate", "mode": "multiple", "align_corners": False}
    for siamese in (False, True):
        expected = dsa(images, make_generator(1), **settings, siamese=siamese)
        assert Augmentation(**settings)(images, make_generator(1), siamese=siamese).equal(expected)
    assert Augmentation()(images, make_generator(1)).equal(dsa(images, make_generator(1)))
    assert Augmentation("")(images, make_generator(1)).equal(images)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("flip", Augmentation("flip", "single", align_corners=False)),
        ("", Augmentation("", "single", align_corners=False)),
        ({}, Augmentation(align_corners=False)),
        ({"mode": "multiple"}, Augmentation(mode="multiple", align_corners=False)),
        ({"strategy": "crop", "align_corners": True}, Augmentation("crop")),
        (Augmentation("crop"), Augmentation("crop")),
    ],
    ids=str,
)
def test_augmentation_of_what_configurations_contain(value, expected):
    assert Augmentation.of(value, align_corners=False) == expected
    assert Augmentation.of(expected.plain()) == expected


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


def test_descriptions_of_aligned_corners_equal_those_of_version_0_1():
    assert Augmentation("crop", "multiple").describe() == {"strategy": "crop", "mode": "multiple"}
    unaligned = Augmentation("crop", "multiple", align_corners=False)
    assert unaligned.describe() == {"strategy": "crop", "mode": "multiple", "align_corners": False}
    assert Augmentation.of(unaligned.describe()) == unaligned


def test_only_sampling_on_cuda_is_not_deterministic():
    cuda = torch.device("cuda", 0)
    deterministic = {name for name in OPERATIONS if Augmentation(f"flip_{name}").deterministic_on(cuda)}
    assert deterministic == {"color", "crop", "cutout", "flip"}
    assert Augmentation().deterministic_on(torch.device("cpu"))
    assert Augmentation("").deterministic_on(cuda)


@pytest.mark.cuda
@ANY_OPERATION
def test_deterministic_algorithms_on_cuda_refuse_what_is_said_not_to_be_deterministic(name):
    images = batch(dtype=torch.float32).cuda().requires_grad_()
    loss = Augmentation(name)(images, make_generator(0)).sum()
    deterministic = Augmentation(name).deterministic_on(images.device)
    torch.use_deterministic_algorithms(True)
    try:
        with nullcontext() if deterministic else pytest.raises(RuntimeError, match="deterministic"):
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)


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
