"""Ideas beyond FTD in a distillation: what each does to images, labels, step size, momenta, segments and the set."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fits import distil, make_trainer, record, small_data, small_matching
from lightning.pytorch import Callback

from ftd_lightning import SyntheticSet, TrajectoryMatching, TrajectoryStore
from ftd_lightning.core.arguments import plain
from ftd_lightning.core.labels import RecordedTeachers
from ftd_lightning.decoders import MultiFormation
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional import chunked_permutations, derive_seed, load_flat, make_generator, unroll
from ftd_lightning.models import ConvNet
from ftd_lightning.rules import (
    ClosestStep,
    CorrectImages,
    DropLargest,
    DropShallow,
    KeepSimilar,
    LearnedLabels,
    LossGate,
    MatchingRule,
    RobustStart,
    StartWindow,
    TargetLabels,
    start_noise,
)

DATM = [
    LearnedLabels(lr=1.0),
    StartWindow(ceiling=1, growth_iterations=4),
    LossGate(threshold=2.0),
    CorrectImages(),
]
EACH = [
    [LearnedLabels(lr=1.0)],
    [LearnedLabels(lr=1.0, momentum=0.0, init="one_hot")],
    [TargetLabels()],
    [StartWindow(first=1)],
    [LossGate(threshold=2.0)],
    [CorrectImages()],
    [DropShallow(rate=0.25)],
    [ClosestStep()],
    [*DATM, DropShallow(rate=0.25), ClosestStep()],
]


DECODED = {"decoder": MultiFormation(2), "syn_batch": 5}  # 15 of 40 images in an iteration


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Good enough to be right about some images of every class."""
    network = {"width": 8, "depth": 1}
    return record(tmp_path_factory.mktemp("teachers"), epochs=12, lr=0.2, network_options=network)


