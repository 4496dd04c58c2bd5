"""The unrolled student: its numbers against plain training, its gradient against differences and the full graph."""

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, dropout, one_hot, scaled_dot_product_attention, softmax

from ftd_lightning.functional import (
    InnerSGD,
    chunked_permutations,
    draws_random_numbers,
    dsa,
    flatten_parameters,
    load_flat,
    make_generator,
    seeded,
    trajectory_matching_loss,
    unroll,
)
from ftd_lightning.functional import unroll as student_module
from ftd_lightning.models import ConvNet

METHODS = ["adjoint", "graph"]
DSA_SINGLE, DSA_MULTIPLE = (functools.partial(dsa, mode=mode) for mode in ("single", "multiple"))


def problem(seed=0, *, num_images=7, size=8, num_steps=8, batch_size=3, dtype=torch.float64, channels=3, **options):
    """A small student and synthetic set; 7 images in batches of 3 leave a smaller last chunk (3, 3, 1)."""
    with seeded(seed, "problem"):
        network = ConvNet(channels, 3, size, **{"width": 4, "depth": 2, **options}).to(dtype)
        start = flatten_parameters(network)
        target = start + 0.1 * torch.randn_like(start)
        images = torch.randn(num_images, channels, size, size, dtype=dtype)
        soft = softmax(torch.randn(num_images, 3, dtype=dtype), dim=1)
        # The network's own weights are others than the start, so that a student which used them would be seen.
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


def student_of(p, method, **changes):
    given = {"start": p.start, "images": p.images, "labels": p.labels, "step_size": p.lr, "batches": p.batches}
    return unroll(p.network, **given | changes, method=method)


def loss_of(p, method, **changes):
    given = {"start": p.start, "target": p.target, "images": p.images, "labels": p.labels, "step_size": p.lr}
    return trajectory_matching_loss(p.network, **given | {"batches": p.batches} | changes, unroll=method)


def relative_difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def smooth():
    """No kinks (sigmoid, average pooling), so that differences approach the gradient; few numbers, so it is quick."""
    small = {"num_images": 3, "size": 4, "num_steps": 4, "batch_size": 2, "channels": 1, "width": 2, "depth": 1}
    return problem(**small, activation="sigmoid")


