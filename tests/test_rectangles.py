"""Rectangular images, 12 px high and 8 px wide, through data sets, networks, fits, files and commands."""

import numpy as np
import pytest
import torch
from fits import SMALL, make_trainer, small_data
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import TensorDataset

from ftd_lightning import DistillationDataModule, cli, modules
from ftd_lightning.data.sources import resizing
from ftd_lightning.models import NETWORKS, build_network

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
    given = torch.rand(24, 3, *SIZE), torch.arange(24) % 3
    theirs = LightningDataModule.from_datasets(*[TensorDataset(*given)] * 3, batch_size=5)
    wrapped = DistillationDataModule.from_datamodule(theirs)
    for data in (DistillationDataModule.from_datasets(given, given), wrapped):
        assert (data.description().shape.image_size, data.train.images.shape[1:]) == (SIZE, (3, *SIZE))
        assert torch.equal(data.part("test").images, data.transform.apply(given[0]))
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
    with Image.open(root / "ant" / "ant_0.png") as picture:
        shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert any(shown.equal(picture) for part in data.spec.load().values() for picture in part.pictures)
    assert (data.image_size, data.description().dataset["image_size"]) == (SIZE, [12, 8])
    assert [read(image_size=size).train.images.shape[2:] for size in ((6, 8), 6)] == [(6, 8), (6, 6)]
    changes = "2 of 8 are enlarged; 1 of 8 are squashed, aspect ratio changed by up to 1.33"
    several = {(16, 12): 5, (8, 6): 2, (16, 16): 1}
    assert resizing(several, (12, 16)) == f"images become 12 x 16 px (height x width): {changes}"
    Image.new("RGB", (20, 16)).save(root / "bee" / "another.png")
    assert read().image_size == 8, "of several sizes, squares of the shorter side of the most common one"


@pytest.mark.parametrize("zca", [False, True])
def test_teachers_set_and_evaluation(tmp_path, run_phases, zca, capsys):
    store, synthetic, each = run_phases(tmp_path, 2, dataset="digits", image_size=list(SIZE), zca=zca)
    assert (store.shape.image_size, store.metadata["network"]["image_size"]) == (SIZE, [12, 8])
    assert (synthetic.images.shape, len(each)) == ((10, 1, *SIZE), 1)
    path = tmp_path / "set.safetensors"
    for kind in ("png", "tensors"):
        cli.main(["export", str(path), str(tmp_path / kind), "--format", kind])
    with Image.open(tmp_path / "png" / "0" / "0.png") as picture:
        assert picture.size == SIZE[::-1]
    assert torch.load(tmp_path / "tensors" / "images.pt").shape == (10, 1, *SIZE)
    cli.main(["info", str(path)])
    assert "10 of 1 x 12 x 8" in capsys.readouterr().out


METHODS = {
    modules.FeatureAlignment: {"batch_real": 8, "query": 8},
    modules.BilevelDistillation: {"syn_steps": 2, "batch_real": 16, "compile": False},
    modules.KernelInducingPoints: {"batch_target": 16},
    modules.FeatureRegression: {"batch_target": 16, "pool_size": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_rectangles(tmp_path, method):
    module = method(network_options={**SMALL, "depth": 2}, iterations_per_epoch=2, **METHODS[method])
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=small_data(image_size=SIZE))
    assert module.synthetic_set().images.shape == (10, 1, *SIZE)
    assert module.evaluation_network(0)(module.synthetic_set().images).shape == (10, 10)
