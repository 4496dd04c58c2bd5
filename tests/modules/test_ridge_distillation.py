"""KIP and FRePo: their updates written out, their own accuracies, exact resume, and what their sets say."""

import copy
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from fits import SMALL, Losses, make_trainer, small_data
from lightning.pytorch import Callback
from torch import nn

from ftd_lightning import SyntheticEvaluation, SyntheticSet
from ftd_lightning.functional import centred_targets, nngp_kernel, ntk_kernel
from ftd_lightning.modules import FeatureRegression, KernelInducingPoints, kernel_accuracy, ridge_distillation

DEFAULTS = {
    KernelInducingPoints: {"batch_target": 64, "iterations_per_epoch": 5, "learn_labels": True, "lr_labels": 0.01},
    FeatureRegression: {
        "batch_target": 32,
        "iterations_per_epoch": 5,
        "pool_size": 3,
        "max_steps_per_network": 6,
        "lr_images": 0.02,
        "lr_labels": 0.01,
    },
}
METHODS = list(DEFAULTS)
PROTOCOLS = dict(zip(METHODS, ("kernel regression", "ridge regression on the pool's features"), strict=True))


class Save(Callback):
    """Writes a checkpoint after a batch, as a ModelCheckpoint with ``every_n_train_steps`` does."""

    def __init__(self, path, after) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


def make(method, real=None, **options):
    return method(**{"network_options": SMALL, **DEFAULTS[method], **options}, real=real)


def fit(folder, method, *, steps=3, real=None, callbacks=(), trainer=None, ckpt_path=None, **options):
    module = make(method, real, **options)
    settings = {"max_steps": steps, "callbacks": list(callbacks), **(trainer or {})}
    place = Path(mkdtemp(dir=folder))
    make_trainer(place, **settings).fit(module, datamodule=small_data(), ckpt_path=ckpt_path)
    return module


def ridge(k_ts, k_ss, y, reg):
    return k_ts @ torch.linalg.inv(k_ss + reg * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss))) @ y


