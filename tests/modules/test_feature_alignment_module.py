"""CAFE: image steps against a transcription in float64, its two loops, and runs that are interrupted in mid-loop."""

from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from fits import SMALL, make_trainer, small_data
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from ftd_lightning.functional import make_generator
from ftd_lightning.functional.augment import STRATEGY
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import FeatureAlignment, feature_alignment
from ftd_lightning.modules.feature_alignment import spread

# Lightning's word on real images without held-out ones.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

CLASSES, MEMBERS = 3, 5
DRAWN = {"network_options": SMALL, "init": "real", "iterations_per_epoch": 4, "query": 8, "batch_real": 8}


def drawn(dtype=torch.float64):
    """Noise of three classes, five images each: all of them are in every real batch, so nothing depends on a draw."""
    labels = torch.arange(CLASSES * MEMBERS) % CLASSES
    return torch.rand(len(labels), 1, 8, 8, generator=make_generator(0, "real"), dtype=dtype), labels


def fixed(outer: int, inner: int) -> dict:
    """Loops that are counted."""
    return {"kind": "fixed", "outer_max": outer, "inner_max": inner}


def align(folder: Path, *, steps=1, kind=FeatureAlignment, callbacks=(), ckpt_path=None, **options):
    """Run on the noise and give the module."""
    network = partial(ConvNet, 1, CLASSES, 8, width=4, depth=2)
    defaults = {"network": network, "network_options": None, "real": drawn()}
    module = kind(**{**DRAWN, **defaults, **options})
    settings = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks), "limit_val_batches": 0}
    make_trainer(Path(mkdtemp(dir=folder)), max_steps=steps, **settings).fit(module, ckpt_path=ckpt_path)
    return module


def levels_by_hand(network, images):
    """Features of a ConvNet of depth 2, layer by layer."""
    conv1, norm1, relu1, pool1, conv2, norm2, relu2, pool2, flatten, _ = network
    first = relu1(norm1(conv1(images)))
    second = relu2(norm2(conv2(pool1(first))))
    last = pool2(second)
    return [first, second, last, flatten(last)]


def loss_by_hand(network, synthetic, of_synthetic, real, of_real):
    """All three terms of the released script, class by class; the last one is what the module leaves out."""
    weights = [0.1, 1.0, 1.0, 1.0]
    ours, theirs = levels_by_hand(network, synthetic), levels_by_hand(network, real)
    loss = torch.zeros((), dtype=torch.float64)
    for weight, a, b in zip(weights, ours, theirs, strict=True):
        for c in range(CLASSES):
            loss = loss + weight * ((b[of_real == c].mean(0) - a[of_synthetic == c].mean(0)) ** 2).sum()
    centres = torch.stack([ours[-1][of_synthetic == c].mean(0) for c in range(CLASSES)])
    for feature, label in zip(theirs[-1], of_real, strict=True):
        logits = centres @ feature
        loss = loss + 0.01 * (logits.logsumexp(0) - logits[label])
    return loss + cross_entropy(network(real), of_real)


def test_steps_against_a_transcription_with_the_term_that_has_no_gradient(tmp_path):
    options = {"loops": fixed(2, 3), "ipc": 2, "lr_network": 0.1, "lr_images": 0.3}
    module = align(tmp_path, steps=3, **options)
    real, of_real = drawn()
    images, momentum = module.initial_images.clone(), torch.zeros(())
    for step in range(3):
        if step in (0, 2):
            network = module.fresh.build(0, "network", step // 2).double()
        else:
            sgd = torch.optim.SGD(network.parameters(), lr=0.1)
            for _ in range(3):
                sgd.zero_grad()
                cross_entropy(network(images), module.labels).backward()
                sgd.step()
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_by_hand(network, leaf, module.labels, real, of_real), leaf)
        momentum = 0.5 * momentum + gradient
        images = images - 0.3 * momentum
    assert (images - module.initial_images).abs().max() > 1e-3
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-9, atol=1e-11)
    assert module.images.dtype == torch.float64


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_real_images_as_synthetic_ones_are_aligned_under_any_augmentation(norm, tmp_path):
    module = align(
        tmp_path,
        network=partial(ConvNet, 1, CLASSES, 8, width=4, depth=2, norm=norm),
        ipc=MEMBERS,
        discrimination=0.0,
        augment=STRATEGY,
    )
    assert module.method == "cafe+dsa"
    with torch.no_grad():
        module.images.copy_(module.initial_images)
        for iteration in range(8):
            assert module.losses(module._network[0], iteration)[0] < 1e-20
        module.images *= 1.1
        module.images += torch.arange(8)
        assert module.losses(module._network[0], 0)[0] > 1e-3


@pytest.fixture(autouse=True)
def trainings(monkeypatch):
    """Record on the module what its network was trained for."""
    real = feature_alignment.train_on_set

    def train_on_set(module, network, lr, epochs, *keys):
        real(module, network, lr, epochs, *keys)
        module.trained = [*getattr(module, "trained", []), keys]

    monkeypatch.setattr(feature_alignment, "train_on_set", train_on_set)


class Planted(FeatureAlignment):
    """Accuracies that are made up, and a record of what was done."""

    outer = [0.5, 0.6, 0.5, 0.51, 0.52] + [0.52] * 10
    inner = [0.5, 0.5, 0.5, 0.6] + [0.6] * 10

    def query_accuracy(self, *keys):
        return self.outer[self.round_steps - 1] if len(keys) == 1 else self.inner[keys[-1] - 1]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.done = [*getattr(self, "done", []), self.round]
        self.lrs = [*getattr(self, "lrs", []), self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]]
        return loss


