"""Import of a framework where it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, package: str) -> ModuleType:
    """The imported `module`.

    Raises:
        ImportError: naming what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} is not installed or not complete ({error}): pip install {package}") from error
