"""Atomic files: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from cc4s.errors import UserError

TEMPORARY_PREFIX = ".partial-"


def check_output_file(path: str | Path, option: str) -> None:
    """Refuses what `atomic_write` could not replace by a file, before the work that leads there.

    Raises:
        UserError: a folder, a device, or below something that is no folder; `option` names the argument.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path}: is not a regular file; expected the name of a file to write")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{option} {path}: {parent} is not a folder")


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` through a temporary file in the same folder, fsync and rename.

    Folders on the way are created. On any failure (full disk, interrupt) the temporary file is removed and
    the old file is intact.

    Raises:
        OSError: whatever the system said, with `filename` set to `path`.
    """
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8; see `atomic_write`."""
    atomic_write(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON with a final newline; see `atomic_write`.

    Raises:
        ValueError: `value` holds a NaN or an infinity, which are no JSON.
    """
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse to open or sync a folder; the file itself is safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
