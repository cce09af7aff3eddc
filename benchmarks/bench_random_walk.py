"""random_walk: what softmax(Q K^T) V costs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run, compiled

OP = "random_walk"
# The published size and a large crop.
SIZES = ({"B": 1, "N": 3481, "d": 64, "D": 512}, {"B": 1, "N": 16384, "d": 64, "D": 512})
# A batch of training, and what fills a large GPU.
GPU_SIZES = ({"B": 12, "N": 3481, "d": 64, "D": 512}, {"B": 4, "N": 16384, "d": 64, "D": 512})


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("float32", "bfloat16")) -> list[Case]:
    """Forward: 2 N^2 (d + D) FLOP. Backward: scores once more, dP, dV, dQ, dK: 2 N^2 (3 d + 2 D)."""
    made = []
    for size in sizes:
        batch, n, d, channels = size["B"], size["N"], size["d"], size["D"]
        for dtype in dtypes:
            width = getattr(torch, dtype).itemsize
            # Q, K, V read and Y written; the gradients the same once more.
            traffic = batch * n * (2 * d + 2 * channels) * width
            forward = 2.0 * batch * n * n * (d + channels)
            backward = 2.0 * batch * n * n * (3 * d + 2 * channels)
            made.append(Case(OP, size, dtype, "forward", forward, batch * n * n, traffic))
            made.append(Case(OP, size, dtype, "forward+backward", forward + backward, 2 * batch * n * n, 3 * traffic))
    return made


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient. Scores have a standard deviation of 2: rows neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int, scale: float) -> Tensor:
        x = torch.randn(case.size["B"], case.size["N"], channels, generator=generator) * scale
        return x.to(device, case.torch_dtype)

    d, channels = case.size["d"], case.size.get("D", 1)
    q, k = draw(d, (2 / d**0.5) ** 0.5), draw(d, (2 / d**0.5) ** 0.5)
    return q, k, draw(channels, 1.0), draw(channels, 1.0)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]


def cudnn_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's attention takes at most 128 value channels: four calls, each with its own softmax."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.cat([sdpa(q, k, part) for part in v.split(128, dim=-1)], -1)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 takes 512 value channels beside 64 of q and k, forward only."""
    from flash_attn_interface import flash_attn_func

    found = flash_attn_func(q[:, :, None], k[:, :, None], v[:, :, None], softmax_scale=1.0)
    # Some versions also return the logsumexp.
    return (found[0] if isinstance(found, tuple) else found)[:, :, 0]


def keops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """KeOps also keeps no N x N matrix; its C++ is compiled at the first call."""
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    scores = LazyTensor(q[:, :, None]) | LazyTensor(k[:, None])
    return scores.sumsoftmaxweight(LazyTensor(v[:, None].contiguous()), dim=2)


def run_of(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Case, torch.device], Run]:
    def make(case: Case, device: torch.device) -> Run:
        q, k, v, gradient = inputs(case, device)
        if case.pass_ == "forward":
            return torch.no_grad()(lambda: (function(q, k, v),))
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def run() -> Sequence[Tensor]:
            y = function(*leaves)
            return (y, *torch.autograd.grad(y, leaves, gradient))

        return run

    return make


def on_backend(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with ck.use_backend(name):
            return ck.random_walk(q, k, v)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    # Sums of N products in the dtype's rounding, and a softmax of rounded scores.
    tolerance = 1e-4 if case.dtype == "float32" else 3e-2
    made = [Provider("eager", run_of(eager))]

    def add(name: str, function: Callable[[Tensor, Tensor, Tensor], Tensor], note: str = "") -> None:
        made.append(Provider(name, run_of(function), "eager", tolerance, note))

    add("compiled eager", compiled(eager))
    add("sdpa", sdpa)
    if device.type == "cuda" and case.dtype != "float32":
        add("cudnn, V in 4 parts", cudnn_split)
        add("flash-attention 3", flash_attention_3)
    if case.dtype == "float32":
        add("pykeops", keops)
    for name in ck.backends.available(OP):
        if name != "reference":
            add(f"cc4s {name}", on_backend(name))
    return made
