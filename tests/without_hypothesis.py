"""Stands in for hypothesis where it is not installed: property tests are skipped, the others of their files run."""

from __future__ import annotations

from typing import Any

import pytest

REASON = "hypothesis is not installed"


class _Anything:
    """Takes every call and attribute, so that definitions of strategies pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, other: Any) -> _Anything:
        return self


def given(*args: Any, **kwargs: Any) -> Any:
    return pytest.mark.skip(reason=REASON)


def settings(*args: Any, **kwargs: Any) -> Any:
    return lambda test: test


strategies: Any = _Anything()
assume: Any = _Anything()
HealthCheck: Any = _Anything()
