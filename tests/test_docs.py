"""What README and docs show runs: Python blocks, `cc4s` and `torchrun` commands, make targets."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cc4s.cli import main
from tests.cc4s.data_tools import make_folder
from tests.cc4s.run_tools import TINY, environment

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{index}") for page in PAGES for index, code in enumerate(blocks(page, "python"))
]
COMMANDS = {page: [line for block in blocks(page, "bash") for line in block.splitlines() if line] for page in PAGES}


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_snippets_run(code: str) -> None:
    torch.manual_seed(0)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", [page for page in PAGES if COMMANDS[page]], ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder; configuration is added to make them small."""
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "my_data")
    shutil.copytree(data / "images", tmp_path / "photos")
    # The real sets have this many classes; the recipes say so.
    make_folder(tmp_path / "acdc_scribble", classes=4)
    make_folder(tmp_path / "msrc21", classes=21)
    for command in COMMANDS[page]:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets
            continue
        if words[0] == "python":
            assert subprocess.run([sys.executable, *words[1:]], env=environment(), check=False).returncode == 0, command
            continue
        if words[0] == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            options = [word for word in TINY if not word.startswith("train.batch_size")]
            assert subprocess.run([*words, *options], env=environment(), check=False).returncode == 0, command
            continue
        assert words[0] == "cc4s", command
        if words[1] in ("run", "train", "ladder", "compare", "demo"):
            words += TINY
        assert main(words[1:]) == 0, command


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
