"""A row of a whole model has the same bits at every width, wherever attention does not differ: the bundled pair and the
one of E2B kind, 4 bit and bfloat16, all products with weights in the emulator (rows_child.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import missing

from mlx_gemma_mtp.machine import device

ROOT = Path(__file__).parents[2]
DEMO, E2B = ROOT / "mlx_gemma_mtp/demo", ROOT / "tests/data/e2b"


def found(backend: str, sample: str, *pairs: tuple[Path, int]) -> list[dict]:
    """What rows_child.py prints for pairs of a folder and its bits."""
    if (backend == "real") == (device.kind() is device.Kind.CPU):
        pytest.skip("no GPU here" if backend == "real" else "a GPU is here, nothing to simulate")
    if backend == "simulated" and (reason := missing()):
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tests/msl/rows_child.py"), backend, sample]
    for folder, bits in pairs:
        command += [str(folder / "target"), str(folder / "drafter"), str(bits)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def differing(by_width: dict[str, list[str | None]]) -> dict[int, set[str]]:
    """The operations in which rows begin to differ, by width."""
    return {int(width): set(filter(None, rows)) for width, rows in by_width.items()}


def check(results: list[dict], widths: set[int], simulated: bool) -> None:
    none: dict[int, set[str]] = {width: set() for width in widths}
    for result in results:
        for each in result["one query at a time"]:
            assert differing(each) == none
        for each in result.get("batch", ()):
            assert differing(each) == none
        for each in result["by their number"]:  # the one operation that is to differ is the one that is named
            names = differing(each)
            assert set.union(*names.values()) <= {"attention"}
            if simulated:
                assert names == {width: {"attention"} if width > 8 else set() for width in widths}


BACKENDS = ["simulated", pytest.param("real", marks=pytest.mark.metal)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_keeps_its_bits(backend):
    check(found(backend, "small", (DEMO, 4), (E2B, 0)), {4, 16}, backend == "simulated")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 0])
@pytest.mark.parametrize("folder", [DEMO, E2B], ids=["bundled", "E2B"])
def test_a_row_keeps_its_bits_in_many_places(backend, folder, bits):
    check(found(backend, "whole", (folder, bits)), {2, 4, 8, 16}, backend == "simulated")