def learned(module):
    """All that an iteration may change, momenta included."""
    tensors = [*module.averaged().values(), module.step_size, module.exported_labels()]
    optimizer = module.trainer.optimizers[0]
    tensors += [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize(
    ("rules", "more"),
    [(EACH[1], {}), (EACH[2], {}), (EACH[-1], {}), (EACH[2], DECODED), (EACH[-1], DECODED)],
    ids=["one-hot", "target-labels", "all", "decoded, target-labels", "decoded, all"],
)
def test_a_run_resumes_exactly_and_its_checkpoint_stands_alone(tmp_path, teachers, rules, more):
    whole = distil(tmp_path / "whole", teachers, steps=6, rules=rules, **more)
    half = distil(tmp_path / "half", teachers, steps=3, rules=rules, **more)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = small_matching(teachers, rules=rules, **more)
    trainer = make_trainer(tmp_path / "rest", max_steps=6)
    trainer.fit(resumed, datamodule=small_data(), ckpt_path=str(tmp_path / "half.ckpt"))
    for value, wanted in zip(learned(resumed), learned(whole), strict=True):
        assert torch.equal(value, wanted)
    assert whole.method == "+".join(["mtt", *(rule.name for rule in rules)])
    loaded = TrajectoryMatching.load_from_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(loaded.synthetic_set().labels, SyntheticSet.load(tmp_path / "half" / "set.safetensors").labels)
    assert loaded.rules == rules
    made = {"target-labels": "soft (teacher)"}.get(rules[0].name, "soft (learned)")
    assert loaded.synthetic_set().label_description == made


def test_learned_labels_move_with_their_own_rate_and_momentum(tmp_path, teachers):
    module = distil(tmp_path, teachers, steps=2, rules=[LearnedLabels(lr=3.0, momentum=0.7)])
    group = next(g for g in module.trainer.optimizers[0].param_groups if g["params"][0].ndim == 2)
    assert (group["lr"], group["momentum"]) == (3.0, 0.7)
    still = distil(tmp_path / "still", teachers, steps=2, rules=[LearnedLabels(lr=1e-9)])
    assert not torch.allclose(module.exported_labels(), still.exported_labels(), atol=1e-4)
    torch.testing.assert_close(module.exported_labels().sum(1), torch.ones(10))


def test_learned_labels_start_from_the_teachers_that_are_right(tmp_path, teachers):
    module = distil(tmp_path, teachers, steps=0, rules=[LearnedLabels(lr=1.0)])
    store, images, labels = TrajectoryStore(teachers), module.images.detach(), module.labels
    network = module.fresh.architecture()
    answers = list(RecordedTeachers(store, network, images).answers(images))
    for index, label in enumerate(labels.tolist()):
        right = [given[index] for given in answers if int(given[index].argmax()) == label]
        wanted = torch.stack(right or [given[index] for given in answers]).mean(0)
        torch.testing.assert_close(module.soft_labels.values[index].detach(), wanted)


def test_correct_images_are_classified_correctly(tmp_path, teachers):
    module = distil(tmp_path, teachers, steps=0, ipc=2, rules=[CorrectImages()])
    answers = list(
        RecordedTeachers(TrajectoryStore(teachers), module.fresh.architecture(), module.images).answers(
            module.images.detach()
        )
    )
    assert all(any(int(a[i].argmax()) == label for a in answers) for i, label in enumerate(module.labels.tolist()))
    assert len(module.images.detach().flatten(1).unique(dim=0)) == 20
    assert module.labels.tolist() == [label for label in range(10) for _ in range(2)]


def test_teacher_labels_are_what_the_target_says_of_the_images_before_the_step(tmp_path, teachers):
    module = distil(tmp_path, teachers, steps=1, rules=[TargetLabels()])
    first = distil(tmp_path, teachers, steps=0, rules=[TargetLabels()])
    segment = first.train_dataloader().draw(0)
    network = first.fresh.architecture()
    load_flat(network, segment["target"])
    wanted = torch.softmax(network.eval()(first.images.detach()), 1)
    torch.testing.assert_close(module.exported_labels(), wanted)
    assert not torch.allclose(wanted, torch.nn.functional.one_hot(first.labels, 10).float(), atol=1e-2)


@dataclass(frozen=True)
class Closed(MatchingRule):
    """Refuses some iterations."""

    closed: tuple[int, ...]
    name = "closed"

    def start_epochs(self, iteration, max_start_epoch):
        return None

    def accepts(self, loss):
        Closed.calls += 1
        return torch.tensor(Closed.calls - 1 not in self.closed)


def run_closed(tmp_path, teachers, closed, steps, **options):
    """Distil with some iterations refused, and note what is learned after each one."""
    Closed.calls, seen = 0, []

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(learned(module))

    rules = [Closed(closed), *options.pop("rules", [])]
    module = distil(tmp_path, teachers, steps=steps, callbacks=[Look()], rules=rules, **options)
    return module, [*seen, learned(module)]


@pytest.mark.parametrize("decoder", [None, MultiFormation(2)], ids=["pixels", "decoded"])
@pytest.mark.parametrize("labels", [LearnedLabels(lr=1.0), TargetLabels()], ids=["learned", "teacher"])
def test_a_gated_step_leaves_everything_bit_for_bit(tmp_path, teachers, labels, decoder):
    module, seen = run_closed(tmp_path / "gated", teachers, (2,), 4, rules=[labels], decoder=decoder)
    # After two steps, the refused third one changes nothing: images, step size, labels, all momenta.
    for before, after in zip(seen[2], seen[3], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(seen[3][0], seen[4][0])
    assert module.synthetic_set().metadata["gated_steps"] == 1
    assert float(module.trainer.callback_metrics["matching/gated_steps"]) == 1
    assert module.skipped_steps == 0
    # The test can fail: without the gate that step moves all of them.
    _, free = run_closed(tmp_path / "free", teachers, (), 4, rules=[labels], decoder=decoder)
    assert all(torch.equal(a, b) for a, b in zip(free[2], seen[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(free[2], free[3], strict=True))


def test_a_gate_that_never_opens_ends_the_run(tmp_path, teachers):
    with pytest.raises(DivergenceError, match="above a rule's threshold 100 iterations in a row"):
        distil(tmp_path, teachers, steps=150, syn_steps=1, rules=[LossGate(threshold=1e-6)])


def test_the_window_decides_on_segments_and_is_checked_before_anything_is_learned(tmp_path, teachers):
    module = distil(tmp_path, teachers, steps=0, rules=[StartWindow(ceiling=1, growth_iterations=4)])
    loader = module.train_dataloader()
    starts = [{loader.draw(i, slot)["start_epoch"] for slot in range(40)} for i in (0, 1, 2, 3, 4, 100)]
    assert starts == [{0}, {0}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2}]
    for first in (3, 7):
        with pytest.raises(InputError, match="max_start_epoch=3 allows 0 to 2"):
            distil(tmp_path, teachers, steps=1, rules=[StartWindow(first=first)])


def test_rules_that_decide_the_same_thing_exclude_each_other(teachers):
    pairs = [
        ([StartWindow(), StartWindow(first=1)], "start_epochs"),
        ([ClosestStep(), ClosestStep()], "distance"),
        ([CorrectImages(), CorrectImages()], "initial_images"),
        ([TargetLabels(), LearnedLabels(lr=1.0)], "labels"),
    ]
    for rules, hook in pairs:
        with pytest.raises(InputError, match=f"each decide {hook}: give one"):
            small_matching(teachers, rules=rules)
    with pytest.raises(InputError, match="CorrectImages no image to choose"):
        small_matching(teachers, init="noise", rules=[CorrectImages()])


def test_all_rules_go_through_a_config(tmp_path, teachers):
    for rules in EACH:
        built = small_matching(teachers, rules=plain(rules)).rules
        assert built == rules


def dropped(end: torch.Tensor, target: torch.Tensor, rule: MatchingRule) -> torch.Tensor:
    """The rules of rivals: DPD's largest differences, and the smallest ratios of sizes."""
    if isinstance(rule, DropLargest):
        return (end - target).abs().argsort(descending=True)[: int(len(end) * rule.rate)]
    ratio = torch.minimum(end.abs(), target.abs()) / torch.maximum(end.abs(), target.abs())
    return ((ratio < rule.epsilon) | (end * target < 0)).nonzero().squeeze(1)


@pytest.mark.parametrize("rule", [DropLargest(0.1), KeepSimilar(0.8)], ids=str)
def test_an_iteration_matches_what_is_left(tmp_path: Path, trajectories: Path, rule: MatchingRule) -> None:
    module = distil(tmp_path, trajectories, steps=1, rules=[rule], momentum=0.0)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    drawn = module.train_dataloader().draw(0)
    start, target = store.segment(drawn["teacher"], drawn["start_epoch"], 1)
    images, step_size = module.initial_images.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    batches = chunked_permutations(10, 3, make_generator(0))
    end = unroll(network, start, images, module.labels, step_size, batches=batches, method="graph")
    kept = torch.ones(len(end), dtype=torch.bool)
    kept[dropped(end.detach(), target, rule)] = False
    assert 0 < kept.sum() < len(kept)
    loss = ((end - target)[kept] ** 2).sum() / ((start - target)[kept] ** 2).sum()
    gradients = torch.autograd.grad(loss, [images, step_size])
    torch.testing.assert_close(module.images.detach(), images.detach() - 10.0 * gradients[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.step_size.detach(), 0.1 - 1e-3 * gradients[1], rtol=1e-4, atol=1e-6)


def test_rules_come_as_in_a_config(refused) -> None:
    spec = {"class_path": "ftd_lightning.rules.masks.DropLargest", "init_args": {"rate": 0.25}}
    assert TrajectoryMatching("nowhere", rules=[spec]).rules == [DropLargest(0.25)]
    with refused("rules", "NoSuchRule", "DropLargest"):
        TrajectoryMatching("nowhere", rules=[{"class_path": "NoSuchRule"}])
    with refused("rules", "ratio"):
        TrajectoryMatching("nowhere", rules=[{**spec, "init_args": {"ratio": 0.25}}])


@pytest.mark.parametrize("residual", ["displacement", "endpoint"])
def test_an_iteration_is_eq_9_with_the_noise_of_its_seed(tmp_path: Path, trajectories: Path, residual: str) -> None:
    """Two iterations of gradient descent without momentum, written out with the full graph."""
    module = distil(tmp_path, trajectories, steps=2, rules=[RobustStart(0.3, residual)], momentum=0.0, seed=5)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    images, step_size, loader = module.initial_images.clone(), torch.tensor(0.1), module.train_dataloader()
    for iteration in range(2):
        drawn = loader.draw(iteration)
        start, target = store.segment(drawn["teacher"], drawn["start_epoch"], 1)
        eps = start_noise(start, target, make_generator(derive_seed(5, "dsa", iteration, 0), "robust"), kappa=0.3)
        inputs = [images.requires_grad_(), step_size.requires_grad_()]
        batches = chunked_permutations(10, 3, make_generator(0))
        end = unroll(network, start + eps, images, module.labels, step_size, batches=batches, method="graph")
        gap = end - target - (eps if residual == "displacement" else 0)
        gradients = torch.autograd.grad((gap**2).sum() / ((start - target) ** 2).sum(), inputs)
        images = images.detach() - 10.0 * gradients[0]
        step_size = step_size.detach() - 1e-3 * gradients[1]
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.step_size.detach(), step_size, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [RobustStart, DropLargest, KeepSimilar])
def test_a_rule_of_strength_0_changes_no_bit(tmp_path: Path, trajectories: Path, rule: type) -> None:
    rules = {"off": [], "zero": [rule(0.0)], "on": [rule(0.5)]}
    off, zero, on = (distil(tmp_path / name, trajectories, steps=3, rules=own) for name, own in rules.items())
    assert torch.equal(off.images, zero.images)
    assert torch.equal(off.step_size, zero.step_size)
    assert not torch.equal(off.images, on.images)
