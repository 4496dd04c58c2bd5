"""Decoders: what they store, their gradients, and the sets that are learned through them."""

import copy
from dataclasses import asdict, dataclass

import pytest
import torch
from fits import SMALL, Losses, make_trainer, small_data

from ftd_lightning import SyntheticSet, TrajectoryMatching
from ftd_lightning.callbacks import SyntheticEMA
from ftd_lightning.contracts import ImageShape
from ftd_lightning.decoders import Bases, Decoder, Flip, Frequencies, Gaussians, Generator, MultiFormation, Pyramid
from ftd_lightning.errors import InputError
from ftd_lightning.functional import unroll
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import BilevelDistillation, DistributionMatching, GradientMatching

SHAPE = ImageShape(2, 3, [8, 12])  # 192 numbers an image
KINDS = [MultiFormation(2), Flip(), Bases(4, 2), Frequencies(24), Gaussians(6, fit_steps=50)]
GENERATORS = [Generator(4, 5, 4), Generator(4, 5, 4, learn_noise=False, seed=1)]
LINEAR = [MultiFormation(2), Flip(), Frequencies(24)]


def images_of(decoder: Decoder, shape: ImageShape = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images of each class, as many as the decoder makes, float64."""
    count = decoder.images_per_class(1, shape)
    labels = torch.arange(shape.num_classes).repeat_interleave(count)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(len(labels), shape.in_channels, 2, 3, generator=generator, dtype=torch.float64)
    size = tuple(shape.zeros(1).shape[2:])
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear"), labels


@dataclass
class Named(Decoder):
    """Stores plain images under a name."""

    of: str
    name = "named"

    def images_per_class(self, ipc, shape):
        return ipc

    def begin(self, images):
        return {self.of: images}

    def decode(self, parameters, index=None):
        return parameters[self.of] if index is None else parameters[self.of][index]


def fitted(kind: Decoder) -> Decoder:
    decoder = copy.deepcopy(kind)
    decoder.fit(*images_of(decoder))
    return decoder


def leaves(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {
        name: value.clone().requires_grad_(value.is_floating_point()) for name, value in decoder.parameters().items()
    }


@pytest.mark.parametrize(
    ("kind", "count", "numbers", "positions"),
    [
        (MultiFormation(2), 4, 576, 0),
        (Flip(), 2, 576, 0),
        (Bases(4, 2), 32, 3 * 32 * 4 + 4 * 2 * 4 * 6, 0),
        (Frequencies(24), 4, 3 * 4 * 2 * 24, 3 * 24),
        (Gaussians(6), 4, 3 * 4 * 6 * 8, 0),
    ],
)
def test_what_is_stored_is_what_one_plain_image_of_each_class_takes(kind, count, numbers, positions):
    assert kind.images_per_class(1, SHAPE) == count
    decoder = fitted(kind)
    assert decoder.numbers() == numbers <= 3 * 2 * 8 * 12
    assert decoder.bytes() == 4 * numbers + 2 * positions  # float32 and int16
    assert decoder.decode(decoder.parameters()).shape == (3 * count, 2, 8, 12)
    assert decoder.labels().bincount().tolist() == [count] * 3


def test_of_cifar_10_as_published():
    shape = ImageShape(3, 10, 32)
    assert Bases(16, 2).images_per_class(1, shape) == 115
    assert Frequencies(64).images_per_class(1, shape) == 16
    assert MultiFormation(2).images_per_class(10, shape) == 40


@pytest.mark.parametrize("kind", [*KINDS, Pyramid(), *GENERATORS])
def test_an_index_decodes_some_images_and_any_device_dtype_is_kept(kind):
    decoder = fitted(kind)
    whole = decoder.decode(decoder.parameters())
    index = torch.tensor([4, 1, 1]) % len(whole)
    torch.testing.assert_close(decoder.decode(decoder.parameters(), index), whole[index], rtol=0, atol=1e-14)
    assert whole.dtype == torch.float64
    assert torch.equal(decoder.labels(index), decoder.labels()[index])


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_counts_its_weights_and_the_noise_that_it_learns(kind):
    decoder = fitted(kind)
    weights = (5 + 3) * 64 + 64 * 8 * 2 * 3 + 8 * 4 * 9 + 4 * 2 * 9 + 2  # linear twice, convolutions twice, a bias
    assert decoder.numbers() == weights + 2 * (64 + 8 * 2 * 3 + 4) + kind.learn_noise * 12 * 5
    assert kind.images_per_class(1, SHAPE) == kind.images_per_class(50, SHAPE) == 4
    images = decoder.decode(decoder.parameters())
    assert images.shape == (12, 2, 8, 12)
    assert 1 < float(images.abs().max()) < 2
    first = images.unflatten(0, (3, 4))[:, 0]
    assert float((first - first.mean(0)).abs().max()) > 0.1, "classes differ"
    other, again = (fitted(type(kind)(4, 5, 4, kind.learn_noise, seed)) for seed in (2, kind.seed))
    assert torch.equal(again.decode(again.parameters()), images)
    assert not torch.allclose(other.decode(other.parameters()), images)
    alone = copy.deepcopy(kind)  # as from a file
    alone.restore(decoder.shape, decoder.labels(), decoder.parameters())
    assert torch.equal(alone.decode(decoder.parameters()), images)
    with pytest.raises(InputError, match="multiples of 4 px, not of 6"):
        kind.images_per_class(1, ImageShape(1, 3, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_close_to_real_images(kind):
    decoder, (images, _) = fitted(kind), images_of(kind)
    close = decoder.decode(decoder.parameters())
    if isinstance(kind, Flip):
        images, close = images.unflatten(0, (3, 2, -1))[:, 0], close.unflatten(0, (3, 2, -1))[:, 0]
    explained = 1 - float((close - images).square().mean() / images.square().mean())
    assert explained > {Bases: 0.3, Gaussians: 0.3}.get(type(kind), 0.8)


@pytest.mark.parametrize("kind", LINEAR)
def test_the_gradient_of_a_linear_decoder_is_its_transpose(kind):
    decoder = fitted(kind)
    x = leaves(decoder)
    learned = [value for value in x.values() if value.requires_grad]
    y = torch.randn_like(decoder.decode(x))
    (back,) = torch.autograd.grad(decoder.decode(x), learned, y)
    torch.testing.assert_close((decoder.decode(x) * y).sum(), (learned[0] * back).sum(), rtol=1e-12, atol=0)


def test_a_pyramid_begins_with_the_images_in_levels_down_to_one_pixel():
    pyramid, (images, _) = fitted(Pyramid()), images_of(Pyramid())
    sizes = [tuple(level.shape[2:]) for level in pyramid.parameters().values()]
    assert sizes == [(1, 1), (1, 2), (2, 3), (4, 6), (8, 12)]
    assert pyramid.numbers() == 3 * 2 * sum(height * width for height, width in sizes)
    levels = pyramid.parameters()
    torch.testing.assert_close(pyramid.decode(levels), images, rtol=0, atol=1e-14)
    assert torch.equal(pyramid.decode(dict(reversed(levels.items()))), pyramid.decode(levels))
    one = levels["level_0"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(pyramid.decode({**levels, "level_0": one})[0].sum(), one)
    assert slope[0].flatten().tolist() == pytest.approx([8 * 12] * 2), "the smallest level moves all pixels"


def test_identities():
    plain = MultiFormation(1)
    images, labels = images_of(plain)
    for decoder in (plain, Frequencies(8 * 12)):
        decoder.fit(images, labels)
        torch.testing.assert_close(decoder.decode(decoder.parameters()), images, rtol=0, atol=1e-12)
    bases = Bases(len(images), 1)
    bases.restore((2, 8, 12), labels, {})
    given = {"coefficients": torch.eye(len(images), dtype=torch.float64), "bases": images.flatten(1)}
    assert torch.equal(bases.decode(given), images)


@pytest.mark.parametrize("kind", [*KINDS, Pyramid(), *GENERATORS])
@pytest.mark.parametrize("steps", [3])
def test_the_gradient_through_training_is_that_of_the_graph_and_of_differences(kind, steps):
    torch.manual_seed(0)
    decoder, network = fitted(kind), ConvNet(2, 3, [8, 12], **SMALL).double()
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    batches = [torch.arange(step, len(decoder.labels()), 2) for step in range(steps)]
    target = start + 0.01

    def loss(x, method="adjoint"):
        given = (network, start, decoder.decode(x), decoder.labels(), torch.tensor(0.1, dtype=torch.float64))
        return (unroll(*given, batches=batches, method=method) - target).square().sum()

    x = leaves(decoder)
    learned = {name: value for name, value in x.items() if value.requires_grad}
    adjoint, graph = (torch.autograd.grad(loss(x, method), list(learned.values())) for method in ("adjoint", "graph"))
    for name, ours, theirs in zip(learned, adjoint, graph, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))
        way = torch.randn_like(ours)
        with torch.no_grad():
            there, back = (loss({**x, name: x[name] + sign * 1e-7 * way}) for sign in (1, -1))
        slope = float((ours * way).sum())
        assert float(there - back) / 2e-7 == pytest.approx(slope, rel=1e-4, abs=1e-7)


def module_of(kind: type, trajectories, **options):
    """A method of few steps, with a decoder."""
    common = {"network_options": SMALL, "iterations_per_epoch": 2}
    if kind is TrajectoryMatching:
        steps = {"syn_steps": 2, "expert_epochs": 1, "max_start_epoch": 3, "lr_images": 10.0, "iterations_per_epoch": 2}
        return TrajectoryMatching(str(trajectories), **{**steps, **options})
    if kind is BilevelDistillation:
        return BilevelDistillation(**common, syn_steps=2, clip=2.0, batch_real=20, **options)
    return kind(**common, batch_real=4, **options)


@pytest.mark.parametrize("method", [TrajectoryMatching, BilevelDistillation, DistributionMatching, GradientMatching])
def test_every_method_learns_through_a_decoder(method, trajectories, tmp_path):
    seen = Losses()
    module = module_of(method, trajectories, decoder=MultiFormation(2))
    make_trainer(tmp_path, max_steps=2, callbacks=[seen]).fit(module, datamodule=small_data())
    assert not torch.equal(*seen.images)
    made = SyntheticSet.load(tmp_path / "set.safetensors")
    assert made.images.shape == (40, 1, 8, 8)
    assert made.labels.tolist() == [label for label in range(10) for _ in range(4)]
    assert (made.image_counts, made.metadata["numbers_stored"], made.metadata["bytes_stored"]) == ((10, 40), 640, 2560)
    assert made.metadata["method"].endswith("+multi-formation")
    assert made.metadata["decoder"]["init_args"] == {"factor": 2}
    decoder = MultiFormation(**made.metadata["decoder"]["init_args"])
    decoder.restore(tuple(made.images.shape[1:]), made.labels, made.codes)
    assert torch.equal(decoder.decode(made.codes), made.images), "the parameters alone give the images"


@pytest.mark.parametrize("method", [TrajectoryMatching, BilevelDistillation])
def test_an_iteration_decodes_the_images_of_its_mini_batches_alone(method, trajectories, tmp_path, monkeypatch):
    decode, decoded = MultiFormation.decode, []

    def counted(decoder, parameters, index=None):
        if torch.is_grad_enabled():
            decoded.append(40 if index is None else len(index))
        return decode(decoder, parameters, index)

    def learned(folder):
        module = module_of(method, trajectories, decoder=MultiFormation(2), syn_batch=10)
        make_trainer(tmp_path / folder, max_steps=2).fit(module, datamodule=small_data())
        return module.synthetic_set().images

    monkeypatch.setattr(MultiFormation, "decode", counted)
    few = learned("few")
    monkeypatch.setattr(method, "used_images", lambda module, batch: None)
    torch.testing.assert_close(learned("all"), few, rtol=0, atol=1e-6)
    assert decoded == [20, 20, 40, 40], "of 2 inner steps"


@pytest.mark.parametrize("kind", [Frequencies(16), Bases(5, 2), Generator(4, 5, 4)])
def test_a_resumed_fit_is_exact_and_a_checkpoint_loads_alone(kind, trajectories, tmp_path):
    def fit(folder, steps, **given):
        module = module_of(TrajectoryMatching, trajectories, decoder=copy.deepcopy(kind), lr_images=1.0)
        trainer = make_trainer(tmp_path / folder, max_steps=steps, callbacks=[SyntheticEMA(0.5)])
        trainer.fit(module, datamodule=small_data(), **given)
        trainer.save_checkpoint(tmp_path / folder / "saved.ckpt")
        return module.synthetic_set()

    whole, half = fit("whole", 4), fit("half", 2)
    resumed = fit("half", 4, ckpt_path=tmp_path / "half" / "saved.ckpt")
    assert not torch.equal(whole.images, half.images)
    for name in ("images", "ema_images"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    loaded = TrajectoryMatching.load_from_checkpoint(tmp_path / "half" / "saved.ckpt").synthetic_set()
    assert torch.equal(loaded.images, whole.images)
    assert loaded.metadata["decoder"] == whole.metadata["decoder"]


def test_the_average_is_one_of_parameters(trajectories, tmp_path):
    """Of bases and coefficients, whose product is another than the average of images."""
    paths = []

    class Path(SyntheticEMA):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            super().on_train_batch_end(trainer, pl_module, *rest)
            paths.append({name: value.detach().clone() for name, value in pl_module.codes.items()})

    module = module_of(TrajectoryMatching, trajectories, decoder=Bases(5, 2), lr_images=1.0)
    make_trainer(tmp_path, max_steps=1, callbacks=[Path(0.5)]).fit(module, datamodule=small_data())
    start = module.decoder.parameters()
    average = {name: (start[name] + paths[0][name]) / 2 for name in start}
    torch.testing.assert_close(module.ema_images, module.decoder.decode(average))
    assert not torch.allclose(module.ema_images, (module.decoder.decode(start) + module.images) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("decoder", "options", "said"),
    [
        (MultiFormation(3), {}, "factor=3 does not divide 8 px"),
        (Bases(200, 1), {}, "too few for one Bases image: lower bases"),
        (Bases(4, 2), {}, "begins with 14 real images of each class, and one has 13; give init='noise'"),
        (Frequencies(65), {}, "kept=65 is more than the 64 frequencies of an image"),
        (Gaussians(22), {}, "too few for one Gaussians image: lower gaussians"),
        (MultiFormation(2), {"ipc": [1] * 10}, "decoder: give one ipc for all classes"),
        ({"class_path": "ftd_lightning.decoders.Gone"}, {}, "is no Decoder: choose from Bases"),
        ({"class_path": "mine.Flip"}, {}, "'mine.Flip' is no Decoder"),
        ("Flip", {}, "'Flip' is no Decoder: give an object"),
        (Flip, {}, "is no Decoder: give an object"),
        (Named("values"), {}, "Named cannot have a parameter 'values'"),
        (Named("a.b"), {}, "Named cannot have a parameter 'a.b'"),
    ],
)
def test_bad_input_is_one_line(decoder, options, said, trajectories, tmp_path):
    with pytest.raises(InputError) as error:
        make_trainer(tmp_path, max_steps=1).fit(
            module_of(TrajectoryMatching, trajectories, decoder=decoder, **options), datamodule=small_data()
        )
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parameter_may_have_the_name_of_another_learned_tensor(trajectories, tmp_path):
    module = module_of(TrajectoryMatching, trajectories, decoder=Named("step_size"), lr_step_size=1e-3)
    seen = Losses()
    make_trainer(tmp_path, max_steps=2, callbacks=[seen]).fit(module, datamodule=small_data())
    assert not torch.equal(*seen.images)
    assert module.learned().keys() == {"codes.step_size", "step_size"}


@pytest.mark.parametrize(("decoder", "init", "count"), [(Generator(20, 5, 4), "real", 20), (Bases(4, 2), "noise", 14)])
def test_more_images_than_there_are_real_ones(decoder, init, count, trajectories, tmp_path):
    module = module_of(BilevelDistillation, trajectories, decoder=decoder, init=init)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=small_data())
    assert module.synthetic_set().labels.tolist() == [label for label in range(10) for _ in range(count)]


def test_of_one_image_the_largest_frequencies_are_kept():
    decoder, images = Frequencies(24), images_of(Frequencies(24))[0][::4]
    decoder.fit(images, torch.arange(3))
    whole = Frequencies(96)
    whole.fit(images, torch.arange(3))
    of_class = whole.parameters()["coefficients"].mean(1).square()
    positions = decoder.parameters()["positions"].long()
    assert torch.equal(of_class.gather(1, positions).sort().values, of_class.topk(24).values.flip(1))


def test_bases_beyond_the_number_of_images_learn():
    decoder = Bases(20, 1)
    decoder.fit(torch.randn(3, 2, 8, 12, dtype=torch.float64), torch.arange(3))
    x = leaves(decoder)
    decoder.decode(x).square().sum().backward()
    assert bool((x["coefficients"].grad.abs().sum(0) > 0).all())


def test_gaussians_learn_by_adam_with_every_method(trajectories, tmp_path):
    for method in (DistributionMatching, GradientMatching):
        module = module_of(method, trajectories, decoder=Gaussians(3, fit_steps=1), momentum=None, lr_images=0.01)
        make_trainer(tmp_path / method.__name__, max_steps=1).fit(module, datamodule=small_data())
        assert isinstance(module.trainer.optimizers[0], torch.optim.Adam)


def test_a_set_of_float64_is_what_its_file_holds(trajectories, tmp_path):
    module = module_of(TrajectoryMatching, trajectories, decoder=MultiFormation(2))
    make_trainer(tmp_path, max_steps=1, precision="64-true").fit(module, datamodule=small_data())
    made, kept = module.synthetic_set(), SyntheticSet.load(tmp_path / "set.safetensors")
    assert (made.codes["images"].dtype, made.metadata["bytes_stored"]) == (torch.float32, 2560)
    assert torch.equal(made.images, kept.images)
    assert torch.equal(made.codes["images"], kept.codes["images"])


def test_options_are_checked():
    with pytest.raises(InputError, match="factor=0 must be at least 1"):
        MultiFormation(0)
    assert asdict(Gaussians(3)) == {"gaussians": 3, "fit_steps": 300}
