from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from fits import SMALL, Losses, make_trainer, small_data
from torch import nn
from torch.nn.functional import cross_entropy

from ftd_lightning import SyntheticSet
from ftd_lightning.callbacks import SyntheticSetWriter
from ftd_lightning.modules import GradientMatching, class_matching

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def matching(**options):
    return GradientMatching(**{"network_options": SMALL, "augment": "", "iterations_per_epoch": 5, **options})


def distil(folder, *, steps=3, trainer=None, callbacks=(), **options):
    module = matching(**options)
    settings = {"max_steps": steps, "callbacks": list(callbacks), **(trainer or {})}
    make_trainer(Path(mkdtemp(dir=folder)), **settings).fit(module, datamodule=small_data())
    return module


def written_out(a, b):
    """The distance of two lists of gradients, row by row."""
    total = 0.0
    for ours, theirs in zip(a, b, strict=True):
        if ours.ndim > 1:
            for x, y in zip(ours, theirs, strict=True):
                x, y = x.reshape(-1), y.reshape(-1)
                total = total + 1 - x @ y / ((x @ x).sqrt() * (y @ y).sqrt() + 1e-6)
    return total


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_dc_is_its_algorithm_written_out(tmp_path, doubles, norm) -> None:
    """Five iterations, of which the second, third and fifth are on a network that was trained for two epochs more."""
    seen = Losses()
    module = distil(
        tmp_path,
        steps=5,
        ipc=2,
        init="noise",
        outer_loops=3,
        inner_epochs=2,
        lr_images=0.4,
        lr_network=0.2,
        network_options={**SMALL, "norm": norm},
        callbacks=[seen],
        trainer={"precision": "64-true"},
    )
    real, labels = [module.real_images().images[module.real_images().labels == c] for c in range(10)], module.labels
    assert len(real[0]) <= 16, "all are drawn, for gradients and for statistics"
    images, velocity = module.initial_images.double(), 0.0
    for iteration, (loop, outer) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        if outer == 0:
            network = module.fresh.build(0, "network", loop)
        weights = list(network.parameters())
        network.train()
        for _ in range(2 if outer else 0):
            loss = cross_entropy(network(images), labels)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.data -= 0.2 * gradient
        if norm == "batch":
            network(torch.cat(real))
            network[1].eval()
        images.requires_grad_()
        loss = 0.0
        for c in range(10):
            gradients = []
            for batch in (images[2 * c : 2 * c + 2], real[c]):
                answer = torch.full((len(batch),), c)
                gradients.append(torch.autograd.grad(cross_entropy(network(batch), answer), weights, create_graph=True))
            loss = loss + written_out(gradients[0], [g.detach() for g in gradients[1]])
        assert seen.losses[iteration] == pytest.approx(float(loss.detach()), rel=1e-5)
        velocity = 0.5 * velocity + torch.autograd.grad(loss, images)[0]
        images = images.detach() - 0.4 * velocity
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(module.images.detach(), module.initial_images.double(), atol=1e-3)


def test_dsa_augments_both_sides_of_a_class_by_one_draw(tmp_path, doubles) -> None:
    """The first iteration written out on augmented images, and another loss than without augmentation."""
    settings = {"ipc": 2, "outer_loops": 1, "inner_epochs": 1, "trainer": {"precision": "64-true"}, "steps": 1}
    seen, plain = Losses(), Losses()
    module = distil(tmp_path, augment="crop_scale", callbacks=[seen], **settings)
    distil(tmp_path, callbacks=[plain], **settings)
    network = module.fresh.build(0, "network", 0)
    loss = 0.0
    for c, real in enumerate(module.batches.real(0)):
        gradients = []
        for batch in (module.initial_images.double().view(10, 2, 1, 8, 8)[c], real):
            shown = module.batches.siamese(batch, c, 0)
            answer = torch.full((len(batch),), c)
            gradients.append(torch.autograd.grad(cross_entropy(network(shown), answer), list(network.parameters())))
        loss = loss + written_out(*gradients)
    assert seen.losses[0] == pytest.approx(float(loss), rel=1e-5)
    assert abs(seen.losses[0] - plain.losses[0]) > 0.01


def one_picture_a_class():
    pictures = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pictures.repeat_interleave(9, dim=0), torch.arange(10).repeat_interleave(9)