def epochs_between(module):
    """Epochs of training before each iteration."""
    return [sum(keys[0] == iteration for keys in module.trained) for iteration in range(len(module.done))]


def test_accuracies_end_both_loops(tmp_path):
    module = align(tmp_path, kind=Planted, steps=11, loops={"window": 3})
    assert module.done == [0] * 5 + [1] * 5 + [2], "three within 0.04, of this round alone"
    assert epochs_between(module) == [0, 4, 4, 4, 4] * 2 + [0], "three 0.03 apart, of this inner loop alone"


# Rounds of three iterations end in mid-epoch or, at 3 an epoch, with it.
@pytest.mark.parametrize(("per_epoch", "ended_by"), [(3, {"kind": "fixed"}), (4, {"lambda_1": 0.0})])
def test_a_run_that_was_done_goes_on_to_more_rounds(per_epoch, ended_by, tmp_path):
    options = {"iterations_per_epoch": per_epoch, "batch_real": 2, "query": 2}
    options["loops"] = {**ended_by, "outer_max": 3, "inner_max": 1, "window": 2}
    options["callbacks"] = [ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)]
    align(tmp_path, kind=Counted, steps=100, rounds=2, **options)
    further = align(tmp_path, kind=Counted, steps=100, rounds=4, ckpt_path=tmp_path / "last.ckpt", **options)
    assert further.rounds == [2, 2, 2, 3, 3, 3]
    whole = align(tmp_path, kind=Counted, steps=100, rounds=4, **options)
    assert whole.rounds == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert further.images.equal(whole.images)
    assert whole.describe()["rounds"] == further.describe()["rounds"] == 4


def test_the_fit_ends_with_its_last_round_and_stays_at_its_end(tmp_path):
    options = {"loops": fixed(3, 1), "rounds": 2, "iterations_per_epoch": 3}
    options["callbacks"] = [ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)]
    module = align(tmp_path, kind=Planted, steps=100, **options)
    assert module.done == [0, 0, 0, 1, 1, 1]
    assert module.finished
    again = align(tmp_path, kind=Planted, steps=100, ckpt_path=tmp_path / "last.ckpt", **options)
    assert again.global_step == 6
    assert again.images.equal(module.images)


def test_the_learning_rate_is_halved_by_rounds(tmp_path):
    options = {"loops": fixed(2, 1), "lr_images": 0.4}
    module = align(tmp_path, kind=Planted, steps=7, lr_milestones=[1, 3], **options)
    assert module.lrs == [0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.1]
    published = FeatureAlignment()
    rounds = [0, 1199, 1200, 1599, 1600, 1799, 1800, 2000]
    assert [published.lr_of_round(r) * 80 for r in rounds] == [8, 8, 4, 4, 2, 2, 1, 1]


def test_query_accuracy_is_the_mean_over_classes_of_the_network_of_the_moment(tmp_path):
    pictures, labels = drawn()
    keep = torch.cat([(labels == 0).nonzero()[:1], (labels != 0).nonzero()])[:, 0]  # one of class 0, five of the others
    module = align(tmp_path, real=(pictures[keep], labels[keep]), query=MEMBERS)
    network = module._network[0]
    with torch.no_grad():
        network[-1].bias += torch.tensor([1e3, 0.0, 0.0], dtype=torch.float64)
    assert module.query_accuracy(0) == pytest.approx(1 / 3), "all are taken for class 0"
    assert network.training
    assert module.images.requires_grad


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    """In the second of rounds of four iterations, which accuracies end."""
    loops, at = {"lambda_1": 1.0, "window": 4, "outer_max": 10, "inner_max": 2}, 5
    options = {"loops": loops, "ipc": 2, "augment": STRATEGY, "seed": 1}
    options["callbacks"] = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)]
    whole = align(tmp_path, kind=Counted, steps=9, **options)
    assert whole.rounds == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    file = tmp_path / f"step={at}.ckpt"
    torch.load(file, weights_only=True)  # plain values: it runs no code
    resumed = align(tmp_path, kind=Counted, steps=9, ckpt_path=file, **options)
    assert resumed.rounds == whole.rounds[at:]
    assert resumed.images.equal(whole.images)
    assert not resumed.images.equal(align(tmp_path, steps=at, **options).images)


class Counted(FeatureAlignment):
    """Records the round of each iteration."""

    def training_step(self, batch, batch_idx):
        self.rounds = [*getattr(self, "rounds", []), self.round]
        return super().training_step(batch, batch_idx)


def test_it_learns_digits_and_says_what_its_set_is(tmp_path):
    module = FeatureAlignment(**DRAWN, loops=fixed(3, 2), ipc=1)
    trainer = make_trainer(tmp_path, max_steps=12, limit_val_batches=0)
    trainer.fit(module, datamodule=small_data())
    described = module.synthetic_set()
    assert described.metadata["method"] == "cafe"
    assert described.metadata["settings"]["loops"]["outer_max"] == 3
    assert described.metadata["iterations"] == 12
    assert float(described.step_size) == pytest.approx(0.01)
    network = module.fresh.build(0, "another")
    after = sum(module.losses(network, 100))
    with torch.no_grad():
        module.images.copy_(module.initial_images)
    assert after < 0.9 * sum(module.losses(network, 100))


def test_settings_that_make_no_sense_are_refused(refused):
    for loops, parts in (({"windows": 1}, ["loops", "windows"]), ({"kind": "endless"}, ["dynamic", "fixed"])):
        with refused(*parts):
            FeatureAlignment(loops=loops)


def test_the_spread_is_that_of_the_last_accuracies():
    assert spread([0.0, 0.5, 0.5, 0.53], 3) == pytest.approx(0.03)
    assert not spread([0.0, 1.0], 3) > 0, "two are too few"
