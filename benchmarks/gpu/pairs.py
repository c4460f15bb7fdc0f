"""The two small trained pairs in the formats that are compared: `python -m benchmarks.gpu.pairs FOLDER` quantises them.

bfloat16 and float32 are the shipped folders themselves. Quantised ones are made by the converter from the same
weights in Hugging Face layout.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {"bundled": ROOT / "mlx_gemma_mtp/demo", "e2b": ROOT / "tests/data/e2b"}
FORMATS = ("float32", "bfloat16", "float16", "8bit", "4bit")
MADE = "GPU_PAIRS"  # environment: where `make` puts the quantised folders


def folder(pair: str, form: str) -> Path:
    """Returns the folder with `target` and `drafter`."""
    return PAIRS[pair] if not form.endswith("bit") else Path(os.environ[MADE]) / f"{pair}-{form}"


def loaded(pair: str, form: str, **options: Any) -> Any:
    """Returns the engine of a pair in a format."""
    from mlx_gemma_mtp import load

    where = folder(pair, form)
    dtype = None if form.endswith("bit") else form
    return load(where / "target", where / "drafter", dtype=dtype, notice=print, num_draft_tokens=0, **options)


def make(out: Path) -> None:
    """Writes both pairs in 8 and 4 bits below `out`."""
    from benchmarks.folders import hugging_face
    from convert.cli import main as convert
    from mlx_gemma_mtp.files.hub import Pair

    for name, source in PAIRS.items():
        plain = hugging_face(Pair(source / "target", source / "drafter", ""), out / f"{name}-hf")
        for bits in ("8", "4"):
            for side, path in (("target", plain.target), ("drafter", plain.drafter)):
                flags = ["-q", "--q-bits", bits]
                made = convert(["--hf-path", str(path), "--mlx-path", str(out / f"{name}-{bits}bit" / side), *flags])
                if made:
                    raise RuntimeError(f"the converter ended with {made} for {name}, {side}, {bits} bits")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
