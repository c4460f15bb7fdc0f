"""The tests of this folder with every compiler and instruction set: `pytest -m slow tests/msl/test_builds.py`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDED = {  # of an instruction set, by the names in /proc/cpuinfo; what tells it from the one below
    "x86-64-v2": {"sse4_2", "popcnt"},
    "x86-64-v3": {"avx2", "bmi2", "f16c", "fma"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "native": set(),
}


def flags() -> set[str]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@pytest.mark.slow
@pytest.mark.parametrize("march", NEEDED)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_a_build(compiler, march):
    """No result hangs on either, so that nothing here passes on one machine and fails on another."""
    if shutil.which(compiler) is None or not NEEDED[march] <= flags():
        pytest.skip(f"no {compiler} here, or a processor without {march}")
    environment = os.environ | {"MSL_CXX": compiler, "MSL_MARCH": march}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
