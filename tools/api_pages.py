"""API pages from the docstrings, by pdoc: `make docs`, or `python -W error -m tools.api_pages --out DIR`.

A warning (a name in an annotation that leads nowhere, a module that does not import) ends it with an error.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pdoc

# contrib is no name of the package above it.
PACKAGES = ("cc4s_kernels", "cc4s_kernels.contrib", "cc4s")


def modules(package: str) -> Iterator[ModuleType]:
    """A package and its public modules; not those of Triton kernels, which need not import."""
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        parts = found.name.split(".")
        if not any(part.startswith("_") for part in parts) and parts[-1] != "triton":
            yield importlib.import_module(found.name)


def resolve_named_tuples(module: ModuleType) -> None:
    """Annotations of a named tuple's constructor are strings, which pdoc reads in the module that shows the class."""
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, tuple) and hasattr(cls, "_fields") and cls.__module__ == module.__name__:
            cls.__new__.__annotations__ = typing.get_type_hints(cls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/api"), metavar="DIR")
    out = parser.parse_args().out
    for package in PACKAGES:
        for module in modules(package):
            resolve_named_tuples(module)
    pdoc.render.configure(docformat="google", footer_text="cc4s", search=True)
    pdoc.pdoc(*PACKAGES, r"!.*\._", r"!.*\.progress$", output_directory=out)
    print(out / "index.html")


if __name__ == "__main__":
    main()
