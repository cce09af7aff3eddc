"""`cc4s_kernels.distributed` in 2 and 4 processes against the local ops in one."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cc4s_kernels as ck
from tests.ops.tester import assert_matches, randn

WORLD = 4
# Shards of 23 positions for 4 and 2 processes: even but for the last, uneven, with an empty one.
SHARDS = {"even": ((6, 6, 6, 5), (12, 11)), "uneven": ((1, 10, 4, 8), (3, 20)), "empty": ((0, 9, 14, 0), (23, 0))}
EQUAL = {"equal": ((6, 6, 6, 6), (12, 12))}
SIZES = {**dict.fromkeys(SHARDS, 23), "equal": 24}


class Case(NamedTuple):
    """One call: names and widths of its tensors, options, dtype, shards, and whether there is a mask."""

    op: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float64
    shards: str = "uneven"
    masked: bool = False

    def tensors(self) -> list[Tensor]:
        widths = (5, 5, 3) if self.op == "random_walk" else (5, 5, 5, 5)
        size = SIZES[self.shards]
        return [randn(2, 2, size, w, dtype=self.dtype, device="cpu", seed=i) for i, w in enumerate(widths)]

    def mask(self) -> Tensor | None:
        if not self.masked:
            return None
        mask = randn(2, 2, SIZES[self.shards], dtype=torch.float32, device="cpu", seed=9) > -0.5
        # One walk without any position, one without those of the first processes.
        mask[0, 0] = False
        mask[0, 1, :12] = False
        return mask

    def rows(self, processes: int, rank: int) -> slice:
        lengths = {**SHARDS, **EQUAL}[self.shards][0 if processes == WORLD else 1]
        return slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))


WALK = {"scale": 0.7, "return_lse": True}
CASES = {
    "walk": Case("random_walk", {}, shards="equal"),
    "walk lse": Case("random_walk", WALK, shards="equal"),
    "walk even": Case("random_walk", WALK, shards="even"),
    "walk uneven": Case("random_walk", WALK),
    "walk empty": Case("random_walk", WALK, shards="empty"),
    "walk masked": Case("random_walk", WALK, shards="equal", masked=True),
    "walk masked uneven": Case("random_walk", {**WALK, "scale": -1.5}, masked=True),
    "walk steps": Case("random_walk", {**WALK, "steps": 3, "restart": 0.25}, masked=True),
    "walk scale 0": Case("random_walk", {**WALK, "scale": 0.0}, masked=True),
    "walk float32": Case("random_walk", WALK, torch.float32, masked=True),
    "walk bfloat16": Case("random_walk", WALK, torch.bfloat16, masked=True),
    "walk float16": Case("random_walk", WALK, torch.float16, masked=True),
    "walk large": Case("random_walk", {"scale": 40.0, "return_lse": True}, masked=True),
    "consistency": Case("transition_consistency", {}, shards="equal"),
    "consistency masked": Case("transition_consistency", {"scale": 0.7}, masked=True),
    "consistency column": Case("transition_consistency", {"normalize": "column"}, masked=True),
    "consistency float32": Case("transition_consistency", {}, torch.float32),
    "consistency bfloat16": Case("transition_consistency", {}, torch.bfloat16, masked=True),
}


def run(case: Case, op: Callable[..., Any], tensors: list[Tensor], mask: Tensor | None, rows: slice) -> list[Tensor]:
    """Outputs and gradients of a loss whose terms depend on the position, on the tensors' rows."""
    leaves = [x.detach().clone().requires_grad_(i < 3) for i, x in enumerate(tensors)]
    outputs = op(*leaves, mask=mask, **case.options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = torch.zeros((), dtype=torch.float64)
    size = SIZES[case.shards]
    for index, out in enumerate(outputs):
        weight = randn(2, 2, size, 3, dtype=torch.float64, device="cpu", seed=20 + index)
        if out.dim() == 4:
            loss = loss + (weight[:, :, rows] * out.double()).sum()
        elif out.dim() == 3:
            loss = loss + (weight[:, :, rows, 0] * out.double()).sum()
        elif out.requires_grad:
            # A trace: the share of this process in the sum of all losses.
            loss = loss + (weight[:, :, 0, 0] * out.double()).sum() * (tensors[0].shape[-2] / size)
    loss.backward()
    wanted = leaves[:2] if case.op == "transition_consistency" else leaves
    return [*(x.detach() for x in outputs), *(x.grad for x in wanted if x.grad is not None)]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD, timeout=timeout)
    # The second pair: their ranks in the group are not those in the world.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results: dict[str, Any] = {}
    for processes, group, place in ((WORLD, None, rank), (2, pairs[rank // 2], rank % 2)):
        for name, case in CASES.items():
            rows = case.rows(processes, place)
            mask = case.mask()

            def op(*tensors: Tensor, case: Case = case, group: Any = group, **options: Any) -> Any:
                return getattr(ck.distributed, case.op)(*tensors, group=group, **options)

            shard = [x[:, :, rows] for x in case.tensors()]
            if mask is not None:
                mask = mask[:, :, rows]
                shard = [x.masked_fill(~mask[..., None], torch.nan) for x in shard]
            results[f"{processes} {name}"] = run(case, op, shard, mask, rows)
    results["errors"] = errors(rank, pairs)
    results["repeated"] = [results["4 walk float32"], run_again("walk float32", rank)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_again(name: str, rank: int) -> list[Tensor]:
    case = CASES[name]
    rows, mask = case.rows(WORLD, rank), case.mask()
    assert mask is not None
    return run(case, ck.distributed.random_walk, [x[:, :, rows] for x in case.tensors()], mask[:, :, rows], rows)


def errors(rank: int, pairs: list[Any]) -> list[str]:
    """Messages of calls that do not fit together."""
    messages = []
    x = torch.ones(3, 2)
    for call in (
        lambda: ck.distributed.random_walk(x, x, torch.ones(3, 1 + rank % 2)),
        lambda: ck.distributed.random_walk(x, x, x, scale=1.0 + rank % 2),
        lambda: ck.distributed.random_walk(x.clone().requires_grad_(rank % 2 == 1), x, x),
        lambda: ck.distributed.transition_consistency(x, x, x, x) if rank % 2 else ck.distributed.random_walk(x, x, x),
    ):
        with pytest.raises(ValueError, match="calls something else") as error:
            call()
        messages.append(str(error.value))
    with pytest.raises(RuntimeError, match="not in it"):
        ck.distributed.random_walk(x, x, x, group=pairs[1 - rank // 2])
    return messages


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


# float64: sums of 24 terms in another order, weights exp(l_j - l) of scores up to 200. float32: the same. Half: the
# outputs of blocks are rounded before they are added, the gradients once more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("processes", [2, 4])
def test_equals_one_process(name: str, processes: int, found: list[dict[str, Any]]) -> None:
    case = CASES[name]
    local = getattr(ck, case.op)
    # Half precision against the result of the same numbers in float64.
    tensors = [x.double() for x in case.tensors()]
    with ck.use_backend("reference"):
        expected = run(case, local, tensors, case.mask(), slice(None))
    ranks = [r for r in range(WORLD) if processes == WORLD or r >= 2]
    parts = [found[rank][f"{processes} {name}"] for rank in ranks]
    for index, want in enumerate(expected):
        pieces = [part[index] for part in parts]
        if want.dim() == 2:
            # Traces: the same on every process.
            for piece in pieces:
                torch.testing.assert_close(piece, pieces[0], rtol=0, atol=0)
            got = pieces[0]
        else:
            got = torch.cat(pieces, 2)
        scale = max(1.0, want.abs().max().item())
        assert_matches(f"{name} {index}", got, want, atol=scale * TOLERANCE[case.dtype])


def test_two_pairs_agree_and_runs_repeat(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        for a, b in zip(found[rank]["2 walk"], found[rank + 2]["2 walk"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for rank in range(WORLD):
        for a, b in zip(*found[rank]["repeated"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_calls_that_differ_are_refused_everywhere(found: list[dict[str, Any]]) -> None:
    shapes, options, gradients, ops = found[1]["errors"]
    assert "process 0" in shapes
    assert "('n', 2)" in shapes
    assert "options (2.0" in options
    assert "gradients [True" in gradients
    assert "transition_consistency" in ops


def test_one_process_is_the_local_op(tmp_path: Path) -> None:
    q, k, v = CASES["walk masked"].tensors()
    mask = CASES["walk masked"].mask()
    with pytest.raises(RuntimeError, match="init_process_group"):
        ck.distributed.random_walk(q, k, v)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        got = ck.distributed.random_walk(q, k, v, mask=mask, return_lse=True)
        compiled = torch.compile(lambda *x: ck.distributed.random_walk(*x) + 1, backend="eager")(q, k, v)
        half = [x.float() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16):
            cast = ck.distributed.random_walk(*half)
            kept = ck.distributed.transition_consistency(*half[:2], *half[:2])
        with pytest.raises(ValueError, match="mask: got"):
            ck.distributed.random_walk(q, k, v, mask=mask[..., 1:])
        leaf = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(ck.distributed.random_walk(leaf, k, v).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
    finally:
        dist.destroy_process_group()
    for name, a, b in zip(("y", "lse"), got, ck.random_walk(q, k, v, mask=mask, return_lse=True), strict=True):
        assert_matches(name, a, b, atol=1e-12)
    assert_matches("compiled", compiled, ck.random_walk(q, k, v) + 1, atol=1e-12)
    assert cast.dtype == torch.bfloat16
    assert kept.kl.dtype == torch.float32
    # P = P' : the divergence is rounding alone, a few eps times the largest score.
    assert kept.kl.abs().max() < 1e-5


def test_empty_shards_everywhere(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        y, lse = ck.distributed.random_walk(
            torch.ones(2, 0, 3), torch.ones(2, 0, 3), torch.ones(2, 0, 4), return_lse=True
        )
    finally:
        dist.destroy_process_group()
    assert y.shape == (2, 0, 4)
    assert lse.shape == (2, 0)
