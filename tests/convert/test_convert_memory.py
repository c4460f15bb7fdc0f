"""Weights stream: what is in memory is a few blocks, however large a tensor is."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from test_convert import BASE, ROOT, Checkpoint, H, make_moe, run, text_shapes, values, watched_blocks, wrapper

from convert import blocks
from convert.cli import main

ROWS = 2**20  # of 64 columns in float32: 256 MiB
MEASURED = """
import resource, sys
import mlx.core as mx
from convert import cli
from convert.quantize import Format
Format(4, 64).quantize(mx.ones((2, 64))), mx.eval(mx.isfinite(mx.ones(2)))
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = cli.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
print(peak * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)
"""


@pytest.mark.parametrize("flags", [(), ("-q",), ("-q", "--q-mode", "nvfp4")])
def test_at_most_a_block_is_read_at_once(tmp_path, monkeypatch, flags):
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    sizes = watched_blocks(monkeypatch, 1500)
    assert run(checkpoint, tmp_path / "out", *flags) == 0
    assert main(["check", str(tmp_path / "out"), "--against", str(checkpoint.folder)]) == 0
    assert 1000 < max(sizes) <= 1500


def test_a_block_of_any_mode_fits_two_gigabytes():
    """Measured on a CPU: nvfp4 takes 35 times its block, more than any other mode."""
    assert 35 * blocks.BLOCK_BYTES < 10**9


def test_peak_of_a_tensor_of_256_megabytes(tmp_path):
    text = BASE | {"vocab_size": ROWS, "vocab_size_per_layer_input": ROWS}
    shapes = text_shapes(text) | {"embed_tokens.weight": (ROWS, H)}
    checkpoint = Checkpoint(tmp_path / "hf", wrapper(text, "gemma4"), values(shapes, "model.language_model."))
    name = "model.language_model.embed_tokens.weight"
    checkpoint.weights[name] = checkpoint.weights[name].astype(mx.float32)
    checkpoint.save()
    out = tmp_path / "out"
    for flags in (
        ["--hf-path", checkpoint.folder, "--mlx-path", out, "-q"],
        ["check", out, "--against", checkpoint.folder],
    ):
        command = [sys.executable, "-c", MEASURED, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.splitlines()[-1]) < 200 * 2**20
    assert json.loads((out / "config.json").read_text())["vocab_size"] == ROWS
