"""Atomic files."""

from __future__ import annotations

import errno
import json
import os

import pytest

from cc4s import files


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new folder" / "ä.bin"
    files.atomic_write(path, b"one")
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["ä.bin"]
    # An ordinary file, not one with the private mode of temporary files.
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_text_and_json(tmp_path):
    files.atomic_write_text(tmp_path / "t", "grün\n")
    files.atomic_write_json(tmp_path / "j", {"b": [1, 2.5, None], "a": "ü"})
    assert (tmp_path / "t").read_bytes() == "grün\n".encode()
    assert json.loads((tmp_path / "j").read_text("utf-8")) == {"b": [1, 2.5, None], "a": "ü"}
    with pytest.raises(ValueError, match="Out of range"):
        files.atomic_write_json(tmp_path / "j", float("nan"))
    assert json.loads((tmp_path / "j").read_text("utf-8"))["b"] == [1, 2.5, None]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.atomic_write(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(OSError, match="folder/file"):
        files.atomic_write(tmp_path / "folder" / "file", b"")
