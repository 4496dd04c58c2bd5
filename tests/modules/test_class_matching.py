import weakref
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from fits import SMALL, Losses, make_trainer, small_data
from lightning.pytorch import LightningDataModule
from torch import nn

from ftd_lightning.contracts import DataDescription, Images, ImageShape
from ftd_lightning.errors import InputError
from ftd_lightning.files import Standardization
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import BilevelDistillation, DistributionMatching, FeatureRegression, GradientMatching
from ftd_lightning.modules.class_matching import summed, train_on_set

METHODS = [DistributionMatching, GradientMatching]
# Lightning's, of a fit without held-out images.
WITHOUT_VAL = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fitted(folder, method=DistributionMatching, *, steps=1, **options):
    module = method(**{"network_options": SMALL, "augment": "crop_scale", **options})
    make_trainer(folder, max_steps=steps).fit(module, datamodule=small_data())
    return module


def pictures_and_labels(classes=3, each=5):
    labels = torch.arange(classes).repeat(each)
    return torch.randn(len(labels), 2, 8, 8, generator=torch.Generator().manual_seed(0)), labels


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("matching"), ipc=3, batch_real=5)


def test_losses_are_summed_with_the_gradient_of_their_sum(module) -> None:
    def losses():
        for label in range(10):
            yield (module.batches.synthetic(label) * (label + 1)).square().sum()

    total = summed(module.images, losses())
    gradient = torch.autograd.grad(3 * total, module.images)[0]
    joint = sum(losses())
    torch.testing.assert_close(total, joint, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * joint, module.images)[0], rtol=1e-6, atol=0)


def test_one_class_has_a_graph_at_a_time(module) -> None:
    alive = []

    def losses():
        for label in range(3):
            assert not [loss for loss in alive if loss() is not None]
            loss = module.batches.synthetic(label).sum()
            alive.append(weakref.ref(loss))
            yield loss
            del loss

    summed(module.images, losses())
    assert len(alive) == 3


def drawn(module, *keys, **options) -> list[torch.Tensor]:
    return list(module.batches.real(*keys, **options))


def test_real_images_are_of_the_class_and_drawn_without_replacement(module) -> None:
    real = module.real_images()
    for label, images in enumerate(drawn(module, 1)):
        match = (images.flatten(1)[:, None] == real.images.flatten(1)).all(2)
        index = match.float().argmax(1)
        assert match.any(1).all()
        assert (real.labels[index] == label).all()
        assert len(index.unique()) == 5
    assert torch.equal(drawn(module, 1)[2], drawn(module, 1)[2])
    assert not torch.equal(drawn(module, 1)[2], drawn(module, 2)[2])
    assert [len(images) for images in drawn(module, 1, count=2)] == [2] * 10
    assert [len(images) for images in drawn(module, 1, count=1000)] == real.labels.bincount().tolist()


def test_ranks_draw_images_of_their_own_unless_told_otherwise(module, monkeypatch) -> None:
    own, shared = drawn(module, 1), drawn(module, 1, on_all_ranks=True)
    monkeypatch.setattr(type(module), "global_rank", 1)
    assert not torch.equal(drawn(module, 1)[0], own[0])
    assert torch.equal(drawn(module, 1, on_all_ranks=True)[0], shared[0])


def test_images_that_are_augmented_together_are_augmented_alike(module) -> None:
    one, many = module.images[:1].detach(), module.images[:1].detach().expand(7, -1, -1, -1)
    shown = [(module.batches.siamese(one, label, 1), module.batches.siamese(many, label, 1)) for label in range(4)]
    for a, b in shown:
        torch.testing.assert_close(a.expand_as(b), b)
    assert not torch.equal(shown[0][0], shown[1][0]), "every class has a draw of its own"
    assert not torch.equal(shown[0][0], module.batches.siamese(one, 0, 2)), "and every iteration"


def test_training_on_the_set_is_plain_sgd_on_the_present_images(tmp_path) -> None:
    module = fitted(tmp_path, ipc=2, augment="", lr_network=0.3)
    network, reference = module.fresh_network("network", "x"), module.fresh_network("network", "x")
    module.images.grad = None
    train_on_set(module, network, 0.3, 3, "x")
    assert module.images.grad is None
    for _ in range(3):
        loss = nn.functional.cross_entropy(reference(module.images.detach()), module.labels)
        for weight, gradient in zip(
            reference.parameters(), torch.autograd.grad(loss, reference.parameters()), strict=True
        ):
            weight.data -= 0.3 * gradient
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@WITHOUT_VAL
@pytest.mark.parametrize("method", METHODS)
def test_own_images_without_a_datamodule(tmp_path, method) -> None:
    real = pictures_and_labels()
    module = method(partial(ConvNet, 2, 3, 8, width=4, depth=1), real=real, augment="", lr_images=1.0)
    with pytest.warns(UserWarning, match=r"outside \[0, 1\].*transform="):
        make_trainer(tmp_path, max_steps=2).fit(module)
    assert module.images.shape == (3, 2, 8, 8)
    assert not torch.equal(module.images.detach(), module.initial_images)
    synthetic = module.synthetic_set()
    assert synthetic.metadata["dataset"] == {"name": "own images"}
    assert float(synthetic.step_size) == pytest.approx(0.01)


