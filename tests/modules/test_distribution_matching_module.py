from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from fits import SMALL, Losses, make_trainer, small_data
from torch import nn

from ftd_lightning.modules import DistributionMatching


def dm(folder, *, steps=3, trainer=None, real=None, callbacks=(), **options):
    module = DistributionMatching(
        **{"network_options": SMALL, "augment": "", "iterations_per_epoch": 5, **options}, real=real
    )
    settings = {"max_steps": steps, "callbacks": list(callbacks), **(trainer or {})}
    make_trainer(Path(mkdtemp(dir=folder)), **settings).fit(module, datamodule=small_data())
    return module


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
