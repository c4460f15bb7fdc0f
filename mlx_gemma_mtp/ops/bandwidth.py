"""The bandwidth of this machine's memory, as `python -m mlx_gemma_mtp.doctor` measured it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import mlx.core as mx

from ..files.files import cache_folder, whole
from .kernel_report import machine

FORMAT = 1
SIZE = 1 << 26  # numbers of a copy in 16 bits: more than any cache holds
COPIES = 5


def measure() -> float:
    """Returns bytes a second: those that a copy reads and writes, in the fastest of several."""
    some, seconds = mx.zeros((SIZE,), dtype=mx.uint16), []
    mx.eval(some)
    for i in range(1, COPIES + 1):
        began = time.perf_counter()
        mx.eval(some + i)
        seconds.append(time.perf_counter() - began)
    return 2 * some.nbytes / min(seconds)


def keep(bandwidth: float, folder: Path | None = None) -> Path:
    """Writes what was measured, for this machine's chip, system and MLX. Returns the file. Raises OSError."""
    path = _path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"format": FORMAT, "machine": _machine(), "bytes_per_second": bandwidth}
    with whole(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def known(folder: Path | None = None) -> float | None:
    """Returns what was measured here, None where nothing was, or elsewhere."""
    try:
        data = json.loads(_path(folder).read_text(encoding="utf-8"))
        good = data["format"] == FORMAT and data["machine"] == _machine()
        found = float(data["bytes_per_second"]) if good else 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def _machine() -> dict[str, str]:
    return {name: value for name, value in machine().items() if name != "mlx_gemma_mtp"}


def _path(folder: Path | None) -> Path:
    return (folder or cache_folder()) / "bandwidth.json"
