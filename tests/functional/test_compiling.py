"""Compiled functions: the numbers of eager ones, no compilation without need, and a way back where there is none."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from ftd_lightning.functional import (
    InnerAdam,
    InnerSGD,
    compiled,
    dsa,
    flatten_parameters,
    inner_step,
    load_flat,
    seeded,
    unroll,
)
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


def broken(graph, inputs):
    raise RuntimeError("no compiler is here\nand a second line")


def affine(x, y):
    return 2 * x + y


def ones(*sizes):
    return [torch.ones(size) for size in sizes]


def test_auto_leaves_the_cpu_alone_and_compiles_on_a_gpu(refused):
    assert compiled(affine, compile="auto", device=CPU) is affine
    assert compiled(affine, compile=False, device=torch.device("cuda")) is affine
    assert compiled(affine, compile="auto", device=CPU, eager=torch.add) is torch.add
    for setting, device in (("auto", torch.device("cuda")), (True, CPU), ("cuda_graphs", CPU)):
        assert compiled(affine, compile=setting, device=device) is not affine
    for setting in ("yes", None, 1):
        with refused("compile=", repr(setting), "auto", "cuda_graphs"):
            compiled(affine, compile=setting, device=CPU)


def test_each_shape_is_compiled_once_and_functions_of_one_source_have_their_own_limit():
    backend = Backend()
    with torch._dynamo.config.patch(cache_size_limit=2):
        for _ in range(3):
            function = compiled(affine, compile=True, device=CPU, backend=backend)
            for size in (2, 3, 2, 3):
                assert function(*ones(size, size)).equal(torch.full((size,), 3.0))
    assert (backend.compilations, backend.calls) == (6, 12)


def test_a_compiler_that_fails_is_told_in_one_line_and_the_eager_function_is_used(monkeypatch):
    monkeypatch.setattr("ftd_lightning.functional.compiling._warned", set())
    function, other = (
        compiled(affine, compile=True, device=CPU, backend=broken, eager=lambda x, y: x - y) for _ in range(2)
    )
    with pytest.warns(UserWarning, match="no compiler") as told:
        results = [run(*ones(size, size)).tolist() for size in (2, 3) for run in (function, other)]
    assert results == [[0.0] * size for size in (2, 2, 3, 3)]
    assert [str(w.message) for w in told] == [
        "torch.compile failed, continuing in eager mode: RuntimeError: no compiler is here"
    ]


def test_the_functions_own_error_is_raised_as_it_is_and_is_no_failure_to_compile():
    backend = Backend()
    function = compiled(affine, compile=True, device=CPU, backend=backend)
    with pytest.raises(RuntimeError) as plain:
        affine(*ones(2, 3))
    with pytest.raises(RuntimeError) as caught:
        function(*ones(2, 3))
    assert (type(caught.value), str(caught.value)) == (type(plain.value), str(plain.value))
    assert caught.value.__context__ is None
    function(*ones(2, 2))
    assert (backend.compilations, backend.calls) == (1, 1)


def test_cuda_graphs_are_for_a_gpu_and_their_results_are_copies():
    """A backend that writes every result into the same memory, as the replay of a CUDA graph does."""
    modes, memory = [], torch.empty(2)

    def replaying(graph, inputs, **options):
        modes.append(options)
        return lambda *args: tuple(memory.copy_(out) for out in graph(*args))

    def pair(x, y):
        return 2 * x + y, None

    function = compiled(pair, compile="cuda_graphs", device=torch.device("cuda"), backend=replaying)
    first, second = (function(torch.full((2,), value), torch.zeros(2)) for value in (1.0, 2.0))
    assert [first[0].tolist(), second[0].tolist()] == [[2.0, 2.0], [4.0, 4.0]]
    compiled(affine, compile="cuda_graphs", device=CPU, backend=replaying)(*ones(2, 2))
    assert modes == [{"mode": "reduce-overhead"}, {}]


# The inner step of a student.


def trained(*, optimizer=InnerSGD(), norm="instance", network=None, dtype=torch.float64, **options):  # noqa: B008
    """The network, the end of a student, and its gradients in images, step size, soft labels and start."""
    with seeded(0, "student"):
        network = network or ConvNet(3, 3, 8, width=4, depth=1, norm=norm).to(dtype)
        start = torch.randn_like(flatten_parameters(network)).requires_grad_()
        images = torch.randn(5, 3, 8, 8, dtype=dtype, requires_grad=True)
        soft = torch.softmax(torch.randn(5, 3, dtype=dtype), dim=1).requires_grad_()
        load_flat(network, torch.randn_like(start))
    lr = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    batches = [torch.arange(4), torch.arange(4) + 1] * 2
    options = {"batches": batches, "augment": partial(dsa, mode="single"), "optimizer": optimizer, **options}
    end = unroll(network, start, images, soft, lr, **options)
    return network, [end.detach(), *torch.autograd.grad(end.square().sum(), [images, lr, soft, start])]


@pytest.fixture
def backend(monkeypatch):
    """Count what the inner step compiles and runs; without code generation, which takes minutes."""
    backend = Backend(aot_eager)
    monkeypatch.setattr(inner_step, "compiled", partial(compiled, backend=backend))
    return backend


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "norm"), [(InnerSGD(), "batch"), (InnerAdam(eps=1e-3), "none")])
def test_compiled_is_eager(backend, optimizer, norm):
    (network, fast), (_, plain) = (trained(optimizer=optimizer, norm=norm, compile=c) for c in (True, False))
    for a, b in zip(fast, plain, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    assert (backend.compilations, backend.calls) == (2, 8), "forward and backward once each, four steps of each"
    held = weakref.ref(network)
    del network
    gc.collect()
    assert held() is None


@pytest.mark.slow
def test_compiled_bf16_is_eager_bf16_and_compiled_besides_float32(backend):
    network = ConvNet(3, 3, 8, width=4, depth=1, norm="none", activation="sigmoid")
    options = {"network": network, "dtype": torch.float32}
    fast, plain = (trained(precision="bf16", compile=setting, **options)[1] for setting in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)
    float32 = trained(compile=True, **options)[1]
    assert all(0 < float((a - b).norm() / b.norm()) < 0.05 for a, b in zip(fast, float32, strict=True))
    assert (backend.compilations, backend.calls) == (4, 16), "forward and backward of each precision"


@pytest.mark.exhaustive
def test_generated_code_gives_the_same_numbers():
    """Inductor, as a user gets it; on the smallest of networks, as every kernel costs a run of the C++ compiler."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    fast, plain = (trained(network=network, compile=setting)[1] for setting in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-14)


def test_nothing_is_compiled_on_the_cpu_unasked_nor_for_the_full_graph(backend):
    plain = trained(compile=False)[1]
    for options in ({}, {"compile": "auto"}, {"compile": True, "method": "graph"}):
        torch.testing.assert_close(trained(**options)[1], plain, rtol=1e-11, atol=1e-14)
    assert backend.compilations == 0
