"""On Metal a model computes in its own type, through our kernels: every block, query, cache, expert path and head.

On Linux the Metal branches run in a child process with the device simulated (models/metal_child.py): types and paths
are what they are on a Mac, and float32 has the CPU's tokens. `-m metal` runs the same child for real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import FORMATS, pair

from convert.cli import main as convert_main
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.machine import device

ROOT = Path(__file__).parents[2]
CACHE = Path(tempfile.gettempdir()) / f"metal_child_{os.getuid()}"
DEMO = (ROOT / "mlx_gemma_mtp/demo/target", ROOT / "mlx_gemma_mtp/demo/drafter")
E2B = (ROOT / "tests/data/e2b/target", ROOT / "tests/data/e2b/drafter")
EVERYWHERE = {
    "embedded", "blocks' inputs", "blocks' outputs", "queries", "written", "cache", "attended", "hidden",
    "products' inputs", "products' weights", "products' outputs", "target's head", "drafted", "carried",
    "drafter's head",
}  # fmt: skip
EXPERT_KERNELS = {"group_metal", "gate_up_metal", "down_metal"}
PREAMBLE = Path("mlx/backend/cpu/compiled_preamble.h")  # of every kernel that mx.compile makes on a CPU


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.metal)])
def run(request):
    """(target, drafter) folders, a type behind a colon and bits of K/V behind another -> what models/metal_child.py
    found, a dict for each pair.
    """
    if (request.param == "real") != (device.kind() is not device.Kind.CPU):
        pytest.skip("no GPU here" if request.param == "real" else "a GPU is here, nothing to simulate")

    def child(*pairs: tuple[Path | str, Path | str]) -> list[dict]:
        command = [sys.executable, str(ROOT / "tests/models/metal_child.py"), request.param, *map(str, sum(pairs, ()))]
        environment = os.environ | _quick_compiler() if request.param == "simulated" else None
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return child


def _quick_compiler() -> dict[str, str]:
    """mx.compile asks g++ for some 40 kernels of types that nothing else here has. A stand-in before it in PATH makes
    them against a precompiled header without optimising, five times as fast, into a folder of its own.
    """
    include, real = Path(mx.__file__).parent / "include", shutil.which("g++")
    if real is None or not (include / PREAMBLE).is_file():
        return {}
    made, flags = CACHE / mx.__version__, "-std=c++17 -O0 -Wall -fPIC"
    header, script = made / "include" / PREAMBLE, made / "bin/g++"
    if not script.exists():
        for folder in (header.parent, script.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(include / PREAMBLE, header)
        temporary = header.with_suffix(f".{os.getpid()}")
        command = [real, *flags.split(), "-w", "-I", include, "-x", "c++-header", header, "-o", temporary]
        subprocess.run(command, check=True, capture_output=True)
        temporary.replace(header.with_suffix(".h.gch"))
        text = f'#!/bin/sh\nexec "{real}" -I "{made / "include"}" "$@" {flags} -w\n'
        temporary = script.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.chmod(0o755)
        temporary.replace(script)
    return {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(made)}


def converted(folder: Path, kind: str, form: str, *flags: str) -> tuple[Path, Path]:
    """A small checkpoint of a kind, and its drafter."""
    out = folder / f"{kind}-{form}"
    source = pair(folder / f"hf-{out.name}", kind)
    assert convert_main(["--hf-path", str(source), "--mlx-path", str(out), "--pair", *FORMATS[form], *flags]) == 0
    return out, Path(f"{out}-assistant")


def of_one_type(found: dict, dtype: str) -> None:
    """Every float on the way has the model's type, and every choice falls on our kernels."""
    met, chosen = found["met"], found["chosen"]
    moe, dense_head = "paths" in chosen, chosen["drafter"] == "DenseHead"
    assert found["compiles"] or shutil.which("g++") is None
    assert chosen["dtype"] == dtype and f"computed in {dtype} on Metal, our kernels on" in found["says"]
    assert met.keys() >= EVERYWHERE
    places = met.keys() - {"paths", "launched"}
    assert {place: met[place] for place in places} == {place: [dtype] for place in places}
    launched = set(met.get("launched", ()))
    assert launched == (EXPERT_KERNELS if moe else set()) | ({"best_token_metal"} if dense_head else set())
    if moe:
        assert met["paths"] == chosen["paths"] == ["grouped"]
    if dense_head:
        assert chosen["head_argmax"] is True


def test_a_mixture_of_experts(run, tmp_path):
    for found in run(DEMO, converted(tmp_path, "26B-A4B", "4 bit")):
        of_one_type(found, "bfloat16")
        assert found["chosen"]["drafter"] == "DenseHead" and "paths" in found["met"]


def test_per_layer_inputs_and_a_centroid_head(run, tmp_path):
    for found in run(E2B, converted(tmp_path, "E2B", "4 bit")):
        of_one_type(found, "bfloat16")
        assert found["chosen"]["drafter"] == "CentroidHead"


