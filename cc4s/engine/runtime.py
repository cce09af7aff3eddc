"""Devices, processes and randomness of a run."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, distributed

import cc4s_kernels as ck
from cc4s.config import Config
from cc4s.errors import UserError

T = TypeVar("T")

logger = logging.getLogger("cc4s")


class Runtime:
    """Lightning Fabric with the few collective operations the engine needs.

    Under `torchrun` (or any launcher that sets WORLD_SIZE) every process takes its share; otherwise one process runs.

    Args:
        config: device and precision.
        deadline: the moment of `time.monotonic` after which `out_of_time` is true; None never comes.
    """

    def __init__(self, config: Config, deadline: float | None = None) -> None:
        self.deadline = deadline
        # Lightning announces devices and processes at the level of information.
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
        accelerator = config.device
        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        if accelerator == "cuda" and not torch.cuda.is_available():
            raise UserError("key device: got 'cuda', but this machine has no usable CUDA device")
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
        try:
            self.fabric = Fabric(
                accelerator=accelerator,
                devices=local,
                num_nodes=max(1, world_size // local),
                strategy="ddp" if world_size > 1 else "auto",
                precision=config.train.precision,  # type: ignore[arg-type]
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"key train.precision: {config.train.precision!r} does not run here: {error}") from error
        self.fabric.launch()

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Runs `work` on the main process while the others wait; returns its result there, None elsewhere.

        Raises:
            UserError: on every process, where `work` raises one on the main process.
        """
        result, refusal = None, None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                refusal = str(error)
        refusal = self.gather(refusal)[0]
        if refusal is not None:
            raise UserError(refusal)
        return result

    def out_of_time(self) -> bool:
        """Whether the deadline is over for any process; the same answer on every one of them."""
        return self.deadline is not None and any(self.gather(time.monotonic() > self.deadline))

    def barrier(self) -> None:
        self.fabric.barrier()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on every one of them."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order, on every one of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def share(self, items: list[Any]) -> list[Any]:
        """The items this process works on."""
        return items[self.rank :: self.world_size]


def kernels(name: str) -> AbstractContextManager[None]:
    """The backend that the key `kernels` names, for the ops that have it; "auto" leaves the choice to every op.

    Ops without that backend run their reference, and the log names them.

    Raises:
        UserError: the backend cannot run on this machine at all.
    """
    if name == "auto":
        return nullcontext()
    reason = ck.backends.missing(name)
    if reason is not None:
        raise UserError(f"key kernels: {name!r} cannot run here: {reason}")
    without = [op for op in ck.backends.ops() if name not in ck.backends.available(op)]
    if without:
        logger.info("kernels=%s: the reference runs for %s, which have no %s kernel", name, ", ".join(without), name)
    return ck.use_backend(name, strict=False)


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from any labels, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*parts: Any) -> None:
    """Seeds Python, NumPy and torch from any labels.

    Randomness is re-derived from its place in the run (stage, step), so a resumed run draws what an uninterrupted
    one would have drawn.
    """
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - seeds libraries that use the global state
    torch.manual_seed(seed)