@pytest.mark.parametrize(("kernel", "function"), [("ntk", ntk_kernel), ("nngp", nngp_kernel)])
def test_kip_is_the_equation_written_out(tmp_path, doubles, kernel, function) -> None:
    """On all real images at once, so that no draw has to be repeated."""
    seen, options = Losses(), {"kernel": kernel, "depth": 2, "reg": 1e-3, "ipc": 2, "batch_target": 10**6}
    module = fit(
        tmp_path, KernelInducingPoints, callbacks=[seen], trainer={"precision": "64-true"}, learn_labels=True, **options
    )
    real = module.real_images()
    targets = centred_targets(real.labels, 10)
    images = module.initial_images.double().requires_grad_()
    labels = centred_targets(module.labels, 10).requires_grad_()
    optimizers = [torch.optim.Adam([images], lr=0.04), torch.optim.Adam([labels], lr=0.01)]
    for iteration in range(3):
        x, s = real.images.double().flatten(1), images.flatten(1)
        k_ts, k_ss = (function(a, s, depth=2, bias_variance=0.01) for a in (x, s))
        loss = ((ridge(k_ts, k_ss, labels, 1e-3) - targets) ** 2).sum() / len(targets) / 2
        assert seen.losses[iteration] == pytest.approx(loss.item(), rel=1e-9)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(module.images.detach(), images.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(module.soft_labels.values.detach(), labels.detach(), rtol=1e-6, atol=1e-8)


def test_frepo_is_the_equation_written_out(tmp_path, doubles) -> None:
    """Networks by their seeds; one Adam step of the drawn one after each update; replaced after the sixth step."""
    seen, steps = Losses(), 14
    options = {"reg": 1e-3, "batch_target": 10**6, "pool_size": 2}
    trainer = {"precision": "64-true"}
    module = fit(tmp_path, FeatureRegression, steps=steps, callbacks=[seen], trainer=trainer, **options)
    real = module.real_images()
    targets = centred_targets(real.labels, 10)
    images = module.initial_images.double().requires_grad_()
    labels = centred_targets(module.labels, 10).requires_grad_()
    outer = torch.optim.Adam([{"params": [images], "lr": 0.02}, {"params": [labels], "lr": 0.01}])
    pool, ages, born = {}, [0, 3], [0, 0]
    for place in range(2):
        network = module.fresh.build(0, "pool", place, 0).double()
        pool[place] = network, torch.optim.Adam(network.parameters(), lr=3e-4)
    for iteration in range(steps):
        place = module.place_of(iteration)
        network, optimizer = pool[place]
        body = copy.deepcopy(nn.Sequential(*list(network)[:-1])).requires_grad_(False)
        own, theirs = body(images), body(real.images.double())
        loss = ((ridge(theirs @ own.T, own @ own.T, labels, 1e-3) - targets) ** 2).sum() / len(targets) / 2
        assert seen.losses[iteration] == pytest.approx(loss.item(), rel=1e-6)
        outer.zero_grad()
        loss.backward()
        outer.step()
        optimizer.zero_grad()
        (((network(images.detach()) - labels.detach()) ** 2).sum() / len(images) / 2).backward()
        optimizer.step()
        ages[place] += 1
        if ages[place] == 6:
            ages[place], born[place] = 0, born[place] + 1
            network = module.fresh.build(0, "pool", place, born[place]).double()
            pool[place] = network, torch.optim.Adam(network.parameters(), lr=3e-4)
    assert sum(born) >= 2
    torch.testing.assert_close(module.images.detach(), images.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.soft_labels.values.detach(), labels.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(tmp_path, method) -> None:
    """The loss falls, and the regression on the learned set beats that on its real images at the start."""
    seen = Losses()
    module = fit(tmp_path, method, steps=60, callbacks=[seen])
    assert sum(seen.losses[-10:]) < 0.8 * sum(seen.losses[:10])
    learned = module.synthetic_set().metadata["scores"][f"{PROTOCOLS[method]}, test images"]["mean"]
    test = module.source.part("test")
    with torch.no_grad():
        assert learned == pytest.approx(float(module.own_accuracies(test).mean()))
        module.images.copy_(module.initial_images)
        module.soft_labels.values.copy_(centred_targets(module.labels, 10))
        start = float(module.own_accuracies(test).mean())
    assert learned > start + 0.05


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path) -> None:
    """With fixed labels, and a pool in which a network was replaced; see test_exact_resume for learned ones."""
    whole = fit(tmp_path, FeatureRegression, steps=13, learn_labels=False)
    fit(tmp_path, FeatureRegression, steps=8, callbacks=[Save(tmp_path / "part.ckpt", 8)], learn_labels=False)
    ckpt = tmp_path / "part.ckpt"
    resumed = fit(tmp_path, FeatureRegression, steps=13, ckpt_path=ckpt, learn_labels=False)
    assert torch.equal(resumed.images, whole.images)
    assert resumed.synthetic_set().metadata == whole.synthetic_set().metadata
    assert resumed.pool.ages == whole.pool.ages


def test_networks_of_the_pool_are_not_replaced_together(tmp_path) -> None:
    module = fit(tmp_path, FeatureRegression, steps=1)
    assert module.pool.ages == [0, 2, 4]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, method) -> None:
    """An infinite real image: the loss is not a number, nor is any gradient."""

    class Poison(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            pl_module._real.images[:] = torch.inf

    real = torch.rand(20, 1, 8, 8), torch.arange(10).repeat(2)
    module = fit(tmp_path, method, steps=2, real=real, init="noise", callbacks=[Poison()])
    assert module.skipped_steps == 2
    assert torch.equal(module.images, module.initial_images)
    assert torch.equal(module.soft_labels.values, centred_targets(module.labels, 10))


@pytest.mark.parametrize("method", METHODS)
def test_the_set_says_what_made_it(tmp_path, method) -> None:
    module = fit(tmp_path, method)
    module.synthetic_set().save(tmp_path / "set.safetensors")
    written = SyntheticSet.load(tmp_path / "set.safetensors")
    metadata = written.metadata
    name, kernel = {KernelInducingPoints: ("kip", "ntk"), FeatureRegression: ("frepo", "features")}[method]
    assert (metadata["method"], metadata["kernel"]["name"], metadata["kernel"]["reg"]) == (name, kernel, 1e-6)
    assert set(metadata["scores"]) == {f"{PROTOCOLS[method]}, {p} images" for p in ("test", "held-out training")}
    assert (metadata["label_kind"], metadata["labels_made"]) == ("target", "learned")
    assert torch.equal(written.labels, module.soft_labels.values.detach())
    assert float(written.labels.sum(1).abs().max()) > 1e-4, "learned: neither probabilities nor centred"


@pytest.mark.parametrize(
    ("limits", "measure_every", "after"),
    [({}, 0, [13]), ({}, 2, [10, 13]), ({"max_steps": -1, "max_epochs": 2}, 0, [10])],
)
def test_its_own_accuracy_is_measured_when_it_is_due(tmp_path, monkeypatch, limits, measure_every, after) -> None:
    measured, solved, solve = [], [], torch.linalg.solve_ex

    def own_accuracies(self, real):
        measured.append(self.global_step)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "solve_ex", lambda *args: solved.append(0) or solve(*args))
            return KernelInducingPoints.own_accuracies(self, real)

    monkeypatch.setattr(ridge_distillation, "BATCH", 8)
    method = type("Counting", (KernelInducingPoints,), {"own_accuracies": own_accuracies})
    monkeypatch.setitem(DEFAULTS, method, DEFAULTS[KernelInducingPoints])
    fit(tmp_path, method, steps=13, trainer=limits, measure_every=measure_every)
    assert measured == [step for step in after for _ in ("val", "test")]
    assert len(solved) == len(measured), "one factorisation for all batches of images"