@pytest.mark.parametrize("augment", [None, DSA_MULTIPLE], ids=["plain", "dsa"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_images_and_step_size_matches_finite_differences(smooth, method, augment):
    def function(images, lr):
        return loss_of(smooth, method, images=images, step_size=lr, augment=augment)

    assert gradcheck(function, (smooth.images, smooth.lr))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_soft_labels_matches_finite_differences(smooth, method):
    assert gradcheck(lambda soft: loss_of(smooth, method, labels=soft), (smooth.soft.requires_grad_(),))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_the_start_matches_finite_differences(smooth, method):
    assert gradcheck(lambda start: loss_of(smooth, method, start=start), (smooth.start.requires_grad_(),))


@pytest.mark.parametrize(
    ("augment", "norm", "seed"),
    [
        (DSA_SINGLE, "instance", 0),
        (DSA_SINGLE, "batch", 1),
        (DSA_MULTIPLE, "instance", 2),
        (DSA_MULTIPLE, "batch", 0),
    ],
    ids=["single-instance", "single-batch", "multiple-instance", "multiple-batch"],
)
def test_adjoint_equals_the_full_graph(augment, norm, seed):
    p = problem(seed, norm=norm)
    assert {len(batch) for batch in p.batches} == {3, 1}
    inputs = [p.images, p.lr, p.soft.requires_grad_(), p.start.requires_grad_()]
    results = []
    for method in METHODS:
        loss = loss_of(p, method, labels=p.soft, augment=augment, seed=seed)
        results.append([loss.detach(), *grad(loss, inputs)])
    for adjoint, graph in zip(*results, strict=True):
        assert graph.norm() > 0
        assert relative_difference(adjoint, graph) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_gradient_holds_the_second_order_terms_across_steps(method):
    """A truncated gradient, which sends the matching loss's gradient to every step as it is, must be far off."""
    p = problem(num_steps=12)
    exact = grad(loss_of(p, method), p.images)[0]
    residual = 2 * (student_of(p, "adjoint") - p.target).detach() / (p.start - p.target).square().sum()
    truncated = torch.zeros_like(exact)
    for step, index in enumerate(p.batches):
        weights = student_of(p, "adjoint", batches=p.batches[:step]).detach()
        truncated += grad(student_of(p, "graph", start=weights, batches=[index]), p.images, residual)[0]
    assert relative_difference(truncated, exact) > 0.01


@pytest.mark.parametrize(
    ("method", "norm"), [("adjoint", "instance"), ("adjoint", "batch"), ("adjoint", "none"), ("graph", "batch")]
)
def test_student_equals_plain_sgd_training(method, norm):
    """An independent loop: torch.optim.SGD on a network's own parameters, no flat vector, no functional call."""
    p = problem(norm=norm)
    network = copy.deepcopy(p.network)
    load_flat(network, p.start)
    optimizer = torch.optim.SGD(network.parameters(), lr=p.lr.item())
    for index in p.batches:
        optimizer.zero_grad()
        cross_entropy(network(p.images.detach()[index]), p.labels[index]).backward()
        optimizer.step()
    expected = flatten_parameters(network)
    assert relative_difference(expected, p.start) > 0.01
    torch.testing.assert_close(student_of(p, method).detach(), expected, rtol=1e-11, atol=1e-13)


class Counted(torch.autograd.Function):
    """Does nothing, and counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Counted.passes += 1
        return gradient


@pytest.mark.parametrize("optimizer", [InnerSGD(), InnerSGD(momentum=0.9)], ids=["plain", "momentum"])
def test_images_that_need_no_gradient_cost_none(optimizer, monkeypatch):
    p, results = problem(), []
    for images in (p.images, p.images.detach()):
        monkeypatch.setattr(Counted, "passes", 0)
        soft = p.soft.detach().requires_grad_()
        settings = {"batches": p.batches, "augment": lambda x, generator: Counted.apply(x), "optimizer": optimizer}
        end = unroll(p.network, p.start, images, soft, p.lr, **settings)
        results.append(grad(end.sum(), soft)[0])
        assert Counted.passes == (len(p.batches) if images.requires_grad else 0)
    assert results[1].equal(results[0])


@pytest.mark.parametrize("method", METHODS)
def test_integer_labels_equal_one_hot_labels(method):
    p = problem()
    hard = grad(loss_of(p, method), p.images)[0]
    soft = grad(loss_of(p, method, labels=one_hot(p.labels, 3).double()), p.images)[0]
    assert relative_difference(soft, hard) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_no_batches_leave_the_start(method):
    p = problem()
    student = student_of(p, method, batches=[])
    assert student.equal(p.start)
    assert student.data_ptr() != p.start.data_ptr()


def test_indices_may_repeat_within_and_across_batches():
    p = problem(norm="batch")
    batches = [torch.tensor(index) for index in ([0, 1, 1], [1, 1, 1, 2], [2, 0], [0, 0])]
    adjoint, graph = (grad(loss_of(p, m, batches=batches, augment=DSA_MULTIPLE), p.images)[0] for m in METHODS)
    assert relative_difference(adjoint, graph) < 1e-10
    assert bool((adjoint[:3].flatten(1).norm(dim=1) > 0).all())
    assert bool(adjoint[3:].eq(0).all()), "images in no batch have no gradient"


@pytest.mark.parametrize(("method", "norm"), [("adjoint", "instance"), ("adjoint", "batch"), ("graph", "batch")])
def test_network_is_left_as_it_was(method, norm):
    p = problem(norm=norm)
    before = {name: value.clone() for name, value in p.network.state_dict().items()}
    assert ("1.num_batches_tracked" in before) == (norm == "batch")
    loss_of(p, method, augment=DSA_SINGLE).backward()
    after = p.network.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert all(w.grad is None and w.requires_grad for w in p.network.parameters())
    assert p.network.training


@pytest.mark.parametrize("method", METHODS)
def test_the_networks_own_weights_are_not_used(method):
    p = problem()
    loss = loss_of(p, method)
    load_flat(p.network, torch.full_like(p.start, torch.nan))
    assert loss_of(p, method).equal(loss)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_and_global_generator_are_left_as_they_were(method):
    p = problem()
    before = [t.detach().clone() for t in (p.start, p.target, p.images, p.lr)]
    state = torch.get_rng_state()
    loss_of(p, method, augment=DSA_MULTIPLE).backward()
    assert all(t.equal(b) for t, b in zip((p.start, p.target, p.images, p.lr), before, strict=True))
    assert torch.get_rng_state().equal(state)
    assert not p.start.requires_grad


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
    assert len(set(drawn[:steps])) == steps, "every inner step draws anew"
    # The adjoint visits the steps again, last one first, and must see what the forward run saw.
    assert drawn[steps:] == (drawn[:steps][::-1] if method == "adjoint" else [])


def test_adjoint_refuses_images_that_changed_before_backward():
    p = problem()
    loss = loss_of(p, "adjoint")
    with torch.no_grad():
        p.images.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adjoint_refuses_a_second_derivative():
    p = problem()
    first = grad(loss_of(p, "adjoint"), p.lr, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()


@pytest.mark.parametrize("method", METHODS)
def test_backward_may_run_twice_where_the_graph_is_kept(method):
    p = problem()
    loss = loss_of(p, method, augment=DSA_MULTIPLE)
    first, second = (grad(loss, [p.images, p.lr], retain_graph=True) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_evaluating_the_adjoint_loss_needs_no_gradients():
    p = problem()
    with torch.no_grad():
        loss = loss_of(p, "adjoint")
    assert not loss.requires_grad
    assert loss.equal(loss_of(p, "adjoint").detach())


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
    # d theta_1 / d lr = -gradient: no second-order term in a single step's learning rate.
    torch.testing.assert_close(grad(student.sum(), lr)[0], -gradient.sum())


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
    assert student["adjoint"][2:].equal(start[2:])
    in_images, in_lr = grad(student["adjoint"].square().sum(), [images, lr])
    assert bool(in_images.eq(0).all())
    torch.testing.assert_close(in_lr, grad(student["graph"].square().sum(), lr)[0])


@pytest.mark.parametrize(
    ("method", "augment"),
    [
        ("adjoint", lambda x, generator: torch.ones_like(x)),
        ("adjoint", lambda x, generator: 0 * x),
        ("graph", lambda x, generator: 0 * x),
    ],
    ids=["constant", "zero", "graph"],
)
def test_an_augmentation_that_ignores_its_images_gives_them_no_gradient(method, augment):
    p = problem()
    loss = loss_of(p, method, augment=augment)
    in_images, in_lr = grad(loss, [p.images, p.lr], allow_unused=True, materialize_grads=True)
    assert bool(in_images.eq(0).all())
    assert in_lr != 0


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


class Parcel:
    def __init__(self, tensor):
        self.tensor = tensor


class SavedBytes:
    """Counts the bytes that autograd keeps for a backward pass: now, and at the most so far."""

    def __init__(self):
        self.now = self.peak = 0
        self.hooks = saved_tensors_hooks(self.pack, lambda parcel: parcel.tensor)

    def pack(self, tensor):
        size = tensor.numel() * tensor.element_size()
        parcel = Parcel(tensor.detach())
        weakref.finalize(parcel, self.release, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        return parcel

    def release(self, size):
        self.now -= size


def saved_bytes(method, num_steps):
    p = problem(size=16, num_images=8, batch_size=None, num_steps=num_steps, dtype=torch.float32, width=16)
    counter = SavedBytes()
    with counter.hooks:
        loss = loss_of(p, method, augment=DSA_MULTIPLE)
        kept = counter.now
        loss.backward()
    return kept, counter.peak, p.start.numel() * 4


def test_memory_of_the_adjoint_grows_by_the_weights_alone():
    kept_5, peak_5, weights = saved_bytes("adjoint", 5)
    kept_20, peak_20, _ = saved_bytes("adjoint", 20)
    assert kept_20 - kept_5 == 15 * weights
    # The most that was ever kept, one step's graph in the backward pass included, grows no faster.
    assert peak_20 - peak_5 == 15 * weights
    assert peak_5 > kept_5
    graph_5, _, _ = saved_bytes("graph", 5)
    graph_20, _, _ = saved_bytes("graph", 20)
    assert graph_20 - graph_5 > 20 * 15 * weights, "the counter sees activations where they are kept"


@pytest.mark.parametrize(("method", "length"), [("adjoint", -1), ("graph", 1)])
def test_start_of_another_network_is_refused(method, length):
    p = problem()
    wrong = torch.zeros(len(p.start) + length, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"weights have shape \({len(wrong)},\), the network takes \({len(p.start)},"):
        student_of(p, method, start=wrong)


def test_start_in_another_shape_is_refused():
    p = problem()
    with pytest.raises(ValueError, match="the network takes"):
        student_of(p, "adjoint", start=p.start[None])


@pytest.mark.parametrize("method", METHODS)
def test_labels_that_do_not_fit_the_images_are_refused(method):
    p = problem()
    with pytest.raises(ValueError, match="7 images but 6 labels"):
        loss_of(p, method, labels=p.labels[:6])


def test_unknown_unroll_is_refused():
    p = problem()
    with pytest.raises(ValueError, match=r"unroll 'tape' is unknown: choose from \['adjoint', 'graph'\]"):
        loss_of(p, "tape")


@pytest.mark.parametrize(
    ("layer", "method"), [(nn.Dropout, "adjoint"), (nn.Dropout2d, "graph"), (nn.AlphaDropout, "adjoint")]
)
def test_active_dropout_is_refused_and_inactive_dropout_is_not(layer, method, refused):
    p = problem()
    p.network.insert(0, layer(0.5))
    with refused("dropout '0' is active", "p to 0"):
        loss_of(p, method)
    p.network[0].p = 0.0
    without = loss_of(p, method)
    p.network[0].p = 0.5
    p.network[0].eval()
    assert loss_of(p, method).equal(without)


class Random(nn.Module):
    """A network that draws random numbers in training mode without a dropout module."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm, self.linear = kind, nn.BatchNorm2d(1), nn.Linear(16, 2)

    def forward(self, images):
        x = self.norm(images).flatten(1)
        if self.kind == "functional dropout":
            x = dropout(x, 0.5, training=self.training)
        elif self.kind == "attention dropout":
            x = x.view(-1, 4, 4)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
                x = scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0).flatten(1)
        elif self.kind == "drop path" and self.training:
            x = x * (torch.rand(len(x), 1, dtype=x.dtype) < 0.5)
        return self.linear(x)


def random_student(kind, *, training=True):
    network = Random(kind).double().train(training)
    images = torch.randn(4, 1, 4, 4, generator=make_generator(0), dtype=torch.float64, requires_grad=True)
    arguments = (flatten_parameters(network), images, torch.tensor([0, 1, 0, 1]), torch.tensor(0.1))
    return network, arguments, {"batches": [torch.arange(4)] * 2}


KINDS = ["functional dropout", "attention dropout", "drop path"]


@pytest.mark.parametrize(
    ("kind", "method"), [(KINDS[0], "adjoint"), (KINDS[0], "graph"), (KINDS[1], "adjoint"), (KINDS[2], "adjoint")]
)
def test_a_network_that_draws_random_numbers_is_refused(kind, method, refused):
    """Its adjoint would repeat each step with other draws, and so be wrong without a sign of it."""
    network, arguments, options = random_student(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    for _ in range(2):  # a refusal is not remembered as a pass
        with refused("Random draws random numbers", "a function of its weights"):
            unroll(network, *arguments, **options, method=method)
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_network_passes_in_evaluation_mode_and_is_refused_in_training_mode_after_it(kind, refused):
    network, arguments, options = random_student(kind, training=False)
    unroll(network, *arguments, **options).sum().backward()
    with refused("draws random numbers"):
        unroll(network.train(), *arguments, **options)


def test_the_check_of_a_network_runs_once_per_mode_and_does_not_keep_the_network(monkeypatch):
    checked = []
    monkeypatch.setattr(
        student_module, "draws_random_numbers", lambda *args, **options: bool(checked.append(args[0].training))
    )
    network, arguments, options = random_student("none")
    for training in (True, True, False, True, False):
        unroll(network.train(training), *arguments, **options)
    assert checked == [True, False]
    held = weakref.ref(network)
    del network
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(("kind", "draws"), [*((kind, True) for kind in KINDS), ("none", False)])
def test_draws_random_numbers_leaves_generator_and_buffers_as_they_were(kind, draws):
    network, (_, images, *_), _ = random_student(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert draws_random_numbers(network, images.detach()) is draws
    assert not draws_random_numbers(network.eval(), images.detach())
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS[:2])
def test_draws_from_the_generator_of_a_gpu_are_noticed(kind):
    network, (_, images, *_), _ = random_student(kind)
    network, images = network.float().cuda(), images.detach().float().cuda()
    state = torch.cuda.get_rng_state()
    assert draws_random_numbers(network, images)
    assert not draws_random_numbers(network.eval(), images)
    assert torch.cuda.get_rng_state().equal(state)


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 3), (12, 4), (5, 1), (7, 6), (100, 33)])
def test_every_cycle_of_chunks_covers_every_image_once(num_images, batch_size):
    cycle = -(-num_images // batch_size)
    chunks = chunked_permutations(num_images, 3 * cycle + 1, make_generator(0), batch_size=batch_size)
    assert len(chunks) == 3 * cycle + 1
    sizes = [batch_size] * (num_images // batch_size) + [num_images % batch_size] * (num_images % batch_size > 0)
    assert [len(chunk) for chunk in chunks[:cycle]] == sizes
    orders = [torch.cat(chunks[i * cycle : (i + 1) * cycle]) for i in range(3)]
    assert all(order.dtype == torch.int64 for order in orders)
    assert all(order.sort().values.equal(torch.arange(num_images)) for order in orders)
    assert not orders[0].equal(orders[1]), "each cycle is a permutation of its own"
    assert len(chunks[-1]) == sizes[0]


@pytest.mark.parametrize("batch_size", [None, 6, 100])
def test_all_images_at_every_step_where_a_batch_holds_them(batch_size):
    chunks = chunked_permutations(6, 3, make_generator(0), batch_size=batch_size)
    assert [chunk.tolist() for chunk in chunks] == [list(range(6))] * 3


def test_chunks_are_a_function_of_the_generator():
    def draw(seed):
        return torch.cat(chunked_permutations(20, 6, make_generator(seed), batch_size=7))

    state = torch.get_rng_state()
    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    assert torch.get_rng_state().equal(state)


def test_flatten_then_load_is_a_roundtrip():
    p = problem(norm="batch")
    other = copy.deepcopy(p.network)
    load_flat(p.network, p.start)
    assert flatten_parameters(p.network).equal(p.start)
    kept = [parameter.data_ptr() for parameter in other.parameters()]
    load_flat(other, flatten_parameters(p.network))
    for mine, theirs in zip(other.parameters(), p.network.parameters(), strict=True):
        assert mine.equal(theirs)
    assert [parameter.data_ptr() for parameter in other.parameters()] == kept, "weights are filled, not exchanged"
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in other.parameters())


def test_flat_order_is_that_of_parameters():
    network = nn.Linear(2, 3)
    load_flat(network, torch.arange(9.0))
    assert network.weight.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert network.bias.tolist() == [6.0, 7.0, 8.0]


def test_load_flat_refuses_another_length():
    with pytest.raises(ValueError, match=r"weights have shape \(8,\), the network takes \(9,\)"):
        load_flat(nn.Linear(2, 3), torch.zeros(8))


@pytest.mark.parametrize("network", [nn.Linear(2, 3), nn.Linear(4, 1, bias=False)], ids=["two tensors", "one tensor"])
def test_snapshot_does_not_follow_the_live_weights(network):
    """Teachers recorded as views of live weights would hold the last epoch many times over."""
    snapshot = flatten_parameters(network)
    copied = snapshot.clone()
    assert not snapshot.requires_grad
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert snapshot.equal(copied)
    snapshot.zero_()
    assert all(bool(parameter.ne(0).any()) for parameter in network.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_student_does_not_share_memory_with_the_start(method):
    p = problem()
    student = student_of(p, method).detach()
    copied = student.clone()
    p.start.zero_()
    assert student.equal(copied)
