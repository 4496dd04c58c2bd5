"""Sets for a frozen backbone: the backbone stays as it is, its features are computed once, and probes learn the set."""

import copy
import json
import shutil

import pytest
import torch
from fits import SMALL, Losses, make_trainer, record, small_data
from torch import nn

from ftd_lightning import SyntheticEvaluation, SyntheticSet
from ftd_lightning.callbacks import EvaluateSynthetic
from ftd_lightning.core import LinearProbe
from ftd_lightning.decoders import Pyramid
from ftd_lightning.errors import InputError
from ftd_lightning.files import TrajectoryStore
from ftd_lightning.functional import embed
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import BackboneDistillation
from ftd_lightning.modules.backbone import cached_features
from ftd_lightning.shipped_configs import find_config
from ftd_lightning.studies.fits import FitNames

HALF, REST = [str(digit) for digit in range(5)], [str(digit) for digit in range(5, 10)]
CALLS = []


class Encoder(nn.Sequential):
    """Maps digits to 24 features; counts its calls."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [
                nn.Conv2d(1, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.AvgPool2d(3),
                nn.Flatten(),
                nn.Linear(24, 10),
            ]
        super().__init__(*layers)

    def forward(self, images):
        CALLS.append(len(images))
        return super().forward(images)


class Pair(Encoder):
    """Returns more than features."""

    def forward(self, images):
        return super().forward(images), images


def encoder_of(seed: int = 0) -> Encoder:
    return Encoder(seed)


def fit(module: BackboneDistillation, folder, *, steps: int = 3, data=0, **options):
    seen = Losses()
    trainer = make_trainer(folder, max_steps=steps, callbacks=[seen, *options.pop("callbacks", [])], **options)
    trainer.fit(module, datamodule=small_data() if data == 0 else data)
    return module, seen


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A teacher of half of the classes."""
    data = small_data(classes=HALF, max_per_class=None)
    return record(
        tmp_path_factory.mktemp("half"), data=data, teachers=1, epochs=10, network_options={"width": 16, "depth": 2}
    )


@pytest.mark.parametrize(("loss", "decoder"), [("ridge", Pyramid()), ("class_means", None)])
def test_a_set_of_classes_that_the_backbone_has_not_seen_is_better_than_real_images(loss, decoder, half, tmp_path):
    module = BackboneDistillation(str(half), loss=loss, decoder=decoder)
    data = {"classes": REST, "max_per_class": None}
    _, seen = fit(module, tmp_path, steps=100, data=small_data(**data))
    assert sum(seen.losses[-10:]) < 0.6 * sum(seen.losses[:10])
    found = SyntheticSet.load(tmp_path / "set.safetensors")
    assert found.class_names == REST
    assert found.metadata["method"].startswith({"ridge": "clp-dd", "class_means": "sfm"}[loss])

    def accuracy(synthetic, **options):
        probe = SyntheticEvaluation(
            "ftd_lightning.core.LinearProbe", {"backbone": str(half)}, networks=2, lr=0.5, augment="crop_scale_rotate"
        )
        trainer, given = make_trainer(tmp_path, max_epochs=200), small_data(synthetic=synthetic, **data, **options)
        trainer.fit(probe, datamodule=given)
        trainer.test(probe, datamodule=given, verbose=False)
        return sum(probe.results["each"]) / 2

    random, centroid = accuracy("random"), accuracy("herding", trajectories=str(half))
    assert accuracy(found) > max(random, centroid)


def test_the_backbone_stays_as_it_is_and_is_the_same_in_every_form(tmp_path):
    mine = Encoder().train()
    before = copy.deepcopy(mine.state_dict())
    options = {"head": "5", "copies": 2}
    one, _ = fit(BackboneDistillation(mine, **options), tmp_path / "object")
    other, _ = fit(BackboneDistillation(f"{__name__}.encoder_of", **options), tmp_path / "path")
    assert torch.equal(one.images, other.images)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert mine.training
    assert all(weight.requires_grad for weight in mine.parameters())
    third, _ = fit(BackboneDistillation(f"{__name__}.encoder_of", {"seed": 1}, **options), tmp_path / "other")
    assert not torch.equal(one.images, third.images)
    recorded = [module.synthetic_set().metadata["backbone"] for module in (one, other, third)]
    assert [entry["name"] for entry in recorded] == [f"{__name__}.Encoder", *[f"{__name__}.encoder_of"] * 2]
    fingerprints = [entry["fingerprint"] for entry in recorded]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    by_function, _ = fit(BackboneDistillation(encoder_of, {"seed": 1}, **options), tmp_path / "function")
    assert torch.equal(by_function.images, third.images)


