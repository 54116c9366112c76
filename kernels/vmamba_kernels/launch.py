# mypy: allow-untyped-calls
"""Launching a Triton kernel again with what it was compiled for, and calling an op's own code where nobody listens.

Law: the first launch of a kind is Triton's own; later ones hand the compiled kernel its arguments. Triton's path works
out anew at every launch what the kernel is specialised on. That is the key here: types, numbers, constants, and that
every address is a multiple of 16.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
MOST_KEPT = 4096  # kinds of launches; beyond them, all are forgotten: batches of ever new sizes would pile up


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
    """Launch on the current device; `args` in the kernel's order, `constants` its constexprs and num_warps by name."""
    facts: list[Any] = [kernel, torch.cuda.current_device() if torch.cuda.is_initialized() else -1]
    whole = True
    for arg in args:
        if isinstance(arg, Tensor):
            facts.append(arg.dtype)
            whole = whole and arg.data_ptr() % 16 == 0
        else:
            facts.append(arg)
    key = (*facts, *constants.values())
    known = _compiled.get(key) if whole else None
    if known is not None:
        compiled, tail = known
        compiled[(*grid, 1, 1)[:3]](*args, *tail)
        return
    compiled = kernel[grid](*args, **constants)
    if whole and hasattr(compiled, "run"):  # the interpreter compiles nothing
        if len(_compiled) >= MOST_KEPT:
            _compiled.clear()
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def own_code(op: Any) -> Callable[..., Any]:
    """The function that a custom op was made of. Raises AttributeError for one that this package did not make."""
    function: Callable[..., Any] = op.own_code
    return function


def custom_op(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`torch.library.custom_op`, by default with nothing mutated; `own_code` gives the function back."""

    def register(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(name, function, mutates_args=mutates)
        op.own_code = function  # type: ignore[attr-defined]
        return op

    return register


def unobserved(x: Tensor) -> bool:
    """Whether nobody would see an op on x: no dispatch mode, compiler or tensor subclass.

    An op costs the host more than its own code: the dispatcher's Python keys, and a check that outputs alias nothing.
    """
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
