"""Rectangular images, 12 px high and 8 px wide, through data sets, networks, fits, files and commands."""

import numpy as np
import pytest
import torch
from fits import SMALL, make_trainer, small_data
from PIL import Image

from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.data import Request, get_dataset
from ftd_lightning.data.sources import resizing
from ftd_lightning.models import NETWORKS, build_network
from ftd_lightning.modules import (
    BilevelDistillation,
    DistributionMatching,
    FeatureAlignment,
    FeatureRegression,
    GradientMatching,
    KernelInducingPoints,
    kernel_accuracy,
)

SIZE = (12, 8)
# Lightning's, of real images without held-out ones.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_rectangles(name):
    features = {"convnet": 128 * 6 * 4, "alexnet": 192 * 6 * 4, "resnet18_ap": 512 * 6 * 4}.get(name, 512)
    network = build_network(name, 3, 10, [48, 32], norm="layer")
    assert network[-1].in_features == features
    assert network(torch.randn(2, 3, 48, 32)).shape == (2, 10)
    with torch.device("meta"):
        squares = [build_network(name, 1, 10, size) for size in (28, (28, 28))]
    assert str(squares[0]) == str(squares[1])


def test_sides_that_a_network_cannot_halve_are_refused(refused):
    with refused("cannot halve 32 x 36 px (height x width) 3 times"):
        build_network("convnet", 3, 10, (32, 36))
    with refused("VGG11", "48 x 31 px", "takes 32 px or more"):
        build_network("vgg11", 3, 10, (48, 31))
    with refused("image_size=[8, 8, 8]", "[height, width]"):
        build_network("convnet", 3, 10, [8, 8, 8])
    with refused("image_size[1]=0"):
        DistillationDataModule(image_size=(8, 0))


def test_objects_keep_their_rectangle():
    images, labels = torch.rand(24, 3, *SIZE), torch.arange(24) % 3
    data = DistillationDataModule.from_datasets((images, labels), (images, labels))
    assert (data.image_size, data.train.images.shape[1:]) == (SIZE, (3, *SIZE))
    assert torch.equal(data.part("test").images, data.transform.apply(images))
    assert "image_size" not in data.description().dataset, "their own size is in their contents"


def test_a_pair_resizes_and_identifies_the_images_and_an_equal_pair_is_a_number():
    digits = small_data(image_size=SIZE)
    assert digits.train.images.shape[1:] == (1, *SIZE)
    assert digits.description().dataset["image_size"] == [12, 8]
    for square in (8, 16):
        pair, number = (small_data(image_size=size) for size in ([square, square], square))
        assert (pair.describe(), pair.hparams) == (number.describe(), number.hparams)


def test_a_folder_of_one_size_keeps_it_and_others_are_resized_as_asked(tmp_path, image_folder):
    root = image_folder(tmp_path / "images", ["ant", "bee"], count=10, size=SIZE[::-1])

    def read(**options):
        return DistillationDataModule("folder", root=str(root), **options)

    data = read()
    (first,) = (index for index, path in enumerate(data._folder[1]["train"].files) if path.name == "ant_0.png")
    shown = torch.from_numpy(np.asarray(Image.open(root / "ant" / "ant_0.png")).copy()).permute(2, 0, 1)
    assert torch.equal(data.spec.load()["train"].pictures[first], shown)
    assert (data.image_size, data.description().dataset["image_size"]) == (SIZE, [12, 8])
    assert read(image_size=(6, 8)).image_size == (6, 8)
    assert get_dataset("folder", Request(root, image_size=6)).image_size == 6
    Image.new("RGB", (20, 16)).save(root / "bee" / "another.png")
    assert read().image_size == 8, "of several sizes, squares of the shorter side of the most common one"


def test_the_notice_tells_what_a_rectangle_squashes():
    assert resizing({(8, 6): 2}, (6, 8)) is None
    assert resizing({(16, 12): 5, (8, 6): 2}, (6, 8)) == "images are reduced to 6 x 8 px (height x width)"
    several = {(16, 12): 5, (8, 6): 2, (16, 16): 1}
    changes = "2 of 8 are enlarged; 1 of 8 are squashed, aspect ratio changed by up to 1.33"
    assert resizing(several, (12, 16)) == f"images become 12 x 16 px (height x width): {changes}"
    assert "8 x 8 px: 2 of 8 are enlarged; 7 of 8 are squashed" in resizing(several, 8)


@pytest.mark.parametrize("zca", [False, True])
def test_teachers_set_and_evaluation(tmp_path, run_phases, zca, capsys):
    store, synthetic, each = run_phases(tmp_path, 2, dataset="digits", image_size=list(SIZE), zca=zca)
    assert (store.shape.image_size, store.metadata["network"]["image_size"]) == (SIZE, [12, 8])
    assert (synthetic.images.shape, len(each)) == ((10, 1, *SIZE), 1)
    images, transform = synthetic.images, synthetic.transform
    torch.testing.assert_close(transform.apply(transform.invert(images)), images, atol=1e-3, rtol=1e-3)
    path = tmp_path / "set.safetensors"
    for kind in ("png", "tensors"):
        cli.main(["export", str(path), str(tmp_path / kind), "--format", kind])
    assert Image.open(tmp_path / "png" / "0" / "0.png").size == SIZE[::-1]
    assert torch.load(tmp_path / "tensors" / "images.pt").shape == (10, 1, *SIZE)
    cli.main(["info", str(path)])
    cli.main(["info", str(tmp_path / "trajectories")])
    assert "12 x 8" in capsys.readouterr().out


METHODS = {
    DistributionMatching: {"batch_real": 8},
    GradientMatching: {"batch_real": 8, "outer_loops": 1, "inner_epochs": 1},
    FeatureAlignment: {"batch_real": 8, "query": 8},
    BilevelDistillation: {"syn_steps": 2, "batch_real": 16, "compile": False},
    KernelInducingPoints: {"batch_target": 16},
    FeatureRegression: {"batch_target": 16, "pool_size": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_rectangles(tmp_path, method):
    module = method(network_options={**SMALL, "depth": 2}, iterations_per_epoch=2, **METHODS[method])
    data = small_data(image_size=SIZE)
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=data)
    synthetic = module.synthetic_set()
    assert synthetic.images.shape == (10, 1, *SIZE)
    assert not synthetic.images.equal(module.initial_images.cpu())
    synthetic.save(tmp_path / "set.safetensors")
    again = SyntheticSet.load(tmp_path / "set.safetensors")
    assert again.images.equal(synthetic.images)
    assert module.evaluation_network(0)(again.images).shape == (10, 10)
    if method is KernelInducingPoints:
        assert 0 <= kernel_accuracy(again, data.part("test")) <= 1
