"""Python runs this file at its start where its folder is in PYTHONPATH: a fake GPU below MLX, and NVRTC for real.

FAKE_GPU: the folder for fake_gpu.load, and behind a colon the library that has symbols. Every kernel of ours that is
launched is compiled into MLX_PTX_CACHE_DIR, and what ptxas said of it is appended to `ptxas.txt` there. FAKE_NVRTC=1:
nothing is compiled, so that a run takes seconds and tells which operations there are; then name another cache folder.
"""

import os
import sys
from pathlib import Path

SMALL = 8192

if fake := os.environ.get("FAKE_GPU"):
    here = Path(__file__).resolve().parent
    folders = [str(here), str(here.parent)]
    sys.path[:0] = folders
    import fake_gpu

    site, _, symbols = fake.partition(":")
    compiles = os.environ.get("FAKE_NVRTC") != "1"
    fake_gpu.load(Path(site), Path(symbols) if symbols else None, compiles)
    import mlx.core as mx
    import nvrtc

    mx.set_cache_limit(0)  # so that buffers are new, and zeros
    taken = [mx.zeros((1,)) for _ in range(SMALL)]  # so are those of few bytes, once none of MLX's small blocks is left
    mx.eval(taken)
    cuda_kernel, folder = mx.fast.cuda_kernel, Path(os.environ["MLX_PTX_CACHE_DIR"])
    compilers, seen = [], set()

    def compiled(**made):
        kernel = cuda_kernel(**made)

        def launch(**arguments):
            function, text = nvrtc.unit(made, arguments)
            if compiles and text not in seen:
                seen.add(text)
                compilers[:] = compilers or [nvrtc.Compiler(Path(site))]
                if said := compilers[0].store(function, text, folder):
                    with (folder / "ptxas.txt").open("a") as file:
                        file.write(f"{function}: {said}\n")
            return kernel(**arguments)

        return launch

    mx.fast.cuda_kernel = compiled
    import tame

    sys.meta_path.insert(0, tame.Hook())
    sys.path = [path for path in sys.path if path not in folders]