def test_an_encoder_that_is_frozen_already_is_copied_too(tmp_path):
    mine = Encoder().eval().requires_grad_(False).bfloat16()
    fit(BackboneDistillation(mine, copies=2), tmp_path)
    assert {weight.dtype for weight in mine.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("loss", ["ridge", "class_means"])
def test_precisions_agree(loss, tmp_path):
    found = {}
    for precision in ("32-true", "64-true", "bf16-mixed"):
        module = BackboneDistillation(f"{__name__}.encoder_of", loss=loss, augment="", batch_target=60)
        _, seen = fit(module, tmp_path / precision, steps=2, precision=precision)
        found[precision] = seen.losses
    assert found["64-true"] == pytest.approx(found["32-true"], rel=1e-4)
    assert found["bf16-mixed"] == pytest.approx(found["32-true"], rel=0.1)


def test_a_store_that_was_recorded_again_is_read_again(tmp_path):
    images = torch.rand(3, 1, 8, 8)
    found, inputs, identities = [], [], []
    for seed in (0, 1):
        store = record(tmp_path, teachers=1, epochs=1, seed=seed)
        probe = {"network": "ftd_lightning.core.LinearProbe", "network_options": {"backbone": str(store)}}
        found.append(LinearProbe(1, 3, 8, str(store)).features(images))
        inputs.append(fit(BackboneDistillation(str(store)), tmp_path / str(seed), steps=1)[0].inputs())
        options = [f"--model.{name}={json.dumps(value)}" for name, value in probe.items()]
        identities.append(FitNames().identity(find_config("digits/evaluate"), options))
        shutil.rmtree(store)
    assert not torch.allclose(*found)
    assert inputs[0] != inputs[1], "a finished distillation is not taken for one of the new store"
    assert identities[0] != identities[1], "nor is an evaluation of a comparison"


def test_teachers_of_whitened_images_are_refused_for_standardised_ones(tmp_path, refused):
    store = record(tmp_path, data=small_data(zca=True), teachers=1, epochs=1)
    with refused("transform zca, not standardization"):
        fit(BackboneDistillation(str(store)), tmp_path / "set")


def test_features_are_the_input_of_the_head_divided_by_their_length(half):
    images = torch.rand(5, 1, 8, 8)
    store = TrajectoryStore(half)
    probe = LinearProbe(1, 7, 8, str(half))
    teacher = ConvNet(1, 5, 8, width=16, depth=2)
    torch.nn.utils.vector_to_parameters(store.weights(0, store.epochs), teacher.parameters())
    expected = embed(teacher, images)
    torch.testing.assert_close(probe.features(images), expected / expected.norm(dim=1, keepdim=True))
    assert probe(images).shape == (5, 7)
    assert [name for name, weight in probe.named_parameters() if weight.requires_grad] == ["head.weight", "head.bias"]
    assert LinearProbe(1, 7, 8, str(half)).backbone is probe.backbone, "one backbone serves all probes"


def test_features_of_real_images_are_computed_once_for_each_backbone(tmp_path):
    CALLS.clear()
    images = torch.rand(600, 1, 8, 8)
    first = cached_features(LinearProbe(1, 3, 8, Encoder()), images, torch.device("cpu"), backbone="one")
    assert CALLS == [1, 256, 256, 88, 2]
    assert torch.equal(
        first, cached_features(LinearProbe(1, 3, 8, Encoder()), images, torch.device("cpu"), backbone="one")
    )
    assert CALLS[5:] == [1, 2], "a look at the number of features, and at two images"
    wrapped = nn.Sequential(nn.AvgPool2d(1), nn.Flatten(0, 0), Encoder())  # the same weights
    assert (
        LinearProbe(1, 3, 8, wrapped).backbone_fingerprint() != LinearProbe(1, 3, 8, Encoder()).backbone_fingerprint()
    )
    shifted = Encoder()
    shifted.register_forward_pre_hook(lambda module, images: (images[0] + 1,))
    with pytest.warns(UserWarning, match="of another backbone; they are computed again"):
        anew = cached_features(LinearProbe(1, 3, 8, shifted), images, torch.device("cpu"), backbone="one")
    torch.testing.assert_close(anew, LinearProbe(1, 3, 8, shifted).features(images), rtol=0, atol=1e-5)
    other = cached_features(LinearProbe(1, 3, 8, Encoder(1)), images, torch.device("cpu"), backbone="other")
    assert not torch.equal(first, other)


def test_probes_measure_the_set_while_it_is_learned(half, tmp_path):
    module = BackboneDistillation(str(half), copies=2, iterations_per_epoch=2)
    measure = EvaluateSynthetic(1, networks=2, epochs=3)
    fit(module, tmp_path, data=small_data(classes=REST), callbacks=[measure])
    assert module.scores["raw images, test images"]["n"] == 2


def test_without_a_datamodule_the_given_images_tell_the_shape(tmp_path):
    real = torch.rand(30, 1, 8, 8), torch.arange(3).repeat(10)
    module, _ = fit(BackboneDistillation(Encoder(), real=real, copies=2), tmp_path, data=None)
    assert module.images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("data", [0, None], ids=["datamodule", "tensors"])
def test_a_fit_resumes_with_the_same_backbone_alone(data, tmp_path, refused):
    real = None if data == 0 else (torch.rand(30, 1, 8, 8), torch.arange(3).repeat(10))

    def module(seed):
        return BackboneDistillation(Encoder(seed), copies=2, iterations_per_epoch=2, real=real)

    fit(module(0), tmp_path, data=data, enable_checkpointing=True)
    (last,) = tmp_path.rglob("*.ckpt")
    given = small_data() if data == 0 else None
    with refused("a backbone of another fingerprint"):
        make_trainer(tmp_path, max_steps=4, enable_checkpointing=True).fit(module(1), given, ckpt_path=str(last))
    make_trainer(tmp_path, max_steps=4, enable_checkpointing=True).fit(resumed := module(0), given, ckpt_path=str(last))
    assert resumed.iterations == 4
    loaded = BackboneDistillation.load_from_checkpoint(last, network=Encoder(0), real=real)
    assert loaded.images.shape == resumed.images.shape


@pytest.mark.parametrize(
    ("network", "options", "head", "said"),
    [
        ("convnet", None, None, "'convnet' has no trained weights"),
        ("nowhere.encoder", None, None, "cannot be imported"),
        ("torchvision.models.resnet18", {"weights": "NONE"}, None, "with the options {'weights': 'NONE'}: KeyError"),
        ("torchvision.models.resnet18", None, None, "ResNet: refuses images (1, 1, 8, 8): RuntimeError"),
        (nn.Flatten(0), None, None, "returned (64,) of one image"),
        (f"{__name__}.encoder_of", {"depth": 3}, None, "unexpected keyword argument 'depth'"),
        (f"{__name__}.encoder_of", None, "fc", "Encoder has no submodule 'fc'"),
        ("builtins.dict", None, None, "returned dict, not an nn.Module"),
        (Pair(), None, None, "returned tuple of one image"),
    ],
)
def test_a_backbone_that_gives_no_features_is_refused(network, options, head, said, tmp_path, refused):
    with refused(said):
        fit(BackboneDistillation(network, options, head), tmp_path)


def test_an_unknown_loss_is_refused(refused):
    with refused("loss='mse' must be one of ridge, class_means"):
        BackboneDistillation(Encoder(), loss="mse")


def test_teachers_with_batch_norm_are_no_backbone(tmp_path):
    """A store has no running statistics."""
    store = record(tmp_path, teachers=1, epochs=1, network_options={**SMALL, "norm": "batch"})
    with pytest.raises(InputError, match="running statistics"):
        LinearProbe(1, 3, 8, str(store))
