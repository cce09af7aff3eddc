"""What a release has to agree on: version, licence, citation."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
# Licences that Apache-2.0 software may depend on without further terms for its own users.
PERMISSIVE = r"apache|bsd|mit\b|psf|python software foundation|hpnd|mpl"


def test_the_version_is_in_the_changelog_and_stands_once() -> None:
    version = PROJECT["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "version" not in citation
    for package in ("cc4s", "cc4s_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert f'"{version}"' not in path.read_text(), path


def test_one_licence() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


@pytest.mark.parametrize("requirement", REQUIRED)
def test_dependencies_have_permissive_licences(requirement: str) -> None:
    metadata = importlib.metadata.metadata(re.split(r"[<>=]", requirement)[0])
    stated = [metadata.get("License-Expression"), metadata.get("License"), *(metadata.get_all("Classifier") or [])]
    text = " ".join(x for x in stated if x and (x in stated[:2] or x.startswith("License"))).lower()
    assert re.search(PERMISSIVE, text), text
    assert not re.search(r"\b(agpl|gpl)", text[:200]), text
