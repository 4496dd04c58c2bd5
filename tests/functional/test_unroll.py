"""The unrolled student: its steps against torch.optim, its gradient against finite differences and the full graph."""

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck
from torch.nn.functional import cross_entropy, one_hot, softmax

from ftd_lightning.functional import (
    InnerAdam,
    InnerOptimizer,
    InnerSGD,
    chunked_permutations,
    draws_random_numbers,
    dsa,
    flatten_parameters,
    load_flat,
    make_generator,
    roll_out,
    seeded,
    trajectory_matching_loss,
    unroll,
)
from ftd_lightning.functional.inner_step import inner_step, named_views
from ftd_lightning.models import ConvNet

METHODS = ["adjoint", "graph"]
DSA_SINGLE, DSA_MULTIPLE = (functools.partial(dsa, mode=mode) for mode in ("single", "multiple"))


@dataclass(frozen=True)
class Nesterov(InnerOptimizer):
    """A user's own: momentum that looks ahead."""

    momentum: float

    def initial(self, weights):
        return (torch.zeros_like(weights),)

    def step(self, weights, gradient, state, lr, count):
        velocity = self.momentum * state[0] + gradient
        return weights - lr * (gradient + self.momentum * velocity), (velocity,)


OPTIMIZERS = {
    "plain": InnerSGD(),
    "momentum and decay": InnerSGD(momentum=0.7, weight_decay=0.05),
    "decay": InnerSGD(weight_decay=0.1),
    "adam": InnerAdam(betas=(0.8, 0.99), eps=1e-3),
    "own": Nesterov(0.8),
}


def problem(seed=0, *, num_images=7, size=8, num_steps=8, batch_size=3, dtype=torch.float64, channels=3, **options):
    """A small student and synthetic set; 7 images in batches of 3 leave a smaller last chunk (3, 3, 1)."""
    with seeded(seed, "problem"):
        network = ConvNet(channels, 3, size, **{"width": 4, "depth": 2, **options}).to(dtype)
        start = flatten_parameters(network)
        target = start + 0.1 * torch.randn_like(start)
        images = torch.randn(num_images, channels, size, size, dtype=dtype)
        soft = softmax(torch.randn(num_images, 3, dtype=dtype), dim=1)
        # A student that used the network's own weights would be seen.
        load_flat(network, torch.randn_like(start))
    return SimpleNamespace(
        network=network,
        start=start,
        target=target,
        images=images.requires_grad_(),
        labels=torch.arange(num_images) % 3,
        soft=soft,
        lr=torch.tensor(0.3, dtype=dtype, requires_grad=True),
        batches=chunked_permutations(num_images, num_steps, make_generator(seed, "batches"), batch_size=batch_size),
    )


def student_of(p, method="adjoint", **changes):
    given = {"start": p.start, "images": p.images, "labels": p.labels, "step_size": p.lr, "batches": p.batches}
    return unroll(p.network, **given | changes, method=method)


def loss_of(p, method="adjoint", **changes):
    given = {"start": p.start, "target": p.target, "images": p.images, "labels": p.labels, "step_size": p.lr}
    return trajectory_matching_loss(p.network, **given | {"batches": p.batches} | changes, unroll=method)


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_match_finite_differences(method):
    """In images, step size, soft labels and start; sigmoid and average pooling have no kinks."""
    small = {"num_images": 2, "size": 4, "num_steps": 3, "batch_size": 1, "channels": 1, "width": 2, "depth": 1}
    p = problem(**small, activation="sigmoid")

    def function(images, lr, soft, start):
        return loss_of(p, method, images=images, step_size=lr, labels=soft, start=start, augment=DSA_MULTIPLE)

    assert gradcheck(function, (p.images, p.lr, p.soft.requires_grad_(), p.start.requires_grad_()))


