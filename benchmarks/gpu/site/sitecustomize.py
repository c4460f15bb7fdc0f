"""Python runs this file at its start where its folder is in PYTHONPATH: Metal texts then run on CUDA."""

import importlib.util
import os
from pathlib import Path

if os.environ.get("CUDA_AS_METAL") == "1":
    path = Path(__file__).resolve().parents[1] / "cuda_as_metal.py"
    spec = importlib.util.spec_from_file_location("cuda_as_metal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
