"""The `.cuh` files as a compiler without CUDA takes them: every declaration, and no device code.

The host part of an op (`csrc/<op>/<op>_jit.cpp`) needs the types and constants of its kernels, and a symbol for each
kernel it starts; what the kernels do is compiled by NVRTC at run time.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
_DEVICE = re.compile(r"\b__(?:global|device)__\b")
_BRACKETS = {"{": "}", "(": ")", "[": "]"}


def _end_of(text: str, begin: int) -> int:
    """Behind the bracket that closes the one at `begin`."""
    close = [_BRACKETS[text[begin]]]
    for i in range(begin + 1, len(text)):
        if text[i] in _BRACKETS:
            close.append(_BRACKETS[text[i]])
        elif text[i] == close[-1]:
            close.pop()
            if not close:
                return i + 1
    raise ValueError(f"a bracket that nothing closes: {text[begin : begin + 60]!r}")


def host_part(text: str) -> str:
    """`text` with the bodies of its `__global__` and `__device__` functions replaced; line numbers stay.

    What the host may call keeps its body: `__host__` functions and constant expressions.
    """
    # Of the same length, so that brackets in comments and strings are not counted.
    plain = _COMMENT_OR_STRING.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    out, done = [], 0
    for found in _DEVICE.finditer(plain):
        if found.start() < done:
            continue
        begin = found.end()
        while plain[begin] not in "{;=":
            begin = _end_of(plain, begin) if plain[begin] in "([" else begin + 1
        declaration = max(plain.rfind(mark, 0, found.start()) for mark in ";}{") + 1
        if plain[begin] != "{" or re.search(r"\b(?:constexpr|__host__)\b", plain[declaration:begin]):
            continue
        end = _end_of(plain, begin)
        # A kernel stays a function with an address of its own.
        body = "{}" if found[0] == "__global__" else "{ __builtin_trap(); }"
        out += [text[done:begin], body, "\n" * plain.count("\n", begin, end)]
        done = end
    return "".join([*out, text[done:]])


def kernel_names() -> set[str]:
    """The kernels in `<op>.cuh` of all ops, with their namespaces, which are named as the op: `slic::merge`."""
    found = set()
    for path in (path for path in (ROOT / "csrc").glob("*/*.cuh") if path.stem == path.parent.name):
        text = re.sub(r"__launch_bounds__\([^)]*\)", "", host_part(path.read_text()))
        found |= {f"{path.parent.name}::{name}" for name in re.findall(r"\b__global__[^({;]*?(\w+)\s*\(", text)}
    return found


def write(folder: Path) -> Path:
    """Writes the host part of every `.cuh` below `folder`, in the places of csrc; returns the folder."""
    for path in sorted((ROOT / "csrc").glob("*/*.cuh")):
        out = folder / path.relative_to(ROOT / "csrc")
        text = host_part(path.read_text())
        # An unchanged file keeps its time: nothing is compiled again.
        if not out.exists() or out.read_text() != text:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
    return folder
