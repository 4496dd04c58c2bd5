"""torch.compile as an optimisation that no run depends on: where compilation fails, the eager function is used."""

from __future__ import annotations

import time
import warnings
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

# "auto" compiles on a GPU only; "cuda_graphs" compiles, and on a GPU also replays CUDA graphs, which spares small
# networks the time to launch their kernels.
Compile = bool | Literal["auto", "cuda_graphs"]

_warned: set[str] = set()


def compiles(compile: Compile, device: torch.device) -> bool:  # noqa: A002
    """Return whether to compile. "auto" does not for a CPU, where compiling costs a small run more than it saves.

    Args:
        compile: True, False, "auto" or "cuda_graphs".
        device: where the function's tensors are.

    Raises:
        InputError: for any other setting.

    Example:
        >>> compiles("auto", torch.device("cpu")), compiles("auto", torch.device("cuda"))
        (False, True)
    """
    if compile == "auto":
        return device.type == "cuda"
    if compile == "cuda_graphs":
        return True
    if not isinstance(compile, bool):
        raise InputError(f"compile={compile!r} is unknown: choose from ['auto', 'cuda_graphs', True, False]")
    return compile


class Compiled:
    """A pure function that is compiled for each new shape of its arguments, and run eagerly where that fails.

    The first failure causes one warning, and no further shapes are compiled; those that work stay compiled. An error
    that the eager function raises too is raised as the eager function raises it.

    Args:
        function: what to compile. It takes tensors, and modules and numbers, which become part of the program; it must
            not write to them, because a call that fails is repeated. If it is called with gradients enabled, its
            backward pass is compiled later, where a failure is not caught.
        eager: the same function as it runs fastest uncompiled; ``function`` by default.
        cuda_graphs: record and replay CUDA graphs.
        backend: of torch.compile.

    Attributes:
        compile_seconds: what the first call of each shape took in total, compilation included.

    Example:
        >>> double = Compiled(lambda x: 2 * x, backend="eager")
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        eager: Callable[..., Any] | None = None,
        cuda_graphs: bool = False,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self.compile_seconds = 0.0
        self._function = function
        self._eager = eager or function
        self._cuda_graphs = cuda_graphs
        self._backend = backend
        self._run: Callable[..., Any] | None = None
        self._works: set[tuple[Any, ...]] = set()
        self._failed = False

    def __call__(self, *args: Any) -> Any:
        """Run the compiled function if possible, else the eager one."""
        # Not the tensors and modules themselves, which the key would keep alive.
        key = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args if not isinstance(a, nn.Module))
        if self._failed and key not in self._works:
            return self._eager(*args)
        began = time.perf_counter()
        try:
            result = self._compiled(*args)
        # Any exception: Dynamo, the backend and the C++ or Triton compiler raise errors of many kinds.
        except Exception as error:
            # As text: the exception would keep alive the tensors of the frames in its traceback.
            reason = _reason(error)
        else:
            if key not in self._works:
                self._works.add(key)
                self.compile_seconds += time.perf_counter() - began
            return result
        # Outside the except block, so that an error of the function itself is not chained to the compiler's.
        result = self._eager(*args)
        self.compile_seconds += time.perf_counter() - began
        self._failed = True
        self._works.discard(key)
        _warn_once(reason)
        return result

    def _compiled(self, *args: Any) -> Any:
        if self._run is None:
            # "mode" is inductor's alone; other backends refuse it.
            mode: dict[str, Any] = {"mode": "reduce-overhead"} if self._cuda_graphs else {}
            function = _copy(self._function)
            self._run = torch.compile(function, fullgraph=True, dynamic=False, backend=self._backend, **mode)
        if not self._cuda_graphs:
            return self._run(*args)
        torch.compiler.cudagraph_mark_step_begin()
        # The next replay overwrites the results of this one.
        return _cloned(self._run(*args))


def seconds_compiling(function: Callable[..., Any]) -> float:
    """Return what a function's first calls took, as :class:`Compiled` counts it; 0 for one that is not compiled."""
    return function.compile_seconds if isinstance(function, Compiled) else 0.0


def compiled(
    function: Callable[..., Any],
    *,
    compile: Compile = "auto",  # noqa: A002
    device: torch.device,
    eager: Callable[..., Any] | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """Compile a pure function if asked to; where compilation fails, it runs eagerly.

    Args:
        function: see :class:`Compiled`.
        compile: True, False, "auto" (on a GPU only) or "cuda_graphs" (CUDA graphs too, on a GPU).
        device: where the function's tensors are.
        eager: what to run where nothing is compiled; ``function`` by default.
        backend: of torch.compile.

    Returns:
        A :class:`Compiled`, or the eager function itself.

    Raises:
        InputError: for an unknown setting.

    Example:
        >>> compiled(torch.sin, device=torch.device("cpu")) is torch.sin
        True
    """
    if not compiles(compile, device):
        return eager or function
    cuda_graphs = compile == "cuda_graphs" and device.type == "cuda"
    return Compiled(function, eager=eager, cuda_graphs=cuda_graphs, backend=backend)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function together with its code object.

    Dynamo caches programs and counts recompilations per code object: networks that shared one would use up each other's
    limit, and what was compiled for a network would outlive it.
    """
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _cloned(result: Any) -> Any:
    """Clone the tensors of a result: a tensor, or a tuple or list of tensors and plain values."""
    if isinstance(result, tuple | list):
        entries = [_cloned(entry) for entry in result]
        return entries if isinstance(result, list) else tuple(entries)
    return result.clone() if isinstance(result, Tensor) else result


def _reason(error: Exception) -> str:
    # Dynamo wraps a backend's error in one of its own, whose first line only names the backend.
    error = getattr(error, "inner_exception", error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


def _warn_once(reason: str) -> None:
    if reason not in _warned:  # both functions of a network fail for the same reason
        _warned.add(reason)
        warnings.warn(f"torch.compile failed, continuing in eager mode: {reason}", stacklevel=4)
