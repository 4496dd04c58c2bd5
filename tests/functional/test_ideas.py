"""Ideas beyond FTD in float64: gradients against the full graph and differences, rules against transcriptions."""

import pytest
import torch
from torch import nn

from ftd_lightning.errors import InputError
from ftd_lightning.functional import (
    Augmentation,
    chunked_permutations,
    flatten_parameters,
    make_generator,
    roll_out,
    trajectory_matching_loss,
    unroll,
)
from ftd_lightning.functional.matching import match
from ftd_lightning.models import ConvNet
from ftd_lightning.rules import (
    ClosestStep,
    DropLargest,
    DropShallow,
    DropSmallest,
    LearnedLabels,
    LossGate,
    RobustStart,
    StartWindow,
    TargetLabels,
)
from ftd_lightning.rules.labels import mean_right_logits

STEPS = 7


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    network = ConvNet(3, 4, 8, width=6, depth=2).double()
    start = flatten_parameters(network)
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = chunked_permutations(8, STEPS, make_generator(0), batch_size=3)
    # Some steps away, so that a student comes near it, and passes it if its steps are large.
    near = unroll(network, start, images.detach(), logits.detach().argmax(1), torch.tensor(0.5), batches=batches[:4])
    target = near.detach() + 0.01 * torch.randn(start.shape, dtype=torch.float64)
    return network, start, target, images, logits, lr, batches


def loss_and_gradients(problem, *, rules=(), method="adjoint", batches=None, rule=None, **options):
    network, start, target, images, logits, lr, drawn = problem
    labels = (rule or LearnedLabels(lr=1.0)).labels(logits, lambda: logits)
    loss = trajectory_matching_loss(
        *(network, start, target, images, labels, lr),
        batches=drawn if batches is None else batches,
        augment=Augmentation("crop_scale"),
        rules=rules,
        unroll=method,
        compile=False,
        **options,
    )
    return [loss.detach(), *torch.autograd.grad(loss, (images, lr, logits))]


