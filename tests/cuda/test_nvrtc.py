"""NVRTC compiles every kernel's text as MLX's CUDA backend hands it over. Needs no GPU, and a folder of wheels.

The folder's name is in CUDA_WHEELS; benchmarks.gpu.nvrtc.INSTALL fills it. Of each text one template is compiled in
every run, and all templates of all models in the slow one.
"""

import os
from pathlib import Path
from typing import Any

import launches
import pytest

from benchmarks.gpu import nvrtc
from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import Kernel

ARCHITECTURES = ("sm_80", "sm_90a")  # A100; H100 and H200
BATCH = 60  # units of one compilation: what they share costs as much as a dozen of them
WHEELS = "CUDA_WHEELS"
LAUNCHED = ("expert_groups", "expert_gate_up", "expert_down", "head_argmax", "few_rows")


@pytest.fixture(scope="module")
def wheels() -> Path:
    folder = Path(os.environ.get(WHEELS, ""))
    if not os.environ.get(WHEELS) or not nvrtc.usable(folder):
        pytest.skip(f"{WHEELS} names no folder with NVRTC and MLX's headers for it; {nvrtc.INSTALL}")
    return folder


def arguments(kernel: Kernel) -> dict[str, Any]:
    """Returns what mx.fast.cuda_kernel is given for a kernel of ours."""
    return {
        "name": kernels.cuda_name(kernel),
        "input_names": list(kernel.inputs),
        "output_names": list(kernel.outputs),
        "source": kernel.source,
        "header": kernels.cuda_header() + kernel.header,
    }


def units(some: list[launches.Launch]) -> list[tuple[str, str]]:
    """Returns (function, text) of launches, each text once."""
    made = [(arguments(each.kernel), each.arguments) for each in some]
    return list({text: (function, text) for function, text in (nvrtc.unit(*each) for each in made)}.values())


def check(wheels: Path, some: list[tuple[str, str]], architecture: str) -> None:
    """Compiles units together, and asserts that each is there."""
    compiler = nvrtc.Compiler(wheels, architecture)
    *_, log = compiler.compile("unit_0::mlx::core::cu::" + some[0][0], nvrtc.together(some, kernels.cuda_header()))
    found = nvrtc.entries(log)
    assert len(found) == len(some)
    assert all(any(function in name for name in found) for function, _ in some)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_template_of_each_text(wheels, architecture):
    every, first = launches.of_checks(), {}
    for each in every:
        first.setdefault(kernels.cuda_name(each.kernel), each)
    assert len(first) >= len(kernels.KERNELS)
    check(wheels, units(list(first.values())), architecture)


def test_a_unit_by_itself_and_what_is_wrong_with_one(wheels):
    """As MLX compiles it; an error names what NVRTC does not take."""
    compiler = nvrtc.Compiler(wheels)
    function, text = units(launches.of_checks()[:1])[0]
    code, symbol, log = compiler.compile(f"mlx::core::cu::{function}", text)
    assert code.startswith(b"\x7fELF") and function in symbol and "registers" in nvrtc.figures(log)
    with pytest.raises(RuntimeError, match="does not compile"):
        compiler.compile(f"mlx::core::cu::{function}", text.replace("threadgroup int held", "threadgroup int* held"))


def test_no_template_is_left_out():
    """Of the slow test, which takes them kernel by kernel."""
    every = launches.of_models()
    assert {each.kernel.name for each in every} == set(LAUNCHED) and len(units(every)) > 700


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_template_in_use(wheels, architecture, name):
    every = units([each for each in launches.of_models() if each.kernel.name == name])
    for start in range(0, len(every), BATCH):
        check(wheels, every[start : start + BATCH], architecture)
