"""The benchmarks by op: modules with `cases` and `providers`."""

from __future__ import annotations

from types import ModuleType

import torch

from benchmarks import bench_random_walk, bench_transition_consistency
from benchmarks.harness import Case, Provider

BENCHMARKS: dict[str, ModuleType] = {module.OP: module for module in (bench_random_walk, bench_transition_consistency)}


def provider_of(op: str, name: str, case: Case | None = None) -> Provider:
    """The provider of that name."""
    module = BENCHMARKS[op]
    case = case or module.cases()[0]
    device = torch.device("cpu")
    return next(provider for provider in module.providers(case, device) if provider.name == name)
