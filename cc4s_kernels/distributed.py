"""Pairwise ops on positions that are spread over the processes of torch.distributed.

Every process holds a part of the N positions, its shard: its rows of q, k, v and mask. The processes stand in a ring;
each keeps its queries and passes blocks of keys and values on, until it has seen them all, so that none ever holds
more than its shard and two blocks. The blocks run on the kernels of `cc4s_kernels.random_walk`; what they
give is put together by its log-normalisers, exactly. See docs/distributed.md.

All processes of the group call an op together, and its backward pass too. Gradients are those of the sum of the
losses of all processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cc4s_kernels import backends
from cc4s_kernels._precision import accumulation_dtype, cast_for_autocast, without_autocast
from cc4s_kernels.ops.random_walk.checks import check_walk
from cc4s_kernels.ops.random_walk.reference import zero_invalid
from cc4s_kernels.ops.transition_consistency import TransitionConsistency
from cc4s_kernels.ops.transition_consistency import check_arguments as check_consistency

__all__ = ["random_walk", "sum_over_processes", "transition_consistency"]

Group = Any
"""A process group of torch.distributed, or None for the default one."""


@overload
def random_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    steps: int = 1,
    restart: float = 0.0,
    return_lse: Literal[False] = False,
    group: Group = None,
) -> Tensor: ...


@overload
def random_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    steps: int = 1,
    restart: float = 0.0,
    return_lse: Literal[True],
    group: Group = None,
) -> tuple[Tensor, Tensor]: ...


# The exchange is not traced by torch.compile: the graph is cut here.
@torch.compiler.disable
def random_walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    steps: int = 1,
    restart: float = 0.0,
    return_lse: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cc4s_kernels.random_walk` on the positions of all processes; each gives and gets its own.

    Several steps, and a restart, are computed in float32 for half-precision tensors.

    Args:
        q: (..., n, d) floating, the queries of this process; n may differ between processes and be 0.
        k: (..., n, d), v: (..., n, D): its keys and values.
        mask: (..., n) bool, True = valid position; each process may have one or not.
        scale, steps, restart, return_lse: as in `cc4s_kernels.random_walk`.
        group: the processes that share the positions; None = all of them.

    Returns:
        Y (..., n, D) of this process, with `return_lse` (Y, lse): its rows of what one process would get that has all
        positions. Differentiable in q, k and v, once.

    Raises:
        TypeError, ValueError: as `cc4s_kernels.random_walk`; on every process where their shapes (n apart), dtypes
            or options do not agree.
        RuntimeError: torch.distributed is not initialised, or this process is not in `group`.
    """
    check_walk(q, k, v, mask, scale, steps, restart)
    q, k, v = cast_for_autocast(q, k, v)
    dtype = v.dtype
    ring = _enter_ring(group, "random_walk", (q, k, v), mask, (scale, steps, restart, return_lse))
    with without_autocast(q.device):
        if steps > 1 or restart > 0:
            # Roundings between the steps would add up.
            q, k, v = (x.to(accumulation_dtype(dtype)) for x in (q, k, v))
        if mask is not None:
            q, k, v = (zero_invalid(x, mask) for x in (q, k, v))
        y, lse = _walk(ring, q, k, v, mask, scale)
        for step in range(steps):
            if step > 0:
                y, _ = _walk(ring, q, k, y, mask, scale)
            if restart > 0:
                y = (1.0 - restart) * y + restart * v
    return (y.to(dtype), lse) if return_lse else y.to(dtype)


