"""Every kind of pair against numbers recorded from transformers (record_kinds.py): float32, no torch needed.

The way is a user's: a folder as published, `python -m convert --pair`, load, run.
"""

import mlx.core as mx
import numpy as np
import pytest
import reference
import seeded
import tiny
from test_recorded import CLOSE, ragged

from convert.cli import main as convert
from mlx_gemma_mtp.models import loading


@pytest.fixture(scope="module", params=seeded.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def recorded(kind):
    return dict(np.load(seeded.DATA / f"{kind}.npz"))


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    seeded.write(folder / "hf", kind, "target")
    seeded.write(folder / "hf-assistant", kind, "drafter")
    argv = ["--hf-path", folder / "hf", "--mlx-path", folder / "mlx", "--dtype", "float32", "--pair"]
    assert convert([str(a) for a in argv]) == 0
    target = loading.load_target(folder / "mlx", mx.float32)
    return target, loading.load_drafter(folder / "mlx-assistant", target.config, mx.float32)


def test_the_kinds_are_what_they_are_called(kind, pair):
    """Guards the fixtures: each has what sets its size apart."""
    (target, drafter), config = pair, seeded.describe(kind)["target"]["config"]
    assert (target.config.moe is not None) == (kind == "moe")
    assert (target.config.per_layer_size > 0) == (drafter.config.centroids > 0) == (kind in ("e2b", "e4b"))
    assert any(layer.v_is_k for layer in target.config.layers) == (kind in ("moe", "dense", "unified"))
    assert (config["model_type"] == "gemma4_unified") == (kind == "unified")
    assert (len({layer.mlp_size for layer in target.config.layers}) == 2) == (kind == "e2b")
    assert any(not layer.owns_kv for layer in target.config.layers) == (kind in ("e2b", "e4b"))


@pytest.mark.parametrize("chunks", [(), (5, 5, 5), (1,)], ids=["at once", "chunks", "token by token"])
def test_logits(pair, recorded, chunks):
    """Prefill, chunked prefill and decoding of a text of five windows."""
    logits, _, _ = reference.forward(pair[0], recorded["text"].tolist(), chunks)
    np.testing.assert_allclose(logits[:, ::4], recorded["logits"], atol=CLOSE, rtol=0)
    top = np.take_along_axis(logits, recorded["top"], axis=-1)
    np.testing.assert_allclose(top, recorded["top_logits"], atol=CLOSE, rtol=0)
    assert logits.argmax(-1).tolist() == recorded["top"][:, 0].tolist()


def test_drafts(kind, pair, recorded):
    """Four steps from before the window's end, at it and past it: tokens, logits (of the shortlist), carried hidden."""
    text = recorded["text"].tolist()
    for place, length in enumerate(recorded["drafted_after"]):
        tokens, scores, carried = reference.draft_steps(*pair, text[:length], 4)
        assert tokens == recorded["draft_tokens"][place].tolist()
        np.testing.assert_allclose(np.stack(carried), recorded["draft_hidden"][place], atol=CLOSE, rtol=0)
        for (logits, ids), row in zip(scores, recorded["draft_logits"][place], strict=True):
            assert len(ids) == (64 if kind in ("e2b", "e4b") else 256)
            np.testing.assert_allclose(logits, row[ids], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("num_draft", [0, 3])
def test_speculative_text_is_the_recorded_greedy_text(pair, recorded, num_draft):
    texts, _ = tiny.decode(*pair, ragged(recorded, "prompts"), num_draft, recorded["greedy"].shape[1])
    assert texts == recorded["greedy"].tolist()


def unversioned(value):
    """A description without the version that wrote it: a new release that changes nothing else says the same."""
    if not isinstance(value, dict):
        return value
    return {key: unversioned(each) for key, each in value.items() if key != "transformers_version"}


@pytest.mark.parity
def test_the_record_is_what_transformers_says(kind, recorded):
    pytest.importorskip("torch").set_num_threads(1)  # tiny products: more threads are slower, much slower where busy
    pytest.importorskip("transformers")
    import record_kinds

    theirs = record_kinds.make_pair(kind)
    assert unversioned(record_kinds.description(*theirs)) == unversioned(seeded.describe(kind))
    for name, value in record_kinds.numbers(*theirs).items():
        np.testing.assert_allclose(recorded[name], value, atol=CLOSE, rtol=0, err_msg=name)