@pytest.mark.parametrize("learn_labels", [True, False])
def test_kernel_accuracy_of_a_written_set(tmp_path, learn_labels, refused) -> None:
    module = fit(tmp_path, KernelInducingPoints, learn_labels=learn_labels, depth=2)
    module.synthetic_set().save(tmp_path / "set.safetensors")
    written, test = SyntheticSet.load(tmp_path / "set.safetensors"), module.source.part("test")
    recorded = written.metadata["scores"]["kernel regression, test images"]["mean"]
    assert kernel_accuracy(written, test) == pytest.approx(recorded)
    with refused("0 real images"):
        kernel_accuracy(written, test.take(torch.arange(0)))
    del written.metadata["kernel"]
    with refused("name no kernel of ntk, nngp"):
        kernel_accuracy(written, test)


def test_networks_are_trained_on_probabilities(tmp_path) -> None:
    module = fit(tmp_path, KernelInducingPoints, lr_labels=0.3)
    file = tmp_path / "set.safetensors"
    module.synthetic_set().save(file)
    evaluation, data = SyntheticEvaluation(network_options=SMALL, networks=1), small_data(synthetic=str(file))
    make_trainer(tmp_path / "evaluation", max_epochs=1).fit(evaluation, datamodule=data)
    (_, labels) = next(iter(data.train_dataloader()))
    assert float(labels.min()) >= 0
    torch.testing.assert_close(labels.sum(1), torch.ones(10))
    assert float((labels - torch.eye(10)[labels.argmax(1)]).abs().max()) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_without_a_datamodule_there_is_nothing_to_measure(tmp_path, method) -> None:
    real = torch.rand(30, 1, 8, 8), torch.arange(3).repeat(10)

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))

    module = method(network=network, real=real, ipc=2)
    make_trainer(tmp_path, max_steps=2).fit(module)
    made = module.synthetic_set()
    assert "scores" not in made.metadata
    assert made.metadata["target_scale"] == pytest.approx(1.0 if method is KernelInducingPoints else (10 / 3) ** 0.5)
    made.check("set")


def test_what_cannot_be(tmp_path, refused) -> None:
    with refused("kernel='rbf' must be one of ntk, nngp"):
        KernelInducingPoints(kernel="rbf")
    for method in METHODS:
        with refused("network is one Flatten object"):
            method(network=nn.Flatten())
    with refused("runs no nn.Linear"):
        real = torch.rand(20, 1, 8, 8), torch.arange(2).repeat(10)
        module = FeatureRegression(network=lambda: nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()), real=real)
        make_trainer(tmp_path, max_steps=1).fit(module)
