"""What setup.py decides and packs, and how nvcc is called; nothing is compiled here."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tools import compile_check, cuda_check, nvcc

ROOT = Path(__file__).resolve().parents[1]
NVCC = Path("/somewhere/nvcc")


def test_the_cuda_extension_is_built_where_it_can_be() -> None:
    assert nvcc.chosen("", "2.11.0", "13.0", NVCC)
    assert nvcc.chosen("1", "2.11.0", "13.0", NVCC)
    assert not nvcc.chosen("0", "2.11.0", "13.0", NVCC)
    assert not nvcc.chosen("", "2.11.0", "13.0", None)
    assert not nvcc.chosen("", "2.13.0+cpu", None, NVCC)
    assert not nvcc.chosen("0", "2.13.0+cpu", None, None)


def test_a_required_cuda_extension_says_what_it_lacks() -> None:
    with pytest.raises(SystemExit, match=r"CC4S_KERNELS_CUDA=1 .* torch 2\.13\.0\+cpu is built without CUDA"):
        nvcc.chosen("1", "2.13.0+cpu", None, NVCC)
    with pytest.raises(SystemExit, match=r"CC4S_KERNELS_CUDA=1 .* nvcc is not found"):
        nvcc.chosen("1", "2.11.0", "13.0", None)
    with pytest.raises(SystemExit, match="CC4S_KERNELS_CUDA: got 'yes', expected 0, 1 or nothing"):
        nvcc.chosen("yes", "2.11.0", "13.0", NVCC)


def test_where_nvcc_is_looked_for(tmp_path: Path) -> None:
    for name in ("home/bin", "path"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "nvcc").touch(mode=0o755)
    home, path = str(tmp_path / "home"), str(tmp_path / "path")
    assert nvcc.find({"CUDA_HOME": home, "PATH": path}) == tmp_path / "home/bin/nvcc"
    assert nvcc.find({"CUDA_HOME": str(tmp_path / "other"), "PATH": path}) == tmp_path / "path/nvcc"
    assert nvcc.find({"PATH": path}) == tmp_path / "path/nvcc"
    assert nvcc.find({}) in (None, Path("/usr/local/cuda/bin/nvcc"))


def test_architectures() -> None:
    assert nvcc.architecture_flags("8.0+PTX;9.0a 12.0") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    assert len(nvcc.architecture_flags(nvcc.ARCHITECTURES)) == 4
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: got 'Hopper', expected entries like 8\.0"):
        nvcc.architecture_flags("9.0 Hopper")


def test_source_distribution_has_every_source(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed += [ROOT / "setup.py", ROOT / "tools/nvcc.py", ROOT / "tools/__init__.py"]
    assert {str(path.relative_to(ROOT)) for path in needed} <= names


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPfi' for 'sm_80'
ptxas info    : Function properties for _Z3addPfi
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 8 bytes cumulative stack size, 400 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function '_Z4markIsEvPT_' for 'sm_90a'
ptxas info    : Function properties for _Z4markIsEvPT_
    0 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 552 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4markIxEvPT_' for 'sm_100'
ptxas info    : Function properties for _Z4markIxEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 552 bytes cmem[0]
"""


def test_what_ptxas_says() -> None:
    add, spilled, fine = cuda_check.kernels_of("potts", PTXAS, {"_Z4markIxEvPT_": 256})
    assert add == cuda_check.Kernel("sm_80", "potts", "add", 12, 8, 0, 400)
    assert spilled == cuda_check.Kernel("sm_90a", "potts", "mark<short>", 255, 0, 16, 0)
    assert fine == cuda_check.Kernel("sm_100", "potts", "mark<long long>", 30, 0, 0, 0, 256)
    assert [kernel.occupancy for kernel in (add, spilled, fine)] == [None, None, 1.0]
    assert [kernel.passed for kernel in (add, spilled, fine)] == [False, False, True]


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out and said, or an error where it is required."""
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(sys, "argv", ["compile_check", "--backends", "cuda"])
    assert compile_check.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "CUDA kernels left out: nvcc is not found in CUDA_HOME, PATH or /usr/local/cuda"
    assert said[1:] == ["0 kernels compiled, none failed"]
    monkeypatch.setattr(sys, "argv", ["compile_check", "--backends", "cuda", "--require-nvcc"])
    with pytest.raises(SystemExit):
        compile_check.main()
    assert "--require-nvcc: nvcc is not found" in capsys.readouterr().err
