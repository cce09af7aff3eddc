"""Which implementation of an op runs, and why.

Every op registers its implementations under the names in `BACKENDS`. Without further word the first backend
that accepts the call runs, in that order; `use_backend` forces one and never falls back; `explain` says what
would run and why each other backend would not. A CUDA kernel that has not passed its tests on a GPU of this kind
(`VERIFIED`) runs only where it is forced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from cc4s_kernels import _cuda, _jit, _library, _triton

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""All backend names, fastest first: the order of automatic choice."""

VERIFIED: dict[str, frozenset[tuple[int, int]]] = {}
"""For each op the compute capabilities, such as (9, 0), of the GPUs on which its CUDA kernels passed
`pytest -m gpu` and were faster than the backends after them."""

# A check of a call: None where the backend can run it, else the reason why not.
Refusal = Callable[..., "str | None"]


class Implementation(NamedTuple):
    function: Callable[..., Any]
    refuses: Refusal


class Explanation(NamedTuple):
    """What `explain` found.

    op: name of the op. backend: the backend that would run, or None. reasons: why each other one would not.
    remark: what else is to be said of the one that would run.
    """

    op: str
    backend: str | None
    reasons: dict[str, str]
    remark: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend'} runs" + (f" ({self.remark})" if self.remark else "")]
        lines += [f"  {name:<10}{reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


_implementations: dict[str, dict[str, Implementation]] = {}
_forced: str | None = None
_strict = True


def _accepts(*args: Any, **kwargs: Any) -> None:
    return None


def register(op: str, backend: str, function: Callable[..., Any], refuses: Refusal = _accepts) -> None:
    """Adds an implementation of `op`.

    `refuses` takes the arguments of the public call and returns None or why this backend cannot run it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    _implementations.setdefault(op, {})[backend] = Implementation(function, refuses)


def ops() -> tuple[str, ...]:
    """Names of all registered ops."""
    return tuple(sorted(_implementations))


def available(op: str) -> tuple[str, ...]:
    """Backends that have an implementation of `op` and whose machine and software are present."""
    return tuple(name for name in BACKENDS if name in _implementations[op] and missing(name) is None)


def missing(backend: str) -> str | None:
    """Why `backend` cannot run anything on this machine, or None if it can."""
    if backend == "cpu":
        return _library.EXTENSION_ERROR
    if backend == "triton":
        return _triton.missing()
    if backend == "cuda":
        return _cuda.missing()
    return None


def _refusal(op: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} kernel in this version"
    if missing(backend) is not None:
        return missing(backend)
    if backend == "cuda" and (lacking := _cuda.lacks(op)) is not None:
        return lacking
    # Asked without tensors, only what holds for every call is known.
    return implementation.refuses(*args, **kwargs) if args or kwargs else None


def _unverified(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why a backend that can run a call is not chosen for it without being forced, or None."""
    if backend != "cuda":
        return None
    if op in VERIFIED:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if _cuda.capability(tensors[0].device.index if tensors else None) in VERIFIED[op]:
            return None
    return f"{_cuda.build()}, not yet verified on this GPU (use_backend('cuda') runs it)"


def select(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The implementation that runs `op` on these arguments.

    Raises:
        RuntimeError: a backend is forced by `use_backend` and cannot run this call.
    """
    if _forced is not None:
        reason = _refusal(op, _forced, args, kwargs)
        if reason is not None and _strict:
            raise RuntimeError(f"use_backend({_forced!r}): {op} cannot run there: {reason}")
        return _implementations[op][_forced if reason is None else "reference"].function
    for backend in BACKENDS:
        if backend == "cuda" and op not in VERIFIED:
            # Without a look for a compiler at run time, which imports it.
            continue
        if (_refusal(op, backend, args, kwargs) or _unverified(op, backend, args)) is None:
            return _implementations[op][backend].function
    raise RuntimeError(str(_explain(op, args, kwargs)))


@contextmanager
def use_backend(name: str, *, strict: bool = True) -> Iterator[None]:
    """Runs every op of the block on backend `name`, for the whole process.

    Args:
        name: "reference", "cpu", "triton" or "cuda"; "auto" restores the automatic choice.
        strict: an op without such a backend, or a call that it cannot run, raises `RuntimeError` with the reason.
            False runs the reference instead, and never a third backend; `explain` says which ops those are.

    Raises:
        ValueError: unknown name.
    """
    global _forced, _strict
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected auto or one of {', '.join(BACKENDS)}")
    previous = _forced, _strict
    _forced, _strict = (None if name == "auto" else name), strict
    try:
        yield
    finally:
        _forced, _strict = previous


def _explain(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    reasons: dict[str, str] = {}
    chosen: str | None = None
    # What may run at all, in order of choice.
    allowed = BACKENDS if _forced is None else (_forced,) if _strict else (_forced, "reference")
    for backend in BACKENDS:
        reason = _refusal(op, backend, args, kwargs)
        if _forced is None:
            reason = reason or _unverified(op, backend, args)
        if backend not in allowed:
            reason = f"use_backend({_forced!r}) is in force"
        elif reason is None and chosen is None:
            chosen = backend
            continue
        reasons[backend] = reason or f"could run; {chosen} comes first"
    remark = f"kernels {_jit.TITLE}" if chosen == "cuda" and _library.CUDA_RUN_TIME else ""
    return Explanation(op, chosen, reasons, remark)


def explain(op_name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Prints which backend would run `op_name` on these arguments, and why each other one would not.

    Args:
        op_name: public name of an op, such as "random_walk".
        *args, **kwargs: what the op itself would be called with.

    Returns:
        The printed explanation (`backend`, `reasons`).

    Raises:
        ValueError: unknown op.
    """
    if op_name not in _implementations:
        raise ValueError(f"op_name: got {op_name!r}, expected one of {', '.join(ops())}")
    explanation = _explain(op_name, args, kwargs)
    print(explanation)
    return explanation
