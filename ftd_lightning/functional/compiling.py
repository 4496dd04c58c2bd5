"""torch.compile as an optimisation that no run depends on: where compilation fails, the eager function is used."""

from __future__ import annotations

import warnings
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

# "auto" compiles on a GPU only. "cuda_graphs" compiles and, on a GPU, replays CUDA graphs, which saves small networks
# the time to launch their kernels.
Compile = bool | Literal["auto", "cuda_graphs"]

# Compute a map again from the few tensors it is made of, up to 8 instead of 4, where it would be stored.
CPU_OPTIONS = {"realize_reads_threshold": 8}

_warned: set[str] = set()


def compiles(compile: Compile, device: torch.device) -> bool:  # noqa: A002
    """Return whether a setting compiles on a device; raises InputError for an unknown one."""
    if compile == "auto":
        return device.type == "cuda"
    if compile == "cuda_graphs":
        return True
    if not isinstance(compile, bool):
        raise InputError(f"compile={compile!r} is unknown: choose from ['auto', 'cuda_graphs', True, False]")
    return compile


def compiled(
    function: Callable[..., Any],
    *,
    compile: Compile = "auto",  # noqa: A002
    device: torch.device,
    eager: Callable[..., Any] | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """Compile a pure function for each shape of its arguments; after a first failure, warn once and run it eagerly.

    Args:
        function: takes tensors, and modules and numbers, which become part of the program. It must not write to them,
            because a call that fails is repeated. If it is called with gradients enabled, its backward pass is compiled
            later, where a failure is not caught.
        compile: True, False, "auto" (on a GPU only) or "cuda_graphs" (CUDA graphs too, on a GPU).
        device: where the function's tensors are.
        eager: the same function as it runs fastest uncompiled; ``function`` by default.
        backend: of torch.compile.

    Returns:
        The compiled function, or ``eager`` itself. An error of the function itself is raised as ``eager`` raises it.

    Raises:
        InputError: for an unknown setting.
    """
    uncompiled = eager or function
    if not compiles(compile, device):
        return uncompiled
    cuda_graphs = compile == "cuda_graphs" and device.type == "cuda"
    fast: Callable[..., Any] | None = None
    failed = False

    def run(*args: Any) -> Any:
        nonlocal fast, failed
        if failed:
            return uncompiled(*args)
        try:
            if fast is None:
                # "mode" and "options" are inductor's alone; other backends refuse them.
                mode: dict[str, Any] = {"mode": "reduce-overhead"} if cuda_graphs else {}
                if device.type == "cpu" and backend == "inductor":
                    mode = {"options": CPU_OPTIONS}
                fast = torch.compile(_copy(function), fullgraph=True, dynamic=False, backend=backend, **mode)
            if not cuda_graphs:
                return fast(*args)
            torch.compiler.cudagraph_mark_step_begin()
            return _cloned(fast(*args))  # the next replay overwrites these results
        # Any exception: Dynamo, the backend and the C++ or Triton compiler raise errors of many kinds.
        except Exception as error:
            reason = _reason(error)  # the exception itself would keep alive the tensors of its traceback
        # Outside the except block, so that an error of the function itself is not chained to the compiler's.
        result = uncompiled(*args)
        failed = True
        if reason not in _warned:  # all functions of a network fail for the same reason
            _warned.add(reason)
            warnings.warn(f"torch.compile failed, continuing in eager mode: {reason}", stacklevel=2)
        return result

    return run


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function with its code object, by which Dynamo caches programs and limits recompilations."""
    if not isinstance(function, FunctionType):
        return function
    code, defaults = function.__code__.replace(), function.__defaults__
    return FunctionType(code, function.__globals__, function.__name__, defaults, function.__closure__)


def _cloned(result: Any) -> Any:
    """Clone the tensors of a result: a tensor, or a tuple or list of tensors and plain values."""
    if isinstance(result, tuple | list):
        return type(result)(_cloned(entry) for entry in result)
    return result.clone() if isinstance(result, Tensor) else result


def _reason(error: Exception) -> str:
    # Dynamo wraps a backend's error in another one, whose first line only names the backend.
    error = getattr(error, "inner_exception", error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"
