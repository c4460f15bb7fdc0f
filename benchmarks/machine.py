"""What a figure depends on: the machine, the versions, the commit, and what macOS tells without root.

The macOS part was written from Apple's manual pages and has not been tried on a Mac. A fact that cannot be had is
absent.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OPENBLAS = "libopenblas.so.0"
PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "torch")
# GB/s of Apple's technical specifications. A chip that is sold with two memories is told apart by its GPU cores.
BANDWIDTH = {
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, ("M3 Max", 30): 300, ("M3 Max", 40): 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, ("M4 Max", 32): 410, ("M4 Max", 40): 546, "M5": 153,
}  # fmt: skip
SAMPLE_SECONDS = 0.5


def facts() -> dict[str, Any]:
    """The machine, without a name of its own: processor, cores, memory in bytes, system, Python."""
    known = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu_cores": _gpu_cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return {key: value for key, value in known.items() if value}


def versions() -> dict[str, str]:
    """Of the packages that are installed, and ours."""
    from mlx_gemma_mtp import __version__

    found = {"mlx-gemma-mtp": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, marked where files were changed since; None outside a checkout."""
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=12")
    return described.strip() or None


def bandwidth(machine: dict[str, Any]) -> float | None:
    """GB/s of a machine's memory, None where it is not known."""
    chip = machine["cpu"].removeprefix("Apple ")
    return BANDWIDTH.get(chip, BANDWIDTH.get((chip, machine.get("gpu_cores"))))


def openblas_found() -> bool:
    """Whether a Linux system has the OpenBLAS that `--blas openblas` preloads."""
    try:
        ctypes.CDLL(OPENBLAS)
    except OSError:
        return False
    return sys.platform == "linux"


def load() -> float:
    """Processes that wanted to run in the last minute, on average."""
    return round(os.getloadavg()[0], 1)


def thermal_note() -> str | None:
    """What `pmset -g therm` says on macOS, in one line."""
    if sys.platform != "darwin":
        return None
    lines = [line.strip().removeprefix("Note: ") for line in _output("pmset", "-g", "therm").splitlines()]
    return "; ".join(line for line in lines if line) or None


class Sensors:
    """Samples GPU utilisation (%) and the system's power (W) on macOS while a `with` block runs; elsewhere nothing."""

    def __init__(self) -> None:
        self._readings: dict[str, list[float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sensors:
        if sys.platform == "darwin":
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def means(self) -> dict[str, float]:
        return {key: round(statistics.mean(values), 1) for key, values in self._readings.items()}

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            gpu = _output("ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")
            battery = _output("ioreg", "-r", "-d", "1", "-w", "0", "-c", "AppleSmartBattery")
            for key, value in read_sensors(gpu, battery).items():
                self._readings.setdefault(key, []).append(value)


def read_sensors(accelerator: str, battery: str) -> dict[str, float]:
    """Figures in the text that `ioreg` prints of IOAccelerator and AppleSmartBattery (of a MacBook, in mW)."""
    found = {
        "gpu_utilisation": _number(r'"Device Utilization %"\s*=\s*(\d+)', accelerator),
        "system_power_w": _number(r'"SystemLoad"\s*=\s*(\d+)', battery, 1e-3),
    }
    return {key: value for key, value in found.items() if value is not None}


def _number(pattern: str, text: str, unit: float = 1.0) -> float | None:
    match = re.search(pattern, text)
    return float(match.group(1)) * unit if match else None


def _cpu() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_cores() -> int | None:
    if sys.platform != "darwin":
        return None
    text = _output("ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")
    cores = _number(r'"gpu-core-count"\s*=\s*(\d+)', text)
    return int(cores) if cores else None


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
