"""One file asks MLX which device computes; here it is told of machines that nobody has."""

import ast
import re
from dataclasses import asdict, fields
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp.machine import blas, device
from mlx_gemma_mtp.machine.device import TABLE, Kind, Traits

PACKAGE = Path(mlx_gemma_mtp.__file__).parent
QUESTIONS = {"metal", "cuda", "device_info", "default_device", "is_available", "device_count"}


@pytest.fixture
def machine(monkeypatch):
    """machine(metal, cuda, device): what MLX says of itself from then on."""
    for asked in ("kind", "traits", "name"):
        monkeypatch.setattr(device, asked, getattr(device, asked).__wrapped__)

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
    assert device.traits() is device.TABLE[kind]


def test_a_gpu_has_its_own_name_and_a_cpu_that_of_its_blas(machine, monkeypatch):
    machine(True, False, mx.gpu, "Apple M4 Max")
    assert device.name() == device.info()["device_name"] == "Apple M4 Max"
    machine(False, False, mx.cpu, "AMD EPYC")
    for library, name in (("reference (MLX's own)", "cpu"), ("libopenblas.so.0", "cpu, fast BLAS")):
        monkeypatch.setattr(blas, "name", lambda library=library: library)
        assert device.name() == name


@pytest.mark.parametrize("kind", Kind)
def test_a_gpu_is_a_gpu(kind):
    """Metal and CUDA differ in their memory, and in what is packed; a CPU is neither."""
    decided = {
        name: value for name, value in asdict(TABLE[kind]).items() if name not in ("memory", "wires", "packed_batches")
    }
    of_metal = {name: asdict(TABLE[Kind.METAL])[name] for name in decided}
    assert (decided == of_metal) == (kind is not Kind.CPU)
    assert kind is not Kind.CPU or not any(decided[name] == value for name, value in of_metal.items())


@pytest.mark.parametrize("architecture, generation", [("applegpu_g16s", 16), ("applegpu_g17g", 17), ("", None)])
@pytest.mark.parametrize("set_to", [None, "0", "1"])
def test_tf32_is_told(machine, monkeypatch, architecture, generation, set_to):
    monkeypatch.delenv(device.TF32, raising=False)
    if set_to is not None:
        monkeypatch.setenv(device.TF32, set_to)
    machine(True, False, mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert device.float32_products() == ("TF32" if generation == 17 and set_to != "0" else "float32")
    machine(False, True, mx.gpu)
    assert device.float32_products() == ("float32" if set_to == "0" else "TF32")
    machine(False, False, mx.cpu)
    assert device.float32_products() == "float32"


def test_every_decision_is_read_somewhere():
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert [each.name for each in fields(Traits) if not re.search(rf"traits(\(\))?\.{each.name}\b", text)] == []


def test_what_a_device_is_decides_nothing_elsewhere():
    """Names of devices are for people and keys; what is done follows from traits."""
    asked = {}
    for path in PACKAGE.rglob("*.py"):
        if found := re.findall(r"\bKind\.(?:METAL|CUDA|CPU)\b", path.read_text(encoding="utf-8")):
            asked[str(path.relative_to(PACKAGE))] = len(found)
    # device.py; the language of kernels; what a description and a key of costs call a CPU
    assert asked.keys() == {"machine/device.py", "ops/kernels/__init__.py", "engine/engine.py", "engine/calibration.py"}


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
