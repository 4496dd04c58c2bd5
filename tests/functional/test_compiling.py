"""Compiled functions: the numbers of eager ones, no compilation without need, and a way back where there is none."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from ftd_lightning.functional import (
    chunked_permutations,
    compile_seconds,
    compiled,
    dsa,
    flatten_parameters,
    inner_step,
    load_flat,
    make_generator,
    seeded,
    trajectory_matching_loss,
    unroll,
)
from ftd_lightning.functional.compiling import Compiled
from ftd_lightning.models import ConvNet

CPU = torch.device("cpu")


class Backend:
    """Compiles with another backend, and counts compilations and calls of what was compiled."""

    def __init__(self, inner=lambda graph, inputs: graph.forward):
        self.inner, self.compilations, self.calls = inner, 0, 0

    def __call__(self, graph, inputs):
        run = self.inner(graph, inputs)
        self.compilations += 1

        def counted(*args):
            self.calls += 1
            return run(*args)

        return counted


def broken(reason, tried=None):
    def backend(graph, inputs):
        if tried is not None:
            tried.append(inputs)
        raise RuntimeError(f"{reason}\nand a second line")

    return backend


def affine(x, y):
    return 2 * x + y


def ones(*sizes):
    return [torch.ones(size) for size in sizes]


def test_auto_leaves_the_cpu_alone_and_compiles_on_a_gpu():
    assert compiled(affine, compile="auto", device=CPU) is affine
    assert compiled(affine, compile=False, device=torch.device("cuda")) is affine
    assert compiled(affine, compile="auto", device=CPU, eager=torch.add) is torch.add
    for setting, device in (("auto", torch.device("cuda")), (True, CPU), ("cuda_graphs", CPU)):
        assert isinstance(compiled(affine, compile=setting, device=device), Compiled)


@pytest.mark.parametrize("setting", ["yes", None, 1])
def test_unknown_settings_are_refused(refused, setting):
    with refused("compile=", repr(setting), "auto", "cuda_graphs"):
        compiled(affine, compile=setting, device=CPU)


def test_each_shape_is_compiled_once_and_timed_once():
    backend = Backend()
    function = compiled(affine, compile=True, device=CPU, backend=backend)
    assert function.compile_seconds == 0.0
    seconds = []
    for size in (2, 2, 3, 2, 3):
        assert function(*ones(size, size)).equal(torch.full((size,), 3.0))
        seconds.append(function.compile_seconds)
    assert (backend.compilations, backend.calls) == (2, 5)
    assert 0 < seconds[0] == seconds[1] < seconds[2] == seconds[3] == seconds[4]


def test_functions_of_one_source_do_not_use_up_one_anothers_limit():
    backend = Backend()
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            function = compiled(affine, compile=True, device=CPU, backend=backend)
            for size in (2, 3):
                function(*ones(size, size))
    assert (backend.compilations, backend.calls) == (6, 6)


def test_more_shapes_than_may_be_compiled_run_eagerly_and_the_first_ones_stay_compiled():
    backend = Backend()
    function = compiled(affine, compile=True, device=CPU, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(UserWarning, match="eager mode") as told:
        results = [function(*ones(size, size)) for size in (2, 3, 4, 5, 2, 3)]
    assert [result.tolist() for result in results] == [[3.0] * size for size in (2, 3, 4, 5, 2, 3)]
    assert (backend.compilations, backend.calls, len(told)) == (2, 4, 1)


def test_a_compiler_that_fails_is_told_in_one_line_and_the_numbers_come_all_the_same():
    tried = []
    backend = broken("no compiler is here", tried)
    function, other = (compiled(affine, compile=True, device=CPU, backend=backend) for _ in range(2))
    with pytest.warns(UserWarning, match="no compiler is here") as told:
        results = [run(*ones(size, size)) for size in (2, 3, 2) for run in (function, other)]
    assert [result.tolist() for result in results] == [[3.0] * size for size in (2, 2, 3, 3, 2, 2)]
    assert len(tried) == 2, "a compiler that failed is not tried on other shapes"
    assert [str(w.message) for w in told] == [
        "torch.compile failed, continuing in eager mode: RuntimeError: no compiler is here"
    ]


def test_what_dynamo_cannot_trace_runs_eagerly():
    def branching(x):
        return x + 1 if bool(x.sum() > 0) else x - 1

    function = compiled(branching, compile=True, device=CPU, backend=Backend())
    with pytest.warns(UserWarning, match="torch.compile failed, continuing in eager mode: ") as told:
        assert [float(function(torch.tensor(x))) for x in (1.0, -1.0)] == [2.0, -2.0]
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


def test_the_functions_own_error_is_raised_as_it_is_and_is_no_failure_to_compile():
    backend = Backend()
    function = compiled(affine, compile=True, device=CPU, backend=backend)
    with pytest.raises(RuntimeError) as plain:
        affine(*ones(2, 3))
    with pytest.raises(RuntimeError) as caught:
        function(*ones(2, 3))
    assert type(caught.value) is type(plain.value)
    assert str(caught.value) == str(plain.value)
    assert caught.value.__context__ is None
    function(*ones(2, 2))
    assert (backend.compilations, backend.calls) == (1, 1)


def test_the_function_is_compiled_and_the_eager_one_is_the_way_back():
    def forbidden(x, y):
        raise AssertionError("was called")

    function = compiled(affine, compile=True, device=CPU, eager=forbidden, backend=Backend())
    assert function(*ones(2, 2)).equal(torch.full((2,), 3.0))
    back = compiled(affine, compile=True, device=CPU, eager=lambda x, y: x - y, backend=broken("nor here"))
    with pytest.warns(UserWarning, match="nor here"):
        assert back(*ones(2, 2)).equal(torch.zeros(2))


def test_results_of_cuda_graphs_are_copies():
    """A backend that writes every result into the same memory, as the replay of a CUDA graph does."""
    modes, memory = [], torch.empty(2)

    def replaying(graph, inputs, *, mode):
        modes.append(mode)
        return lambda *args: tuple(memory.copy_(out) for out in graph(*args))

    def pair(x, y):
        return 2 * x + y, None

    for function in (Compiled(f, cuda_graphs=True, backend=replaying) for f in (affine, pair)):
        first, second = (function(torch.full((2,), value), torch.zeros(2)) for value in (1.0, 2.0))
        if isinstance(first, tuple):
            assert (first[1], second[1]) == (None, None)
            first, second = first[0], second[0]
        assert [first.tolist(), second.tolist()] == [[2.0, 2.0], [4.0, 4.0]]
    assert modes == ["reduce-overhead"] * 2


def test_cuda_graphs_are_for_a_gpu_and_plain_compilation_for_the_cpu():
    modes = []

    def backend(graph, inputs, **options):
        modes.append(options)
        return graph.forward

    function = compiled(affine, compile="cuda_graphs", device=CPU, backend=backend)
    assert function(*ones(2, 2)).equal(torch.full((2,), 3.0))
    function = compiled(affine, compile="cuda_graphs", device=torch.device("cuda"), backend=backend)
    assert function(*ones(2, 2)).equal(torch.full((2,), 3.0))
    assert modes == [{}, {"mode": "reduce-overhead"}]


# The inner step of a student.


def student(*, num_images=4, batch_size=None, num_steps=3, norm="instance", dtype=torch.float64):
    with seeded(0, "student"):
        network = ConvNet(3, 3, 8, width=4, depth=1, norm=norm).to(dtype)
        start = flatten_parameters(network)
        target = start + 0.1 * torch.randn_like(start)
        images = torch.randn(num_images, 3, 8, 8, dtype=dtype, requires_grad=True)
        soft = torch.softmax(torch.randn(num_images, 3, dtype=dtype), dim=1).requires_grad_()
        load_flat(network, torch.randn_like(start))
    lr = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    batches = chunked_permutations(num_images, num_steps, make_generator(0), batch_size=batch_size)
    return network, start.requires_grad_(), target, images, soft, lr, batches


def matched(problem, *, hard=False, **options):
    """The loss and its gradients in start, images, step size and, unless labels are classes, labels."""
    network, start, target, images, labels, lr, batches = problem
    inputs = [start, images, lr] if hard else [start, images, lr, labels]
    labels = torch.arange(len(images)) % 3 if hard else labels
    loss = trajectory_matching_loss(network, start, target, images, labels, lr, batches=batches, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.fixture
def backend(monkeypatch):
    """Count what the inner step compiles and runs; without code generation, which is quick."""
    backend = Backend()
    monkeypatch.setattr(inner_step, "compiled", partial(compiled, backend=backend))
    return backend


@pytest.mark.parametrize(("norm", "hard"), [("instance", True), ("batch", False)])
def test_a_compiled_student_equals_an_eager_one(backend, norm, hard):
    backend.inner = aot_eager
    problem = student(norm=norm)
    before = {name: value.clone() for name, value in problem[0].state_dict().items()}
    fast, plain = (matched(problem, hard=hard, augment=dsa, compile=setting) for setting in (True, False))
    for a, b in zip(fast, plain, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert (backend.compilations, backend.calls) == (2, 6), "forward and adjoint once each, three steps of each"
    assert compile_seconds(problem[0]) > 0
    assert all(value.equal(before[name]) for name, value in problem[0].state_dict().items())


def test_no_draw_of_augmentations_and_no_later_call_compiles_again(backend):
    problem, steps = student(num_steps=12), [(seed, "inner", step) for seed in (0, 1) for step in range(12)]
    drawn = {int(torch.randint(6, (1,), generator=make_generator(*keys))) for keys in steps}
    assert drawn == set(range(6)), "each of DSA's operations"
    for seed in (0, 1):
        fast, plain = (
            matched(problem, seed=seed, augment=partial(dsa, mode="single"), compile=c) for c in (True, False)
        )
        torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-14)
    assert (backend.compilations, backend.calls) == (2, 48)


def test_the_smaller_last_chunk_is_one_more_compilation(backend):
    problem = student(num_images=5, batch_size=2, num_steps=6)
    fast, plain = (matched(problem, compile=setting) for setting in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-14)
    assert (backend.compilations, backend.calls) == (4, 12)


def test_generated_code_gives_the_same_numbers():
    """Inductor, as a user gets it; on the smallest of networks, as every kernel costs a run of the C++ compiler."""
    _, _, _, _, soft, lr, batches = student(num_steps=2)
    with seeded(0, "linear"):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
        images = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    start = flatten_parameters(network).requires_grad_()
    problem = (network, start, torch.zeros_like(start), images, soft, lr, batches)
    fast, plain = (matched(problem, compile=setting) for setting in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-14)
    assert compile_seconds(network) > 0


def test_a_student_whose_compiler_fails_is_trained_all_the_same(monkeypatch):
    monkeypatch.setattr(inner_step, "compiled", partial(compiled, backend=broken("no compiler for students")))
    problem = student()
    with pytest.warns(UserWarning, match="eager mode: RuntimeError: no compiler for students") as told:
        fast = [matched(problem, compile=True) for _ in range(2)]
    assert len(told) == 1
    plain = matched(problem, compile=False)
    assert all(a.equal(b) for one in fast for a, b in zip(one, plain, strict=True))


@pytest.mark.parametrize("options", [{}, {"compile": "auto"}, {"compile": True, "unroll": "graph"}], ids=str)
def test_nothing_is_compiled_on_the_cpu_unasked_nor_for_the_full_graph(backend, options):
    problem = student()
    torch.testing.assert_close(matched(problem, **options), matched(problem, compile=False), rtol=1e-11, atol=1e-14)
    network, start, _, images, labels, lr, batches = problem
    with torch.no_grad():  # "graph" is the adjoint's forward run here
        unroll(
            network, start, images, labels, lr, batches=batches, method="graph", compile=options.get("compile", False)
        )
    assert backend.compilations == 0
    assert compile_seconds(network) == 0.0


def test_unroll_refuses_an_unknown_setting(refused):
    network, start, _, images, labels, lr, batches = student()
    with refused("compile='yes'"):
        unroll(network, start, images, labels, lr, batches=batches, compile="yes")


def test_a_compiled_network_is_let_go(backend):
    problem = student()
    matched(problem, compile=True)
    assert backend.compilations == 2
    network = weakref.ref(problem[0])
    del problem
    gc.collect()
    assert network() is None