@torch.compiler.disable
def transition_consistency(
    q: Tensor,
    k: Tensor,
    q_target: Tensor,
    k_target: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "row",
    group: Group = None,
) -> TransitionConsistency:
    """`cc4s_kernels.transition_consistency` on the positions of all processes; each gives and gets its own.

    With l, l' the log-normalisers of the two matrices, it is two random walks:
    kl_i = scale (<q'_i, (P' K')_i> - <q_i, (P' K)_i>) - l'_i + l_i and P_ii = exp(scale <q_i, k_i> - l_i).
    They run in float32 for half-precision tensors too.

    Args:
        q: (..., n, d) floating, the queries of this process; n may differ between processes and be 0.
        k, q_target, k_target: (..., n, d); the targets are brought to the positions of `q` by the caller.
        mask: (..., n) bool, True = valid position; each process may have one or not.
        scale, normalize: as in `cc4s_kernels.transition_consistency`.
        group: the processes that share the positions; None = all of them.

    Returns:
        Named tuple `kl` (..., n) of this process; `trace` and `trace_target` (...) of the whole matrices, the same on
        every process. As gradients are those of the sum of all losses, a term of the trace that every process
        adds to its loss counts once for each: divide it by their number.

    Raises:
        TypeError, ValueError: as `cc4s_kernels.transition_consistency`; on every process where their shapes (n apart),
            dtypes or options do not agree.
        RuntimeError: torch.distributed is not initialised, or this process is not in `group`.
    """
    check_consistency(q, k, q_target, k_target, mask, scale, normalize)
    if normalize == "column":
        q, k, q_target, k_target = k, q, k_target, q_target
    ring = _enter_ring(group, "transition_consistency", (q, k), mask, (scale, normalize))
    with without_autocast(q.device):
        q, k, q_target, k_target = (x.to(accumulation_dtype(x.dtype)) for x in (q, k, q_target, k_target))
        if mask is not None:
            q, k, q_target, k_target = (zero_invalid(x, mask) for x in (q, k, q_target, k_target))
        q_target, k_target = q_target.detach(), k_target.detach()
        both = torch.cat([k_target, k], -1)  # [..., n, 2d]
        means, lse_target = _walk(ring, q_target, k_target, both, mask, scale)
        _, lse = _walk(ring, q, k, both[..., :1].detach(), mask, scale)
        mean_target, mean = means.chunk(2, -1)  # P' K' and P' K: [..., n, d]
        kl = scale * ((q_target * mean_target).sum(-1) - (q * mean).sum(-1)) - lse_target + lse
        diagonal = (scale * (q * k).sum(-1) - lse).exp()  # [..., n]
        diagonal_target = (scale * (q_target * k_target).sum(-1) - lse_target).exp()
        if mask is not None:
            kl, diagonal, diagonal_target = (x.masked_fill(~mask, 0.0) for x in (kl, diagonal, diagonal_target))
        trace, trace_target = (sum_over_processes(x.sum(-1), group) for x in (diagonal, diagonal_target))
    return TransitionConsistency(kl, trace, trace_target)


def sum_over_processes(x: Tensor, group: Group = None) -> Tensor:
    """Sum of a tensor over the processes of a group; its gradient is the sum of all processes' gradients."""
    return _SumOverProcesses.apply(x, group)


class _Ring(NamedTuple):
    """The processes that share the positions.

    group: process group or None. rank: of this process in it. size: their number. longest: positions of the longest
        shard. partial: whether some shard is shorter or has a mask.
    """

    group: Group
    rank: int
    size: int
    longest: int
    partial: bool


def _enter_ring(
    group: Group, op: str, tensors: Sequence[Tensor], mask: Tensor | None, options: tuple[Any, ...]
) -> _Ring:
    """Compares the calls of all processes, since two that differ would wait for each other for ever."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{op}: torch.distributed is not initialised: call torch.distributed.init_process_group")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise RuntimeError("group: this process is not in it")
    grad = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
    shapes = [(*x.shape[:-2], "n", x.shape[-1]) for x in tensors]
    call = f"{op} with shapes {shapes}, {tensors[0].dtype}, options {options}, gradients {grad}"
    n, has_mask = tensors[0].shape[-2], mask is not None
    mine = torch.tensor([n, has_mask, zlib.crc32(call.encode())], device=tensors[0].device)
    every = mine.new_empty((size, 3))
    dist.all_gather(list(every.unbind()), mine, group=group)
    lengths, masks, calls = every.T.tolist()
    for other in range(size):
        if calls[other] != calls[rank]:
            raise ValueError(f"group: process {other} calls something else than process {rank}, which calls {call}")
    longest = max(lengths)
    return _Ring(group, rank, size, longest, any(masks) or min(lengths) < longest)


def _walk(ring: _Ring, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One step, Y (..., n, D) and lse (..., n); rows of masked positions are 0, and have to be 0 in q, k and v.

    The local kernels take as many queries as keys and one mask for both. So shards are padded to the longest, and
    padded or masked keys lie far away: one more channel, `far` in every query and in those keys with the other
    sign, makes their scores so low that they have no weight. It goes round with the keys.
    """
    n = q.shape[-2]
    if scale == 0:
        q, scale = 0 * q, 1.0
    if ring.partial:
        valid = q.new_ones(q.shape[:-1], dtype=torch.bool) if mask is None else mask
        rows = (0, ring.longest - n)
        far = min((1e30 / abs(scale)) ** 0.5, torch.finfo(q.dtype).max / 2)
        away = F.pad(~valid, rows, value=True)[..., None] * (-far if scale > 0 else far)
        q, k, v = (F.pad(x, (0, 0, *rows)) for x in (q, k, v))
        q, k = F.pad(q, (0, 1), value=far), torch.cat([k, away.to(k.dtype)], -1)
    y, lse = _RingWalk.apply(q, k, v, scale, ring)
    y, lse = y[..., :n, :], lse[..., :n]
    return (y, lse) if mask is None else (zero_invalid(y, mask), lse.masked_fill(~mask, 0.0))


