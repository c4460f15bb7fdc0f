"""Which widths of a pass agree bit for bit with one row here: `python -m benchmarks.gpu.widths OUT SECONDS`."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.gpu.pairs import loaded

CASES = [("bundled", "bfloat16"), ("e2b", "bfloat16"), ("bundled", "float32"), ("bundled", "4bit"), ("e2b", "4bit")]


def main(out: Path, seconds: float) -> None:
    from mlx_gemma_mtp.checks.invariance import probe

    end = time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as file:
        for (pair, form), ours in product(CASES, ("1", "0")):
            os.environ["MLX_GEMMA_MTP_METAL"] = ours
            engine = loaded(pair, form)  # anew, for a compiled graph keeps the kernels that it was traced with
            about = {"pair": pair, "format": form, "ours": ours == "1"}
            try:
                found = probe(engine.target, engine.text.encode("def fibonacci(n):"), engine.specs)
                while one := engine.call(partial(next, found, None)):  # in the thread that computes
                    what, widths = one
                    print(json.dumps(about | {"what": what, "widths": widths}), file=file, flush=True)
            except RuntimeError as raised:
                print(json.dumps(about | {"what": "raised", "error": str(raised)[:300]}), file=file, flush=True)
            if time.monotonic() > end:
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
