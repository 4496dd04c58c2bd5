"""Distillation without teachers: the gradient, what the settings mean, and what every distillation promises."""

import pytest
import torch
from fits import SMALL, Losses, make_trainer, small_data
from torch.nn.functional import cross_entropy

from ftd_lightning.decoders import Generator
from ftd_lightning.errors import InputError
from ftd_lightning.functional import InnerAdam, InnerSGD, flatten_parameters, make_generator
from ftd_lightning.functional.inner_step import student_logits
from ftd_lightning.modules import BilevelDistillation
from ftd_lightning.modules.bilevel import clip_by_average
from ftd_lightning.rules import ClosestStep, LearnedLabels, TargetLabels

SETTINGS = {
    "dd": {"schedule": "fixed", "init": "noise", "syn_batch": 10, "ipc": 2},
    "sldd": {"schedule": "fixed", "rules": [LearnedLabels(lr=0.01, init="one_hot")]},
    "bptt": {"augment": "crop_scale", "syn_batch": 4},
    "gtn": {
        "decoder": Generator(2, 5, 4),
        "schedule": "fixed",
        "syn_batch": 10,
        "path": True,
        "optimizer": InnerSGD(momentum=0.5),
        "lr_momentum": 0.01,
    },
    "momentum": {"optimizer": InnerSGD(momentum=0.9, weight_decay=1e-3)},
    "rat-bptt": {"optimizer": InnerAdam(), "window": 2, "clip": 2.0, "step_size_init": 0.01, "lr_step_size": 0.0},
}


def bilevel(**options) -> BilevelDistillation:
    defaults = {"network_options": SMALL, "syn_steps": 4, "batch_real": 32, "step_size_init": 0.1, "compile": False}
    return BilevelDistillation(**{**defaults, "iterations_per_epoch": 5, **options})


def distil(folder, *, steps=4, trainer=None, **options) -> BilevelDistillation:
    module = bilevel(**options)
    make_trainer(folder, max_steps=steps, **(trainer or {})).fit(module, datamodule=small_data())
    return module


def learned(module):
    state = module.trainer.optimizers[0].state.values()
    moments = [value for entry in state for key, value in sorted(entry.items())]
    values = (module.images, module.exported_labels(), *module.learned().values(), *moments)
    return [value.detach().clone() for value in values]


@pytest.mark.parametrize("name", ["dd", "sldd", "rat-bptt", "gtn"])
def test_a_run_resumes_exactly_and_its_checkpoint_stands_alone(tmp_path, name):
    options = SETTINGS[name]
    whole = distil(tmp_path / "whole", steps=6, **options)
    half = distil(tmp_path / "half", steps=3, **options)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = bilevel(**options)
    trainer = make_trainer(tmp_path / "rest", max_steps=6)
    trainer.fit(rest, datamodule=small_data(), ckpt_path=str(tmp_path / "half.ckpt"))
    for value, wanted in zip(learned(rest), learned(whole), strict=True):
        assert torch.equal(value, wanted)
    assert torch.equal(rest.gradient_averages, whole.gradient_averages)
    ours, theirs = (
        half.synthetic_set(),
        BilevelDistillation.load_from_checkpoint(tmp_path / "half.ckpt").synthetic_set(),
    )
    for value in ("images", "labels", "step_size"):
        assert torch.equal(getattr(ours, value), getattr(theirs, value))
    assert ours.metadata["method"] == theirs.metadata["method"] == rest.method + "+generator" * (name == "gtn")
    if name in ("rat-bptt", "gtn"):
        assert float(ours.step_size) == pytest.approx(0.01), "it is a learning rate for SGD"
    distil(tmp_path / "half", steps=1, **options)  # its settings are those of the set that lies there


def test_methods_are_named_by_their_settings():
    names = {name: bilevel(**options).method for name, options in SETTINGS.items()}
    assert names.pop("gtn") == "gtn"
    assert names == {"dd": "dd", "sldd": "dd+labels", "bptt": "bptt", "momentum": "bptt", "rat-bptt": "rat-bptt"}