RULES = {
    "labels": [],
    "shallow": [DropShallow(rate=0.3)],
    "smallest": [DropSmallest(rate=0.25)],
    "largest": [DropLargest(rate=0.1)],
    "closest": [ClosestStep()],
    "all": [RobustStart(kappa=0.1), DropShallow(rate=0.3), DropSmallest(rate=0.25), ClosestStep()],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradients_in_images_step_size_and_logits_are_those_of_the_full_graph(problem, rules):
    adjoint, graph = (loss_and_gradients(problem, rules=rules, method=method) for method in ("adjoint", "graph"))
    for value, wanted in zip(adjoint, graph, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    assert all(float(gradient.abs().sum()) > 0 for gradient in adjoint[1:])


def test_the_gradient_of_the_logits_is_that_of_finite_differences(problem):
    network, start, target, images, logits, lr, batches = problem
    gradient = loss_and_gradients(problem, rules=[DropShallow(rate=0.3)])[3]
    direction = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = []
    for sign in (1, -1):
        moved = (logits + sign * 1e-6 * direction).detach().requires_grad_()
        shifted = (network, start, target, images, moved, lr, batches)
        values.append(loss_and_gradients(shifted, rules=[DropShallow(rate=0.3)])[0])
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lr", [0.1, 0.5, 3.0])
def test_the_choice_of_the_step_gives_the_gradient_of_so_many_steps(problem, lr):
    network, start, target, images, logits, _, batches = problem
    target = target.detach()
    step_size = torch.tensor(lr, dtype=torch.float64, requires_grad=True)
    problem = (network, start, target, images, logits, step_size, batches)
    with torch.no_grad():
        labels = torch.softmax(logits, 1)
        path = [
            unroll(network, start, images, labels, step_size, batches=batches[:n], augment=Augmentation("crop_scale"))
            for n in range(1, STEPS + 1)
        ]
    distances = [float((weights - target).abs().sum()) for weights in path]
    steps = max(n for n in range(STEPS) if distances[n] == min(distances)) + 1
    chosen = loss_and_gradients(problem, rules=[ClosestStep()])
    for value, wanted in zip(chosen, loss_and_gradients(problem, batches=batches[:steps]), strict=True):
        assert torch.equal(value, wanted)
    found = match(
        *(network, start, target, images, labels, step_size),
        batches=batches,
        augment=Augmentation("crop_scale"),
        rules=[ClosestStep()],
        compile=False,
    )
    assert found.steps == steps


def test_choices_are_not_always_the_same_step(problem):
    """The test above would hold for a rule that always takes the last one, if it always were."""
    network, start, target, images, logits, _, batches = problem
    counts = set()
    for lr in (0.1, 0.5, 3.0):
        found = match(
            *(network, start, target, images, logits.argmax(1), torch.tensor(lr, dtype=torch.float64)),
            batches=batches,
            rules=[ClosestStep()],
            compile=False,
        )
        counts.add(found.steps)
    assert len(counts) > 1


def test_a_roll_out_is_an_unroll_without_gradient(problem):
    network, start, _, images, logits, lr, batches = problem
    settings = {"batches": batches, "augment": Augmentation("crop"), "seed": 3, "compile": False}
    *_, last = roll_out(network, start, images, logits.argmax(1), lr, **settings)
    assert torch.equal(last, unroll(network, start, images, logits.argmax(1), lr, **settings))
    assert not last.requires_grad
    with pytest.raises(ValueError, match="8 images but 4 labels"):
        list(roll_out(network, start, images, logits.argmax(1)[:4], lr, **settings))


def test_window_is_that_of_the_paper():
    """A transcription, at all iterations around its edges."""
    low, ceiling, high, growth = 2, 5, 9, 40
    window = StartWindow(first=low, ceiling=ceiling, growth_iterations=growth)
    for iteration in (0, 1, 9, 10, 11, 39, 40, 41, 10_000):
        upper = min(high, ceiling + int((high - ceiling) * iteration / growth))
        assert list(window.start_epochs(iteration, high)) == list(range(low, upper))
    assert StartWindow(first=3).start_epochs(0, 9) == range(3, 9)
    assert StartWindow(ceiling=4, growth_iterations=10).start_epochs(0, 3) == range(3), "never above max_start_epoch"


def test_masks_keep_what_they_say():
    generator = make_generator(0)
    student, target = (torch.randn(1001, generator=generator) for _ in range(2))
    error = (student - target).square()
    shallow = DropShallow(rate=0.25).keep(student, student, target)
    assert shallow.tolist() == [index >= 250 for index in range(1001)]
    smallest, largest = DropSmallest(rate=0.25), DropLargest(rate=0.25)
    kept = smallest.keep(student, student, target)
    assert int(kept.sum()) == 751
    assert float(error[~kept].max()) <= float(error[kept].min())
    kept = largest.keep(student, student, target)
    assert int(kept.sum()) == 751
    assert float(error[~kept].min()) >= float(error[kept].max())
    for rule in (DropShallow, DropSmallest, DropLargest):
        assert bool(rule(rate=0.0).keep(student, student, target).all())


def test_masks_are_in_numerator_and_denominator(problem):
    _, start, target, *_ = problem
    network, *_ = problem
    images, labels = problem[3], problem[4].argmax(1)
    end = unroll(network, start, images, labels, problem[5], batches=problem[6], compile=False)
    kept = slice(int(len(start) * 0.4), None)
    wanted = (end - target)[kept].square().sum() / (start - target)[kept].square().sum()
    rules = [DropShallow(rate=0.4)]
    loss = trajectory_matching_loss(
        network, start, target, images, labels, problem[5], batches=problem[6], rules=rules, compile=False
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)


def test_the_gate_lets_through_what_is_not_above():
    gate = LossGate(threshold=1.0)
    said = [bool(gate.accepts(torch.tensor(loss))) for loss in (0.5, 1.0, 1.0001, float("nan"))]
    assert said == [True, True, False, True], "what is not finite is skipped, and counted as such"


def test_mean_logits_are_of_the_teachers_that_are_right():
    generator, classes = make_generator(1), torch.tensor([0, 1, 2, 0])
    answers = [torch.randn(4, 3, generator=generator) for _ in range(5)]
    answers = [torch.where((classes == 2)[:, None], torch.tensor([9.0, 0.0, -1.0]), given) for given in answers]
    found = mean_right_logits(classes, iter(answers))
    for index, label in enumerate(classes.tolist()):
        right = [given[index] for given in answers if int(given[index].argmax()) == label]
        assert bool(right) == (label != 2)
        torch.testing.assert_close(found[index], torch.stack(right or [given[index] for given in answers]).mean(0))


def test_labels_of_teachers_have_no_gradient_and_are_asked_once():
    asked = []

    def answers():
        asked.append(1)
        return torch.randn(3, 2)

    labels = TargetLabels().labels(None, answers)
    torch.testing.assert_close(labels.sum(1), torch.ones(3))
    assert len(asked) == 1
    assert not labels.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedLabels(lr=0.0), "lr=0.0 must be above 0"),
        (lambda: LearnedLabels(lr=1.0, momentum=1.0), "momentum=1.0 must lie in"),
        (lambda: LearnedLabels(lr=1.0, init="zeros"), "choose from .*teachers"),
        (lambda: StartWindow(first=-1), "first=-1 must be at least 0"),
        (lambda: StartWindow(ceiling=3), "give both or neither"),
        (lambda: StartWindow(first=3, ceiling=3, growth_iterations=5), "must be above first"),
        (lambda: LossGate(threshold=0.0), "threshold=0.0 must be above 0"),
        (lambda: DropShallow(rate=1.0), "rate=1.0 must lie in"),
        (lambda: DropSmallest(rate=-0.1), "rate=-0.1 must lie in"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_cut_by_depth_may_lie_within_a_layer():
    network = nn.Linear(3, 2)
    kept = DropShallow(rate=0.5).keep(flatten_parameters(network), flatten_parameters(network), torch.zeros(8))
    assert kept.tolist() == [False] * 4 + [True] * 4