class _RingWalk(torch.autograd.Function):
    """softmax(scale Q Kᵀ) V and its lse, for equally long shards; keys and values go round in both passes.

    With y_j, l_j of the block of process j and w_j = exp(l_j - l): l = logsumexp_j l_j and Y = sum_j w_j y_j, so
    dy_j = w_j dY and dl_j = w_j (<dY, y_j - Y> + dl). The backward pass computes y_j and l_j again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, ring: _Ring) -> tuple[Tensor, Tensor]:
        # The backward pass runs on the backend that is chosen here.
        ctx.walk = partial(backends.select("random_walk", q, k, v, **_options(scale)), **_options(scale))
        ctx.ring = ring
        block = [k.contiguous(), v.contiguous()]
        total: Tensor | None = None  # Y so far
        lse: Tensor | None = None
        for step in range(ring.size):
            coming = _pass_on(ring, block, 0) if step < ring.size - 1 else None
            y_j, lse_j = ctx.walk(q, *block)
            if total is None or lse is None:
                total, lse = y_j.to(lse_j.dtype), lse_j
            else:
                both = torch.logaddexp(lse, lse_j)
                total.mul_((lse - both).exp()[..., None]).add_((lse_j - both).exp()[..., None] * y_j)
                lse = both
            if coming is not None:
                block = coming.wait()
        assert total is not None
        assert lse is not None
        y = total.to(v.dtype)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.set_materialize_grads(False)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        ring, needed = ctx.ring, ctx.needs_input_grad[:3]
        y_grad = torch.zeros_like(y, dtype=lse.dtype) if y_grad is None else y_grad.to(lse.dtype)
        level = (y_grad * y).sum(-1)  # <dY, Y> - dl
        level = level if lse_grad is None else level - lse_grad
        block = [k.contiguous(), v.contiguous()]
        q_grad = torch.zeros_like(q, dtype=lse.dtype) if needed[0] else None
        returning: _Coming | None = None
        for step in range(ring.size):
            coming = _pass_on(ring, block, 0) if step < ring.size - 1 else None
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(n) for x, n in zip((q, *block), needed, strict=True)]
                y_j, lse_j = ctx.walk(*leaves)
            weight = (lse_j.detach() - lse).exp()
            y_j_grad = weight[..., None] * y_grad
            lse_j_grad = weight * ((y_grad * y_j.detach()).sum(-1) - level)
            # Scores without gradient give an lse without one.
            wanted = [(y_j, y_j_grad.to(y_j.dtype)), (lse_j, lse_j_grad)]
            outputs, cotangents = zip(*(pair for pair in wanted if pair[0].requires_grad), strict=True)
            grads = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], cotangents)
            block_grads = [g.to(lse.dtype) for g in grads]
            if q_grad is not None:
                q_grad += block_grads.pop(0)
            if returning is not None:
                # The gradients of this block so far, from the process that had it before.
                for mine, before in zip(block_grads, returning.wait(), strict=True):
                    mine += before
            returning = _pass_on(ring, [g.contiguous() for g in block_grads], len(block))
            if coming is not None:
                block = coming.wait()
        assert returning is not None
        found = iter(returning.wait())
        k_grad, v_grad = (next(found).to(x.dtype) if n else None for x, n in ((k, needed[1]), (v, needed[2])))
        return (None if q_grad is None else q_grad.to(q.dtype)), k_grad, v_grad, None, None


def _options(scale: float) -> dict[str, Any]:
    return {"mask": None, "scale": scale, "steps": 1, "restart": 0.0, "return_lse": True}


class _Coming(NamedTuple):
    """Tensors on their way from the process before this one; those that are sent must live as long."""

    received: list[Tensor]
    sent: list[Tensor]
    requests: list[Any]

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.received


def _pass_on(ring: _Ring, tensors: list[Tensor], first_tag: int) -> _Coming:
    """Sends contiguous tensors to the next process of the ring and receives such from the one before."""
    if ring.size == 1 or not tensors:
        return _Coming(tensors, tensors, [])
    received = [torch.empty_like(x) for x in tensors]
    after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    calls = []
    for tag, (out, into) in enumerate(zip(tensors, received, strict=True), first_tag):
        calls.append(dist.P2POp(dist.isend, out, group=ring.group, tag=tag, group_peer=after))
        calls.append(dist.P2POp(dist.irecv, into, group=ring.group, tag=tag, group_peer=before))
    return _Coming(received, tensors, dist.batch_isend_irecv(calls))


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every process has the sum in its loss.
        return sum_over_processes(grad, ctx.group), None