@pytest.mark.parametrize(("augment", "norm"), [(DSA_SINGLE, "batch"), (DSA_MULTIPLE, "instance"), (None, "batch")])
def test_adjoint_equals_the_full_graph(augment, norm):
    p = problem(norm=norm)
    assert {len(batch) for batch in p.batches} == {3, 1}
    inputs = [p.images, p.lr, p.soft.requires_grad_(), p.start.requires_grad_()]
    results = []
    for method in METHODS:
        loss = loss_of(p, method, labels=p.soft, augment=augment, seed=1)
        results.append([loss.detach(), *grad(loss, inputs)])
    for adjoint, graph in zip(*results, strict=True):
        assert graph.norm() > 0
        assert relative_difference(adjoint, graph) < 1e-10


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("step_sizes", [[0.05], [0.02, 0.05, 0.1, 0.04, 0.03, 0.06]], ids=["one", "each"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_adjoint_of_any_optimizer_equals_the_full_graph(optimizer, step_sizes, skip):
    # Without normalisation: a bias before one has a gradient of rounding errors, which Adam scales to its step size.
    p = problem(num_steps=6, norm="none")
    lr = torch.tensor(step_sizes if len(step_sizes) > 1 else step_sizes[0], dtype=torch.float64).requires_grad_()
    inputs = [p.images, p.soft.requires_grad_(), lr, *([] if skip else [p.start.requires_grad_()])]
    results = []
    for method in METHODS:
        options = {"labels": p.soft, "step_size": lr, "augment": DSA_MULTIPLE, "optimizer": optimizer, "skip": skip}
        end = student_of(p, method, **options)
        results.append([end.detach(), *grad((end * p.target).sum(), inputs)])
    for adjoint, graph in zip(*results, strict=True):
        torch.testing.assert_close(adjoint, graph, rtol=1e-9, atol=1e-12)
    if lr.ndim:
        assert results[0][3].ne(0).tolist() == [step >= skip for step in range(6)]
    if skip:  # the same steps, without the gradient of the first ones
        whole = student_of(p, **{**options, "skip": 0})
        assert whole.detach().equal(results[0][0])
        assert relative_difference(results[0][1], grad((whole * p.target).sum(), p.images)[0]) > 0.01


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("momentum", [None, [0.6], [0.5, 0.3, 0.7, 0.9, 0.1, 0.4]], ids=["plain", "one", "each"])
def test_losses_after_every_step_and_a_learned_momentum_against_the_full_graph(momentum, skip):
    p = problem(num_steps=6, norm="none")
    lr = torch.tensor([0.02, 0.05, 0.1, 0.04, 0.03, 0.06], dtype=torch.float64, requires_grad=True)
    inputs, optimizer = [p.images, lr, *([] if skip else [p.start.requires_grad_()])], InnerSGD()
    if momentum:
        learned = torch.tensor(momentum if len(momentum) > 1 else momentum[0], dtype=torch.float64, requires_grad=True)
        inputs, optimizer = [*inputs, learned], InnerSGD(momentum=learned, weight_decay=0.05)
    results, weighting = [], torch.randn(6 - skip, len(p.start), dtype=torch.float64)
    for method in METHODS:
        path = student_of(p, method, step_size=lr, augment=DSA_MULTIPLE, optimizer=optimizer, skip=skip, path=True)
        results.append([path.detach(), *grad((path.sin() * weighting).sum(), inputs)])
    for adjoint, graph in zip(*results, strict=True):
        assert graph.norm() > 0
        torch.testing.assert_close(adjoint, graph, rtol=1e-9, atol=1e-12)
    arguments = (p.network, p.start, p.images, p.labels, lr)
    steps = list(roll_out(*arguments, batches=p.batches, augment=DSA_MULTIPLE, optimizer=optimizer))
    assert torch.stack(steps[skip:]).equal(results[0][0])
    if momentum and len(momentum) > 1:  # the first velocity is 0
        assert results[0][-1].ne(0).tolist() == [step >= max(skip, 1) for step in range(6)]


def test_a_learned_momentum_and_losses_after_every_step_against_differences_and_a_number():
    small = {"num_images": 2, "size": 4, "num_steps": 3, "batch_size": 1, "channels": 1, "width": 2, "depth": 1}
    p = problem(**small, activation="sigmoid")

    def function(images, lr, momentum):
        options = {"optimizer": InnerSGD(momentum=momentum), "path": True}
        return (student_of(p, images=images, step_size=lr, **options) - p.target).square().sum(1)

    momentum = torch.tensor([0.5, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, (p.images, p.lr, momentum))
    known = student_of(p, optimizer=InnerSGD(momentum=0.7))
    learned = student_of(p, optimizer=InnerSGD(momentum=torch.tensor(0.7, dtype=torch.float64)))
    torch.testing.assert_close(learned, known, rtol=1e-12, atol=0)


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("name", ["plain", "momentum and decay", "adam"])
def test_bf16_adjoint_equals_the_full_graph_in_bf16(name, skip):
    """Both are the gradient of the steps that were made; float32's differs by more."""
    p = problem(num_steps=6, norm="none", activation="sigmoid", dtype=torch.float32)
    inputs = [p.images, p.lr, p.soft.requires_grad_(), *([] if skip else [p.start.requires_grad_()])]
    options = {"labels": p.soft, "augment": DSA_MULTIPLE, "optimizer": OPTIMIZERS[name], "skip": skip}

    def results(method, precision):
        end = student_of(p, method, **options, precision=precision)
        found = [end.detach(), *grad((end * p.target).sum(), inputs)]
        assert {tensor.dtype for tensor in found} == {torch.float32}
        return found

    adjoint, graph, float32 = results("adjoint", "bf16"), results("graph", "bf16"), results("adjoint", "float32")
    assert adjoint[0].equal(graph[0])
    for exact, full, other in zip(adjoint, graph, float32, strict=True):
        assert relative_difference(exact, full) < 0.01
        assert 0 < relative_difference(exact, other) < 0.1
    del options["labels"], options["skip"]
    arguments = (p.network, p.start, p.images, p.soft, p.lr)
    *_, last = roll_out(*arguments, batches=p.batches, **options, precision="bf16")
    assert last.equal(adjoint[0])


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_hessian_vector_products_in_bf16_of_10_images_and_maps_of_16_px(norm):
    """What oneDNN computes there is wrong by 10 % in the second convolution; BatchNorm stays in float32."""
    p = problem(num_images=10, size=32, norm=norm, activation="sigmoid", width=32, dtype=torch.float32)
    x, gamma = p.images.detach(), torch.randn(p.start.shape, generator=make_generator(0))
    steps = [inner_step(p.network, device=x.device, precision=precision) for precision in ("bf16", "float32")]
    products = [step.product(p.network, p.start, x, p.labels, gamma, (True, False))[1] for step in steps]
    bf16, float32 = (named_views(p.network, product)["4.weight"] for product in products)
    assert relative_difference(bf16, float32) < 0.04
    assert bf16.equal(float32) == (norm == "batch")


THEIRS = {
    "plain": lambda weights: torch.optim.SGD(weights, lr=0.05),
    "momentum and decay": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.7, weight_decay=0.05),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.05, betas=(0.8, 0.99), eps=1e-3),
}


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("name", THEIRS)
def test_steps_are_those_of_torch(name, norm):
    """An independent loop on a network's own parameters: no flat vector, no functional call."""
    p = problem(norm=norm)
    network = copy.deepcopy(p.network)
    load_flat(network, p.start)
    theirs, lr = THEIRS[name](network.parameters()), torch.tensor(0.05, dtype=torch.float64)
    arguments = (p.network, p.start, p.images, p.labels, lr)
    ours = list(roll_out(*arguments, batches=p.batches, optimizer=OPTIMIZERS[name]))
    for index, weights in zip(p.batches, ours, strict=True):
        theirs.zero_grad()
        cross_entropy(network(p.images.detach()[index]), p.labels[index]).backward()
        theirs.step()
        torch.testing.assert_close(weights, flatten_parameters(network), rtol=1e-9, atol=1e-12)
    assert relative_difference(ours[-1], p.start) > 0.01
    for method in METHODS:
        end = student_of(p, method, step_size=lr, optimizer=OPTIMIZERS[name])
        torch.testing.assert_close(end.detach(), ours[-1], rtol=1e-9, atol=1e-12)


def test_adam_with_gradients_that_are_zero_has_a_finite_adjoint():
    """The second moment of a hidden unit that is never on stays 0, where the root has no derivative."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    start = flatten_parameters(network)
    start[12:15] = -100.0
    images = torch.rand(4, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = [torch.arange(4)] * 3
    end = unroll(network, start, images, torch.tensor([0, 1, 0, 1]), lr, batches=batches, optimizer=InnerAdam())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in grad(end.sum(), (images, lr)))


@pytest.mark.parametrize("method", METHODS)
def test_linear_softmax_network_in_closed_form(method):
    """One step of softmax regression, everything by hand: theta_1 = theta - lr * mean((p - y) x^T)."""
    generator = make_generator(0)
    images = torch.randn(5, 1, 1, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    start = torch.randn(12, generator=generator, dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    lr = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    student = unroll(network, start, images, labels, lr, batches=[torch.arange(5)], method=method)
    x, weights = images.flatten(1), start.view(3, 4)
    gradient = (softmax(x @ weights.T, dim=1) - one_hot(labels, 3)).T @ x / 5
    torch.testing.assert_close(student.detach(), (weights - 0.7 * gradient).flatten())
    torch.testing.assert_close(grad(student.sum(), lr)[0], -gradient.sum())
    soft = one_hot(labels, 3).double()
    torch.testing.assert_close(unroll(network, start, images, soft, lr, batches=[torch.arange(5)]), student)
    with torch.no_grad():
        assert unroll(network, start, images, labels, lr, batches=[torch.arange(5)], method=method).equal(student)


def test_indices_may_repeat_within_and_across_batches():
    p = problem(norm="batch")
    batches = [torch.tensor(index) for index in ([0, 1, 1], [1, 1, 1, 2], [2, 0], [0, 0])]
    adjoint, graph = (grad(loss_of(p, m, batches=batches, augment=DSA_MULTIPLE), p.images)[0] for m in METHODS)
    assert relative_difference(adjoint, graph) < 1e-10
    assert (adjoint.flatten(1).norm(dim=1) > 0).tolist() == [True] * 3 + [False] * 4, "images in no batch have none"


@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_goes_in_is_changed(method):
    p = problem(norm="batch")
    given = [p.start, p.target, p.images, p.lr]
    before = copy.deepcopy((p.network.state_dict(), given))
    state = torch.get_rng_state()
    loss_of(p, method, augment=DSA_MULTIPLE).backward()
    assert all(value.equal(before[0][name]) for name, value in p.network.state_dict().items())
    assert all(t.equal(b) for t, b in zip(given, before[1], strict=True))
    assert all(w.grad is None and w.requires_grad for w in p.network.parameters())
    assert torch.get_rng_state().equal(state)
    student = student_of(p, method, batches=[])
    assert student.equal(p.start)
    assert student.data_ptr() != p.start.data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_and_the_step_decide_the_augmentation(method):
    p = problem()
    losses = [loss_of(p, method, augment=DSA_MULTIPLE, seed=seed).item() for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    drawn = []

    def record(images, generator):
        drawn.append(torch.rand((), generator=generator).item())
        return images

    loss_of(p, method, augment=record).backward()
    steps = len(p.batches)
    assert len(set(drawn[:steps])) == steps
    # The adjoint visits the steps again, last one first, and must see what the forward run saw.
    assert drawn[steps:] == (drawn[:steps][::-1] if method == "adjoint" else [])


def test_adjoint_refuses_what_it_would_get_wrong():
    p = problem()
    first = grad(loss_of(p), p.lr, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()
    loss = loss_of(p)
    with torch.no_grad():
        p.images.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Prior(nn.Module):
    """Logits that depend on no image, so that a step has no mixed second-order term, and a weight without use."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.logits.expand(len(images), 2)


def test_terms_that_do_not_exist_are_zero():
    images = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.1, 0.4, 1.0, 2.0, 3.0], dtype=torch.float64)
    batches = [torch.tensor([0, 1, 1])] * 3
    student = {m: unroll(Prior(), start, images, torch.tensor([0, 1]), lr, batches=batches, method=m) for m in METHODS}
    in_images, in_lr = grad(student["adjoint"].square().sum(), [images, lr])
    assert bool(in_images.eq(0).all())
    torch.testing.assert_close(in_lr, grad(student["graph"].square().sum(), lr)[0])


