"""Native code is cached by what it was made from, works without a cache, and is not asked for in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WALK = """
import sys
from emu.cpu.compile import native
code = native()
ram = memoryview(bytearray(4096 * 8)).cast("q")
print(code.walk(code.memory(ram), 8, 1 << 31, 0, 32, 0x500, 0, 0, 0, 0, 0))
"""


def python(source: str, cache: Path, root: Path = ROOT) -> str:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root), "REFAULT_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=env, capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_cpu_imports_no_numba(tmp_path: Path) -> None:
    source = "import sys, emu.cpu.fill, emu.cpu.block, emu.cpu.walk; print('numba' in sys.modules)"
    (tmp_path / "c").mkdir()
    assert python(source, tmp_path / "c") == "False"


def test_an_interpreted_fill_imports_no_numba(tmp_path: Path) -> None:
    source = """
import sys
from unicorn import Uc, UC_ARCH_X86, UC_MODE_64
from emu.cpu.env import Env
from emu.cpu.fill import Fill
from emu.cpu.block import BlockCounter
from host_mm.ram import Ram
uc = Uc(UC_ARCH_X86, UC_MODE_64)
Fill(Ram(16), Env(uc), interpreted=True).install()
BlockCounter(uc, interpreted=True)
print('numba' in sys.modules)
"""
    (tmp_path / "c").mkdir()
    assert python(source, tmp_path / "c") == "False"


@pytest.mark.slow
def test_a_change_of_a_callee_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """paging.py is no caller of anything compiled as an entry: Numba alone would not see it change."""
    cache, root = tmp_path / "cache", tmp_path / "root"
    cache.mkdir()
    for package in ("emu/cpu", "kvm_model/vmx", "host_mm"):
        for file in (ROOT / package).glob("*.py"):
            copy = root / package / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for package in ("emu", "kvm_model"):
        (root / package / "__init__.py").write_text("")
    (root / "host_mm" / "__init__.py").write_text("")
    assert python(WALK, cache, root) == "(1, 0, 0, 0, 0, 4)"
    files = sorted(p.name for p in cache.rglob("*.nb*"))
    assert files
    assert python(WALK, cache, root) == "(1, 0, 0, 0, 0, 4)"
    assert sorted(p.name for p in cache.rglob("*.nb*")) == files
    paging = root / "emu/cpu/paging.py"
    text = paging.read_text()
    assert text.count("return gva >> (12 + 9 * (level - 1)) & 511") == 1
    paging.write_text(text.replace("return gva >> (12 + 9 * (level - 1)) & 511", "return 5"))
    assert python(WALK, cache, root) == "(1, 0, 0, 0, 40, 4)"


@pytest.mark.slow
def test_without_a_writable_place_it_compiles_in_memory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert python(WALK, blocked / "x" / "y") == "(1, 0, 0, 0, 0, 4)"