def test_the_loss_is_that_of_real_images_after_training_on_the_set(tmp_path):
    """A transcription of an iteration with the full graph of plain torch."""
    module = distil(tmp_path, steps=0)
    network = module.fresh.build(0, "network", 0, 0)
    weights = flatten_parameters(network).requires_grad_()
    images = module.images.detach().clone().requires_grad_()
    for _ in range(4):
        loss = cross_entropy(student_logits(network, weights, images), module.labels)
        weights = weights - 0.1 * torch.autograd.grad(loss, weights, create_graph=True)[0]
    real = module.real_images()
    index = torch.randperm(len(real.labels), generator=make_generator(0, "real", 0, 0))[:32]
    meta = cross_entropy(student_logits(network, weights, real.images[index]), real.labels[index])
    found = module._loss_of(0, 0)
    torch.testing.assert_close(found, meta)
    (wanted,) = torch.autograd.grad(meta, images)
    (gradient,) = torch.autograd.grad(found, module.images)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_gtn_measures_real_images_after_every_step_and_learns_a_momentum_for_each(tmp_path):
    """A transcription of an iteration with the full graph of plain torch, over all real batches at once."""
    module = distil(tmp_path, steps=1, **SETTINGS["gtn"])
    assert module.momentum.shape == module.step_size.shape == (4,)
    assert module.momentum.ne(0.5).tolist() == [False, True, True, True], "the first velocity is 0"
    made = module.synthetic_set().metadata
    assert made["inner_momentum"] == module.momentum.tolist()
    assert made["inner_step_size"] == module.step_size.tolist()
    assert made["images_stored"] == -(-module.decoder.numbers() // 64) > len(module.images) == 20
    network = module.fresh.build(0, "network", 7, 0)
    weights, velocity, total = flatten_parameters(network).requires_grad_(), 0.0, 0.0
    images, sizes, momentum = module.images.detach().clone().requires_grad_(), module.step_size, module.momentum
    real = module.real_images()
    for step, index in enumerate(module._batches(7, 0)):
        loss = cross_entropy(student_logits(network, weights, images[index]), module.labels[index])
        velocity = momentum[step] * velocity + torch.autograd.grad(loss, weights, create_graph=True)[0]
        weights = weights - sizes[step] * velocity
        keys = (7, 0) if step == 3 else (7, 0, step)
        drawn = torch.randperm(len(real.labels), generator=make_generator(0, "real", *keys))[:32]
        total = total + cross_entropy(student_logits(network, weights, real.images[drawn]), real.labels[drawn])
    module.images = images
    found = module._loss_of(7, 0)
    torch.testing.assert_close(found, total)
    wanted, ours = (torch.autograd.grad(value, [images, sizes, momentum]) for value in (total, found))
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_momentum_stays_in_its_range(tmp_path):
    options = {**SETTINGS["gtn"], "lr_momentum": 10.0}
    first, *others = distil(tmp_path, steps=1, **options).momentum.tolist()
    assert first == 0.5
    assert {round(value, 6) for value in others} <= {0.0, 0.999}


def test_steps_in_bf16_move_images_as_float32_nearly(tmp_path):
    both = [distil(tmp_path / p, steps=2, lr_images=0.1, precision=p) for p in ("float32", "bf16")]
    float32, bf16 = ((module.images.detach() - module.initial_images).flatten() for module in both)
    assert 0.95 < float(torch.cosine_similarity(float32, bf16, dim=0)) < 1 - 1e-6
    assert both[1].synthetic_set().metadata["settings"]["precision"] == "bf16"


@pytest.mark.slow
def test_it_learns(tmp_path):
    seen = Losses()
    distil(tmp_path, steps=40, lr_images=0.1, syn_steps=8, trainer={"callbacks": [seen]})
    assert sum(seen.losses[-10:]) < 0.9 * sum(seen.losses[:10])


def test_dd_has_a_mini_batch_and_a_step_size_for_each_step(tmp_path):
    module = distil(tmp_path, **SETTINGS["dd"])
    assert module.step_size.shape == (4,)
    assert len(set(module.step_size.tolist())) == 4
    first, second, third, _ = module._batches(0, 0)
    assert module.labels[first].tolist() == module.labels[second].tolist() == list(range(10))
    assert not set(first.tolist()) & set(second.tolist())
    assert torch.equal(first, third)
    assert all(torch.equal(a, b) for a, b in zip(module._batches(7, 1), module._batches(0, 0), strict=True))


def test_windows_lie_anywhere_in_the_run():
    module = bilevel(window=2, syn_steps=5)
    places = {module.draw_window(iteration, 0) for iteration in range(60)}
    assert places == {(2, 0), (3, 1), (4, 2), (5, 3)}
    assert bilevel(syn_steps=5).draw_window(3, 0) == (5, 0)


def test_a_fixed_network_is_the_same_in_every_iteration(tmp_path):
    seen = []
    for fixed in (True, False):
        module = bilevel(fixed_network=fixed)
        make_trainer(tmp_path / str(fixed), max_steps=0).fit(module, datamodule=small_data())
        build = module.fresh.build
        module.fresh.build = lambda *keys, build=build: seen.append(keys) or build(*keys)
        for iteration in range(3):
            module._loss_of(iteration, 0)
    assert len(set(seen[:3])) == 1
    assert len(set(seen[3:])) == 3


def test_gradients_are_clipped_at_a_multiple_of_their_average():
    """The order of the authors' code: the average takes in the unclipped norm, then the gradient is clipped."""
    average, seen = torch.tensor(0.0), []
    for size in (1.0, 1.0, 100.0, float("nan"), 1.0):
        gradient = torch.tensor([size, 0.0])
        clip_by_average(gradient, average, factor=2.0)
        seen.append((round(float(gradient.norm()), 4), round(float(average), 4)))
    assert seen[:3] == [(1.0, 1.0), (1.0, 1.0), (21.8, 10.9)]
    assert seen[3][1] == 10.9, "what is not finite leaves the average alone"
    assert seen[4] == (1.0, 9.91)


@pytest.mark.parametrize("lr_step_size", [0.0, 1e-3])
def test_a_spike_in_the_gradient_of_images_or_labels_is_clipped_whatever_the_step_size_has(tmp_path, lr_step_size):
    """A step size's gradient is larger by orders of magnitude; within one norm it hid every spike of the images."""

    class Spiked(BilevelDistillation):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 3:
                self.images.grad *= 100
                self.soft_labels.values.grad *= 50
            super().on_before_optimizer_step(optimizer)

        def configure_gradient_clipping(self, *args, **options):
            learned = {name: value.grad for name, value in self.learned().items() if value.grad is not None}
            before = {name: float(gradient.norm()) for name, gradient in learned.items()}
            super().configure_gradient_clipping(*args, **options)
            norms.append({name: (norm, float(learned[name].norm())) for name, norm in before.items()})

    norms = []
    settings = {"network_options": SMALL, "syn_steps": 4, "batch_real": 32, "compile": False, **SETTINGS["rat-bptt"]}
    rules = [LearnedLabels(lr=0.01, init="one_hot")]
    module = Spiked(**{**settings, "lr_step_size": lr_step_size, "rules": rules})
    make_trainer(tmp_path, max_steps=4).fit(module, datamodule=small_data())
    for kind, average in zip(("images", "labels"), module.gradient_averages, strict=True):
        wanted = norms[0][kind][0]
        for entry in norms[1:]:
            wanted = 0.9 * wanted + 0.1 * entry[kind][0]
        assert float(average) == pytest.approx(wanted, rel=1e-4)
        before, after = norms[3][kind]
        assert after == pytest.approx(2 * wanted, rel=1e-4)
        assert after < 0.5 * before, f"the spike in {kind} was not clipped"
    if lr_step_size:
        assert all(before == after for before, after in (entry["step_size"] for entry in norms))


def test_what_has_learning_rate_0_has_no_gradient(tmp_path):
    module = distil(tmp_path, **SETTINGS["rat-bptt"])
    assert module.step_size.grad is None
    assert not module.step_size.requires_grad
    rules = [LearnedLabels(lr=0.01, init="one_hot")]
    labels_alone = distil(tmp_path / "labels", lr_images=0.0, lr_step_size=0.0, rules=rules)
    assert torch.equal(labels_alone.images, labels_alone.initial_images)
    assert not labels_alone.images.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, "window=5 must be at most syn_steps=4"),
        ({"schedule": "random"}, "schedule='random' is unknown"),
        ({"optimizer": {"class_path": "InnerRMSProp"}}, "is no InnerOptimizer: choose from InnerAdam, InnerSGD"),
        ({"optimizer": {"class_path": "InnerSGD", "init_args": {"beta": 1}}}, "optimizer: InnerSGD: "),
        ({"lr_momentum": 0.1}, "lr_momentum: there is no momentum to learn: give optimizer an InnerSGD"),
        ({"rules": [ClosestStep()]}, "ClosestStep asks teachers"),
        ({"network": torch.nn.Linear(1, 1)}, "several fresh networks are needed"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(options, message):
    with pytest.raises(InputError, match=message):
        bilevel(**options)


@pytest.mark.parametrize("rule", [LearnedLabels(lr=1.0), TargetLabels()])
def test_labels_of_teachers_are_refused(tmp_path, rule):
    with pytest.raises(InputError, match=r"no teachers|there are none here"):
        distil(tmp_path, rules=[rule])
