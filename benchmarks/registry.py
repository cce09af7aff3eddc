"""The benchmarks by op: modules `bench_<op>.py` of this folder, each with `OP`, `SIZES`, `cases` and `providers`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness import Case, Provider

_MODULES = [
    importlib.import_module(f"{__package__}.{path.stem}") for path in sorted(Path(__file__).parent.glob("bench_*.py"))
]

BENCHMARKS: dict[str, ModuleType] = {module.OP: module for module in _MODULES}


def provider_of(op: str, name: str, case: Case | None = None) -> Provider:
    """The provider of that name."""
    module = BENCHMARKS[op]
    case = case or module.cases()[0]
    device = torch.device("cpu")
    return next(provider for provider in module.providers(case, device) if provider.name == name)