def test_dense_models(run, tmp_path):
    forms = [("12B", "bf16"), ("12B", "4 bit"), ("31B", "4 bit")]
    for found in run(*(converted(tmp_path, kind, form) for kind, form in forms)):
        of_one_type(found, "bfloat16")


def test_float16_and_8_bits(run, tmp_path):
    for found in run(converted(tmp_path, "26B-A4B", "8 bit", "--dtype", "float16")):
        of_one_type(found, "float16")


def test_a_pair_of_two_types_computes_in_the_targets(run, tmp_path):
    """A float32 drafter beside a bfloat16 target, and a target whose norms alone are float32."""
    wide, odd = tmp_path / "wide", tmp_path / "odd"
    for source, folder, part in ((DEMO[1], wide, ""), (DEMO[0], odd, "norm")):
        shutil.copytree(source, folder)
        for file in folder.glob("*.safetensors"):
            tensors, metadata = mx.load(str(file), return_metadata=True)
            floats = {n for n, t in tensors.items() if part in n and mx.issubdtype(t.dtype, mx.floating)}
            assert floats
            tensors = {n: t.astype(mx.float32) if n in floats else t for n, t in tensors.items()}
            mx.eval(tensors)
            mx.save_safetensors(str(file), tensors, metadata)
    for found in run((DEMO[0], wide), (odd, DEMO[1])):
        of_one_type(found, "bfloat16")


def test_float32_has_the_tokens_of_the_cpu(run, tmp_path):
    """The branches differ in their arithmetic, not in what they compute; drafts change nothing."""
    pairs = [DEMO, E2B, converted(tmp_path, "26B-A4B", "4 bit", "--dtype", "float32")]
    for found, (target, drafter) in zip(run(*((f"{t}:float32", d) for t, d in pairs)), pairs, strict=True):
        of_one_type(found, "float32")
        if device.kind() is not device.Kind.CPU:
            continue  # a GPU may round passes of different widths differently; `verify` looks into that
        greedy, drafted, sampled, sampled_drafted = found["tokens"]
        assert greedy == drafted and sampled == sampled_drafted
        engine = load(str(target), str(drafter), dtype="float32", num_draft_tokens=0)
        for tokens, settings in ((greedy, found["greedy"]), (sampled, found["sampled"])):
            results = engine.generate(found["prompts"], SamplingParams(**settings))
            assert tokens == [result.tokens for result in results]
        assert len({token for row in greedy for token in row}) > 6, "a text that repeats itself proves little"


@pytest.mark.slow
def test_products_that_keep_a_rows_bits(run, tmp_path):
    """All of them go through the kernel of few rows, drafts included; float32 has the tokens of the CPU."""
    pairs = [DEMO, converted(tmp_path, "E2B", "4 bit")]
    exact, half = run(*((f"{t}:{dtype}:rows", d) for (t, d), dtype in zip(pairs, ("float32", ""), strict=True)))
    for found in (exact, half):
        assert "few_rows_metal" in found["met"]["launched"] and "products few rows then stock" in found["says"]
    if device.kind() is not device.Kind.CPU:
        return
    greedy, drafted, sampled, sampled_drafted = exact["tokens"]
    assert greedy == drafted and sampled == sampled_drafted
    engine = load(*map(str, DEMO), dtype="float32", num_draft_tokens=0)
    for tokens, settings in ((greedy, exact["greedy"]), (sampled, exact["sampled"])):
        results = engine.generate(exact["prompts"], SamplingParams(**settings))
        assert tokens == [result.tokens for result in results]


@pytest.mark.parametrize("bits", ["8", "4,rings"])
def test_kv_in_few_bits(run, tmp_path, bits):
    """What is quantised, scaled, attended and drafted has the model's type, of 16 bits or 32; with float32 the texts of
    plain decoding are those with drafts, and those of the CPU's branch.
    """
    half = converted(tmp_path, "12B", "8 bit", "--dtype", "float16")
    folders = [(DEMO[0], DEMO[1], ""), (E2B[0], E2B[1], ""), (half[0], half[1], ""), (DEMO[0], DEMO[1], "float32")]
    found = run(*((f"{target}:{dtype}:{bits}", drafter) for target, drafter, dtype in folders))
    for each, dtype in zip(found, ("bfloat16", "bfloat16", "float16", "float32"), strict=True):
        of_one_type(each, dtype)
        assert f"K/V of {'all' if 'rings' in bits else 'full'} layers in {bits[0]} bits" in each["says"]
        assert each["met"]["quantised"] == [dtype]
    if device.kind() is not device.Kind.CPU:
        return
    greedy, drafted, sampled, sampled_drafted = found[-1]["tokens"]
    assert greedy == drafted and sampled == sampled_drafted
    options = {"kv_bits": int(bits[0]), "kv_bits_rings": "rings" in bits}
    engine = load(*map(str, DEMO), dtype="float32", num_draft_tokens=0, **options)
    for tokens, settings in ((greedy, found[-1]["greedy"]), (sampled, found[-1]["sampled"])):
        results = engine.generate(found[-1]["prompts"], SamplingParams(**settings))
        assert tokens == [result.tokens for result in results]