class NoGradient(nn.Module):
    """A network whose features are computed without gradient, as those of a frozen backbone are."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(images.detach().flatten(1))


@WITHOUT_VAL
@pytest.mark.parametrize("method", [*METHODS, partial(BilevelDistillation, syn_steps=2), FeatureRegression])
def test_a_network_without_gradient_ends_the_run(tmp_path, method, refused) -> None:
    real = torch.rand(20, 1, 8, 8), torch.arange(10).repeat(2)
    with refused("the images' gradient was exactly zero 10 iterations in a row", "the last one 9", "no_grad"):
        make_trainer(tmp_path, max_steps=12).fit(method(NoGradient, real=real))


class Source(LightningDataModule):
    """Somebody's own datamodule that answers a module's questions."""

    def description(self) -> DataDescription:
        transform = Standardization([0.5, 0.5], [0.2, 0.2])
        return DataDescription(ImageShape(2, 3, 8), ["a", "b", "c"], transform, {"name": "mine"})

    def part(self, name) -> Images:
        return Images(*pictures_and_labels())

    def training_set(self) -> None:
        return None

    def train_dataloader(self):
        return self.trainer.lightning_module.train_dataloader()


@WITHOUT_VAL
@pytest.mark.parametrize("method", METHODS)
def test_a_data_source_of_ones_own(tmp_path, method) -> None:
    module = method(network_options=SMALL, augment="", lr_images=1.0)
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=Source())
    assert not torch.equal(module.images.detach(), module.initial_images)
    synthetic = module.synthetic_set()
    assert synthetic.metadata["dataset"] == {"name": "mine"}
    assert synthetic.class_names == ["a", "b", "c"]


@WITHOUT_VAL
def test_without_real_images_there_is_nothing_to_match(tmp_path) -> None:
    with pytest.raises(InputError, match="or give the argument real"):
        make_trainer(tmp_path).fit(GradientMatching(partial(ConvNet, 2, 3, 8, width=4, depth=1)))


def dm(folder, *, steps=3, trainer=None, real=None, callbacks=(), **options):
    module = DistributionMatching(
        **{"network_options": SMALL, "augment": "", "iterations_per_epoch": 5, **options}, real=real
    )
    settings = {"max_steps": steps, "callbacks": list(callbacks), **(trainer or {})}
    make_trainer(Path(mkdtemp(dir=folder)), **settings).fit(module, datamodule=small_data())
    return module


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_iterations_are_the_equation_written_out(tmp_path, doubles, norm) -> None:
    """Squared distances of mean embeddings, classes summed, a network a step, SGD with momentum."""
    network = {"width": 4, "depth": 1, "norm": norm}
    seen = Losses()
    module = dm(tmp_path, ipc=2, callbacks=[seen], network_options=network, trainer={"precision": "64-true"})
    real = [module.real_images().images[module.real_images().labels == c] for c in range(10)]
    images, velocity = module.initial_images.double(), 0.0
    for iteration in range(3):
        embed = nn.Sequential(*list(module.fresh.build(0, "network", iteration))[:-1])
        images.requires_grad_()
        if norm == "batch":  # statistics of the batch have to be those of all classes
            ours, theirs = embed(images).view(10, 2, -1), embed(torch.cat(real)).split([len(x) for x in real])
        else:
            ours, theirs = [embed(x) for x in images.view(10, 2, 1, 8, 8)], [embed(x) for x in real]
        loss = sum(((a.sum(0) / 2 - b.sum(0) / len(b)) ** 2).sum() for a, b in zip(ours, theirs, strict=True))
        assert seen.losses[iteration] == pytest.approx(float(loss.detach()), rel=1e-5)
        velocity = 0.5 * velocity + torch.autograd.grad(loss, images)[0]
        images = images.detach() - 1.0 * velocity
    assert module.images.dtype == torch.float64
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_equal_images_stay_equal_under_augmentation(tmp_path, norm) -> None:
    """One picture a class, real and synthetic: their distance is 0 as long as both are augmented alike."""
    pictures = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    real = pictures.repeat_interleave(9, dim=0), torch.arange(10).repeat_interleave(9)
    for strategy in ("crop", "color_crop_cutout_flip_scale_rotate"):
        seen = Losses()
        dm(
            tmp_path,
            steps=8,
            real=real,
            ipc=2,
            augment=strategy,
            callbacks=[seen],
            network_options={**SMALL, "norm": norm},
        )
        assert max(seen.losses) < 1e-6


def test_the_loss_falls(tmp_path) -> None:
    seen = Losses()
    dm(tmp_path, steps=30, augment="crop_scale_rotate", callbacks=[seen])
    assert sum(seen.losses[-10:]) < 0.8 * sum(seen.losses[:10])
