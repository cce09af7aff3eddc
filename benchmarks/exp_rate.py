"""How many exponentials a GPU does per second when it does nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS, ROUNDS, BLOCK = 1 << 22, 512, 1024

COUNT = ELEMENTS * ROUNDS
"""Exponentials of a call of `run`."""


@triton.jit
def exponentials(out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    # out_ptr: (ELEMENTS,) float32.
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = position.to(tl.float32) * 1e-9
    i = 0
    while i < ROUNDS:
        # exp2 is the instruction; each one waits for the last, and the other warps run meanwhile.
        x = tl.exp2(-x)
        i += 1
    tl.store(out_ptr + position, x)


def run(device: torch.device) -> Tensor:
    out = torch.empty(ELEMENTS, device=device)
    exponentials[(ELEMENTS // BLOCK,)](out, ROUNDS=ROUNDS, BLOCK=BLOCK)
    return out
