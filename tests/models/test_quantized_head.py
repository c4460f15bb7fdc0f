"""The centroid head over a quantised embedding, in every mode: loads, is exact, stays sparse, stays lossless.

Peers crash here: they gather rows of the packed table as if it were the table.
"""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import seeded
import tiny

from convert.cli import main as convert
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.models.drafter import CentroidHead, Drafter

CLOSE = 1e-4
TABLE, CENTROIDS = "model.embed_tokens", "masked_embedding.centroids"
AFFINE = [(bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS = [*AFFINE, (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]
WIDE = 128  # the embedding's width here, so that every group size fits


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    source = seeded.write(folder / "hf", "e2b", "target")
    assert convert(["--hf-path", str(source), "--mlx-path", str(folder / "mlx"), "--dtype", "float32"]) == 0
    return loading.load_target(folder / "mlx", mx.float32)


def written(folder, bits: int, group: int, mode: str, also_centroids: bool) -> dict[str, mx.array]:
    """Writes the E2B drafter, as wide as WIDE, with a quantised head; returns the file's tensors."""
    stored = seeded.describe("e2b")["drafter"]
    stored["config"]["text_config"]["hidden_size"] = WIDE
    tensors = {}
    for name, shape in stored["tensors"].items():
        if not name.endswith("q_norm.weight"):  # elsewhere 32 is the recorded hidden size
            shape = [WIDE if size == 32 else size for size in shape]
        tensors[name] = mx.array(seeded.tensor(name, shape, "quantised"))
    for path in (TABLE, CENTROIDS) if also_centroids else (TABLE,):
        parts = mx.quantize(tensors[f"{path}.weight"], group, bits, mode=mode)
        tensors |= {f"{path}.{part}": value for part, value in zip(("weight", "scales", "biases"), parts, strict=False)}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    table = {"bits": bits, "group_size": group, "mode": mode}
    (folder / "config.json").write_text(json.dumps(stored["config"] | {"quantization": table}))
    return tensors


def dequantized(tensors: dict[str, mx.array], path: str, bits: int, group: int, mode: str) -> np.ndarray:
    """A matrix of the file, float32."""
    parts = [tensors.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
    whole = parts[0] if parts[1] is None else mx.dequantize(*parts, group, bits, mode)
    return np.array(whole.astype(mx.float32))


@pytest.mark.parametrize("also_centroids", [False, True], ids=["table", "table and centroids"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_logits_are_those_of_the_dequantised_head(target, tmp_path, form, also_centroids):
    tensors = written(tmp_path / "drafter", *form, also_centroids)
    drafter = loading.load_drafter(tmp_path / "drafter", target.config, mx.float32)
    assert isinstance(drafter.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(drafter.masked_embedding, CentroidHead)
    y = np.random.RandomState(0).standard_normal((3, WIDE)).astype(np.float32)
    logits, ids = (np.array(a) for a in drafter.scores(mx.array(y)))
    assert logits.dtype == np.float32 and logits.shape == ids.shape == (3, 64)

    table, centroids = (dequantized(tensors, path, *form) for path in (TABLE, CENTROIDS))
    ordering = np.array(tensors["masked_embedding.token_ordering"]).reshape(16, 16)
    best = np.argsort(y @ centroids.T, axis=-1)[:, -4:]
    for row, clusters in enumerate(best):
        assert set(ids[row]) == set(ordering[clusters].reshape(-1))
        np.testing.assert_allclose(logits[row], table[ids[row]] @ y[row], atol=CLOSE, rtol=0)


class Counted:
    """Stands in for an embedding: rows that are looked up are counted, the whole table may not be read."""

    def __init__(self, table: nn.Module):
        self.table, self.rows = table, 0

    def __call__(self, tokens: mx.array) -> mx.array:
        self.rows += tokens.size
        return self.table(tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        raise AssertionError("the whole vocabulary is multiplied")


@pytest.mark.parametrize("form", [(4, 64, "affine"), (4, 32, "mxfp4")], ids=str)
def test_only_the_tokens_of_the_best_centroids_are_read(target, tmp_path, form):
    written(tmp_path / "drafter", *form, True)
    drafter = loading.load_drafter(tmp_path / "drafter", target.config, mx.float32)
    table = Counted(drafter.embed_tokens)
    drafter.masked_embedding(mx.ones((2, WIDE)), table)
    assert table.rows == 2 * 4 * 16  # rows, best centroids, tokens of each


@pytest.mark.parametrize("form", [(4, 32, "affine"), (8, 32, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4")], ids=str)
def test_no_array_of_the_vocabularys_size_is_made(form):
    """65,536 tokens: the dequantised table would take 8 MB, a full row of logits 256 KB."""
    bits, group, mode = form
    raw = tiny.drafter_dict("e2b", centroids=True) | {"num_centroids": 1024, "centroid_intermediate_top_k": 4}
    wide = {"vocab_size": 65_536, "hidden_size": 32}
    raw["text_config"] |= wide
    target_raw = tiny.target_dict("e2b")
    target_raw["text_config"] |= {"vocab_size": 65_536, "vocab_size_per_layer_input": 65_536}
    target_config = tiny.TargetConfig.from_dict(target_raw)
    drafter = Drafter(tiny.DrafterConfig.from_dict(raw, target_config))
    nn.quantize(
        drafter,
        group,
        bits,
        mode=mode,
        class_predicate=lambda path, m: path.startswith(("embed", "masked_embedding.c")),
    )
    y = mx.ones((1, 32))
    mx.eval(drafter.parameters(), drafter.scores(y))  # MLX keeps buffers: the second call is measured
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(drafter.scores(y))
    assert mx.get_peak_memory() - before < 200_000


@pytest.mark.parametrize("form", [form for form in FORMATS if form[1] < 64], ids=str)
def test_speculative_text_is_plain_text(target, tmp_path, form):
    """Whatever the quantised head drafts."""
    written(tmp_path / "drafter", *form, True)
    drafter = loading.load_drafter(tmp_path / "drafter", target.config, mx.float32)
    prompts = [[5, 9, 7], list(range(20, 39))]
    plain, _ = tiny.decode(target, None, prompts, 0, 12)
    drafted, _ = tiny.decode(target, drafter, prompts, 3, 12)
    assert drafted == plain


@pytest.mark.parametrize(
    "flags", [("--q-bits", "4", "--q-group-size", "32"), ("--q-mode", "mxfp4"), ("--q-mode", "nvfp4")], ids=str
)
def test_converted_drafters_load_and_draft(target, tmp_path, flags):
    """What `python -m convert -q` makes of a drafter with centroids."""
    source = seeded.write(tmp_path / "hf", "e2b", "drafter")
    assert convert(["--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx"), "-q", *flags]) == 0
    drafter = loading.load_drafter(tmp_path / "mlx", target.config, mx.float32)
    assert isinstance(drafter.embed_tokens, nn.QuantizedEmbedding)
    plain, _ = tiny.decode(target, None, [[5, 9, 7]], 0, 12)
    assert tiny.decode(target, drafter, [[5, 9, 7]], 4, 12)[0] == plain
