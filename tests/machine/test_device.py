"""One file asks MLX which device computes; here it is told of machines that nobody has."""

import ast
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp.machine import blas, device
from mlx_gemma_mtp.machine.device import Kind

PACKAGE = Path(mlx_gemma_mtp.__file__).parent
QUESTIONS = {"metal", "cuda", "device_info", "default_device", "is_available", "device_count"}


@pytest.fixture
def machine(monkeypatch):
    """machine(metal, cuda, device): what MLX says of itself from then on."""
    monkeypatch.setattr(device, "metal_available", device.metal_available.__wrapped__)
    monkeypatch.setattr(device, "name", device.name.__wrapped__)

    def told(metal: bool, cuda: bool, default: mx.Device, name: str = "Some GPU") -> None:
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
        monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(mx, "default_device", lambda: default)
        monkeypatch.setattr(mx, "device_info", lambda: {"device_name": name})

    return told


@pytest.mark.parametrize(
    "metal, cuda, default, kind",
    [
        (True, False, mx.gpu, Kind.METAL),
        (True, False, mx.cpu, Kind.CPU),  # a Mac that was told to take its CPU
        (False, True, mx.gpu, Kind.CUDA),
        (False, True, mx.cpu, Kind.CPU),
        (False, False, mx.cpu, Kind.CPU),
    ],
)
def test_what_computes_is_the_default_device(machine, metal, cuda, default, kind):
    machine(metal, cuda, default)
    assert device.kind() == kind
    assert device.metal_available() == (kind == Kind.METAL)


def test_a_gpu_has_its_own_name_and_a_cpu_that_of_its_blas(machine, monkeypatch):
    machine(True, False, mx.gpu, "Apple M4 Max")
    assert device.name() == device.info()["device_name"] == "Apple M4 Max"
    machine(False, False, mx.cpu, "AMD EPYC")
    for library, name in (("reference (MLX's own)", "cpu"), ("libopenblas.so.0", "cpu, fast BLAS")):
        monkeypatch.setattr(blas, "name", lambda library=library: library)
        assert device.name() == name


def test_nobody_else_asks():
    asked = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        of_mlx = {a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "mx"}
        if found := of_mlx & QUESTIONS:
            asked[str(path.relative_to(PACKAGE))] = found
    assert asked == {"machine/device.py": {"metal", "cuda", "device_info", "default_device"}}


def test_layers_ask_for_no_blas():
    for floor in ("models", "cache", "ops", "sampling", "speculative"):
        for path in (PACKAGE / floor).rglob("*.py"):
            assert "blas" not in path.read_text(encoding="utf-8").replace("BLAS", ""), path
