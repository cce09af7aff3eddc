"""Progress bars of long work, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress_bar(items: Iterable[T], title: str, unit: str, *, show: bool = True, **options: Any) -> tqdm[T]:
    """`tqdm` over `items`; in a file, a line every ten seconds of work that takes longer than that."""
    watched = sys.stderr.isatty()
    return tqdm(
        items,
        desc=title,
        unit=unit,
        disable=not show,
        mininterval=0.1 if watched else 10.0,
        delay=0.0 if watched else 10.0,
        # tqdm adapts the number of items between looks at the clock; slow items after fast ones would be missed.
        miniters=1,
        dynamic_ncols=watched,
        file=sys.stderr,
        **options,
    )