class Tied(nn.Module):
    """One weight matrix under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.second(self.first(images.flatten(1)).tanh())


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_count_once_and_train_together(method):
    with seeded(0):
        network = Tied().double()
    start = flatten_parameters(network)
    assert start.shape == (16 + 4 + 4,)
    images = torch.randn(3, 1, 2, 2, generator=make_generator(0), dtype=torch.float64)
    labels, lr = torch.tensor([0, 1, 2]), torch.tensor(0.4, dtype=torch.float64)
    student = unroll(network, start, images, labels, lr, batches=[torch.arange(3)] * 2, method=method)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.4)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(student.detach(), flatten_parameters(network))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": torch.zeros(5, dtype=torch.float64)}, r"weights have shape \(5,\), the network takes"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "7 images but 6 labels"),
        ({"method": "tape"}, r"unroll 'tape' is unknown: choose from \['adjoint', 'graph'\]"),
        ({"step_size": torch.full((5,), 0.1)}, "one for all, or one for each of 8 steps"),
        ({"skip": 9}, "skip=9 must lie in 0 to 8"),
        ({"precision": "bf61"}, r"precision='bf61' is unknown: choose from \['float32', 'bf16'\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        student_of(problem(), **changes)


class Random(nn.Module):
    """A network that draws random numbers in training mode."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm, self.linear, self.dropout = kind, nn.BatchNorm2d(1), nn.Linear(16, 2), nn.Dropout(0.5)

    def forward(self, images):
        x = self.norm(images).flatten(1)
        if self.kind == "dropout":
            x = self.dropout(x)
        elif self.kind == "drop path" and self.training:
            x = x * (torch.rand(len(x), 1, dtype=x.dtype) < 0.5)
        return self.linear(x)