def test_the_network_is_trained_on_images_that_are_augmented_one_by_one(tmp_path) -> None:
    batches = []

    class Watched(nn.Sequential):
        def forward(self, images):
            batches.append(images.detach().clone())
            return super().forward(images)

    def network() -> nn.Module:
        return Watched(nn.Flatten(), nn.Linear(64, 10))

    options = {"ipc": 6, "outer_loops": 2, "inner_epochs": 1, "real": one_picture_a_class(), "augment": "crop"}
    distil(tmp_path, steps=2, network=network, network_options=None, lr_images=1e-9, **options)
    assert [len(batch) for batch in batches] == [9, 6] * 10 + [60] + [9, 6] * 10
    training = batches.pop(20)
    for batch in batches:
        torch.testing.assert_close(batch, batch[:1].expand_as(batch), rtol=0, atol=1e-6)
    assert len(training.unique(dim=0)) > 30


def test_a_loop_trains_its_network_one_time_less_than_it_updates_images(tmp_path, monkeypatch) -> None:
    trained, networks = [], []
    real = class_matching.train_on_set

    def train_on_set(module, network, lr, epochs, *keys):
        trained.append((*keys, epochs))
        networks.append(network)
        real(module, network, lr, epochs, *keys)

    monkeypatch.setattr(class_matching, "train_on_set", train_on_set)
    distil(tmp_path, steps=7, outer_loops=3, inner_epochs=4)
    assert trained == [(1, 4), (2, 4), (4, 4), (5, 4)]
    assert networks[0] is networks[1] is not networks[2]
    distil(tmp_path, steps=3)
    assert len(trained) == 4, "with one image a class a network is never trained"


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path) -> None:
    """Interrupted in mid-loop, after the loop's network was trained; with running statistics."""
    norm, steps = "batch", 5
    settings = {
        "outer_loops": 3,
        "inner_epochs": 2,
        "batch_real": 5,
        "augment": STRATEGY,
        "lr_network": 0.1,
        "network_options": {**SMALL, "norm": norm},
    }
    whole, first = (distil(tmp_path, steps=n, **settings) for n in (7, steps))
    first.trainer.save_checkpoint(tmp_path / "part.ckpt")
    module = matching(**settings)
    make_trainer(tmp_path, max_steps=7).fit(module, datamodule=small_data(), ckpt_path=tmp_path / "part.ckpt")
    assert torch.equal(module.images, whole.images)
    assert not torch.equal(module.images, first.images)
    longer = matching(**settings)
    make_trainer(tmp_path, max_steps=steps + 1).fit(longer, datamodule=small_data(), ckpt_path=tmp_path / "part.ckpt")
    once = distil(tmp_path, steps=steps + 1, **settings)
    for name, value in once._network[0].state_dict().items():
        assert torch.equal(longer._network[0].state_dict()[name], value), name


@pytest.mark.slow
def test_the_loss_falls(tmp_path) -> None:
    seen = Losses()
    distil(tmp_path, steps=30, augment="crop_scale_rotate", callbacks=[seen], lr_images=1.0)
    assert sum(seen.losses[-10:]) < 0.9 * sum(seen.losses[:10])


def test_loops_are_the_published_ones_or_have_to_be_given(refused) -> None:
    for ipc, loops in {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}.items():
        module = matching(ipc=ipc)
        assert (module.outer_loops, module.inner_epochs) == loops
    for ipc in (2, [10, 1]):
        with refused(f"ipc={ipc}", "give outer_loops"):
            matching(ipc=ipc)
    with refused("ipc=2", "give inner_epochs"):
        matching(ipc=2, outer_loops=3)


@pytest.mark.parametrize(("strategy", "name"), [("", "dc"), ("crop_scale", "dsa")])
def test_the_set_says_what_made_it(tmp_path, strategy, name) -> None:
    writer = SyntheticSetWriter(str(tmp_path / "set.safetensors"))
    distil(tmp_path, augment=strategy, callbacks=[writer])
    synthetic = SyntheticSet.load(writer.path)
    assert (synthetic.metadata["method"], synthetic.metadata["augmentation"]["strategy"]) == (name, strategy)
    assert [synthetic.metadata["settings"][key] for key in ("outer_loops", "inner_epochs")] == [1, 1]
    assert float(synthetic.step_size) == pytest.approx(0.01)
