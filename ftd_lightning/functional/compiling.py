"""torch.compile as a convenience that a run never depends on: where it cannot be had, the eager function goes on."""

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

Compile = bool | Literal["auto"]

_told: set[str] = set()


def compiles(compile: Compile, device: torch.device) -> bool:  # noqa: A002
    """Settle "auto": compile for a GPU, not for the CPU, where it takes longer than a small run gains by it.

    Args:
        compile: True, False or "auto".
        device: where the function's tensors are.

    Raises:
        InputError: for any other setting.

    Example:
        >>> compiles("auto", torch.device("cpu")), compiles("auto", torch.device("cuda"))
        (False, True)
    """
    if compile == "auto":
        return device.type == "cuda"
    if not isinstance(compile, bool):
        raise InputError(f"compile={compile!r} is unknown: choose from ['auto', True, False]")
    return compile


class Compiled:
    """A pure function that is compiled for each new shape of its arguments, and run eagerly where that fails.

    The first failure is told in one warning, and no further shape is tried; those that work stay compiled. An error
    that the eager function has too is raised as the eager function raises it.

    Args:
        function: what to compile. It takes tensors, and modules and numbers, which become part of the program; it must
            not write to them, as a call that fails is made again. Called with gradients on, its backward
            pass is compiled later, where a failure is no longer caught.
        eager: the same function as it runs fastest uncompiled; ``function``, if not given.
        cuda_graphs: record CUDA graphs, which spares a small network the time to launch its kernels.
        backend: of torch.compile.

    Attributes:
        compile_seconds: what the first calls of all shapes took, compilation included.

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
        """Run compiled if that is possible, else eagerly."""
        # Not the tensors and modules themselves: they would be kept alive.
        key = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args if not isinstance(a, nn.Module))
        if self._failed and key not in self._works:
            return self._eager(*args)
        began = time.perf_counter()
        try:
            result = self._compiled(*args)
        # Whatever it is: Dynamo, the backend and the C++ or Triton compiler raise errors of many kinds.
        except Exception as error:
            # In words: the error itself would keep alive the tensors of the frames that it came through.
            reason = _reason(error)
        else:
            if key not in self._works:
                self._works.add(key)
                self.compile_seconds += time.perf_counter() - began
            return result
        # Out of the except block, so that an error of the function's own comes without the compiler's in its train.
        result = self._eager(*args)
        self.compile_seconds += time.perf_counter() - began
        self._failed = True
        self._works.discard(key)
        _tell(reason)
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
        # The next replay writes over what this one gave.
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, self._run(*args))


def compiled(
    function: Callable[..., Any],
    *,
    compile: Compile = "auto",  # noqa: A002
    device: torch.device,
    eager: Callable[..., Any] | None = None,
    cuda_graphs: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """Compile a pure function if asked to, with a way back.

    Args:
        function: see :class:`Compiled`.
        compile: True, False, or "auto": on a GPU only.
        device: where the function's tensors are.
        eager: what to run where nothing is compiled; ``function``, if not given.
        cuda_graphs: record CUDA graphs, on a GPU only.
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
    return Compiled(function, eager=eager, cuda_graphs=cuda_graphs and device.type == "cuda", backend=backend)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function with a code object of its own.

    Dynamo keeps what it compiled, and counts recompilations, by code object: networks that shared one would use up one
    another's limit, and what was compiled for a network would outlive it.
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


def _reason(error: Exception) -> str:
    # A backend's error comes wrapped in one of Dynamo's whose first line says only which backend it was.
    error = getattr(error, "inner_exception", error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


def _tell(reason: str) -> None:
    if reason not in _told:  # every network has two functions that fail alike
        _told.add(reason)
        warnings.warn(f"torch.compile failed, going on in eager mode: {reason}", stacklevel=4)