def random_student(kind, *, training=True):
    network = Random(kind).double().train(training)
    images = torch.randn(4, 1, 4, 4, generator=make_generator(0), dtype=torch.float64, requires_grad=True)
    arguments = (flatten_parameters(network), images, torch.tensor([0, 1, 0, 1]), torch.tensor(0.1))
    return network, arguments, {"batches": [torch.arange(4)] * 2}


@pytest.mark.parametrize("kind", ["dropout", "drop path"])
def test_a_network_that_draws_random_numbers_is_refused(kind, refused):
    """Its adjoint would repeat each step with other draws."""
    network, arguments, options = random_student(kind)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    for method in METHODS:  # a refusal is not remembered as a pass
        with refused("Random draws random numbers", "a function of its weights"):
            unroll(network, *arguments, **options, method=method)
    assert draws_random_numbers(network, arguments[1].detach())
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    unroll(network.eval(), *arguments, **options).sum().backward()
    with refused("draws random numbers"):
        unroll(network.train(), *arguments, **options)


@pytest.mark.cuda
def test_draws_from_the_generator_of_a_gpu_are_noticed():
    network, (_, images, *_), _ = random_student("dropout")
    network, images = network.float().cuda(), images.detach().float().cuda()
    state = torch.cuda.get_rng_state()
    assert draws_random_numbers(network, images)
    assert not draws_random_numbers(network.eval(), images)
    assert torch.cuda.get_rng_state().equal(state)


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 3), (12, 4)])
def test_every_cycle_of_chunks_covers_every_image_once(num_images, batch_size):
    cycle = -(-num_images // batch_size)
    chunks = chunked_permutations(num_images, 2 * cycle + 1, make_generator(0), batch_size=batch_size)
    sizes = [batch_size] * (num_images // batch_size) + [num_images % batch_size] * (num_images % batch_size > 0)
    assert [len(chunk) for chunk in chunks] == [*sizes, *sizes, batch_size]
    orders = [torch.cat(chunks[i * cycle : (i + 1) * cycle]) for i in range(2)]
    assert all(order.sort().values.equal(torch.arange(num_images)) for order in orders)
    assert not orders[0].equal(orders[1])
    for all_at_once in (None, num_images, 100):
        chunks = chunked_permutations(num_images, 3, make_generator(0), batch_size=all_at_once)
        assert [chunk.tolist() for chunk in chunks] == [list(range(num_images))] * 3


def test_weights_to_a_vector_and_back():
    p = problem(norm="batch")
    other = copy.deepcopy(p.network)
    kept = [parameter.data_ptr() for parameter in other.parameters()]
    load_flat(other, p.start)
    assert flatten_parameters(other).equal(p.start)
    assert [parameter.data_ptr() for parameter in other.parameters()] == kept, "weights are filled, not exchanged"
    network = nn.Linear(2, 3)
    load_flat(network, torch.arange(9.0))
    snapshot = flatten_parameters(network)
    assert (network.weight.tolist(), network.bias.tolist()) == ([[0, 1], [2, 3], [4, 5]], [6, 7, 8])
    with pytest.raises(ValueError, match=r"weights have shape \(8,\), the network takes \(9,\)"):
        load_flat(network, torch.zeros(8))
    load_flat(network, torch.zeros(9))
    assert snapshot.equal(torch.arange(9.0)), "a record does not follow the live weights"
    assert not snapshot.requires_grad


def test_gradient_holds_the_second_order_terms_across_steps():
    """A truncated gradient, which sends the matching loss's gradient to every step as it is, must be far off."""
    p = problem(num_steps=12)
    exact = grad(loss_of(p), p.images)[0]
    residual = 2 * (student_of(p) - p.target).detach() / (p.start - p.target).square().sum()
    truncated = torch.zeros_like(exact)
    for step, index in enumerate(p.batches):
        weights = student_of(p, batches=p.batches[:step]).detach()
        truncated += grad(student_of(p, "graph", start=weights, batches=[index]), p.images, residual)[0]
    assert relative_difference(truncated, exact) > 0.01
