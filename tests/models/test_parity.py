"""Random models of every kind against transformers, through our conversion: float32, within 1e-4."""

import numpy as np
import pytest
import reference

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_oracle
import mlx.core as mx
import tiny

from convert.cli import main as convert
from mlx_gemma_mtp.models import loading

pytestmark = pytest.mark.parity
CLOSE = 1e-4
TEXT = np.random.default_rng(0).integers(2, hf_oracle.VOCAB, 40).tolist()  # five windows of 8
KINDS = hf_oracle.KINDS


def converted(model, folder):
    source = hf_oracle.save(model, folder / "hf")
    assert convert(["--hf-path", str(source), "--mlx-path", str(folder / "mlx"), "--dtype", "float32"]) == 0
    return folder / "mlx"


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    """The target of a kind: transformers' and ours."""
    theirs = hf_oracle.random_target(kind, seed=1)
    ours = loading.load_target(converted(theirs, tmp_path_factory.mktemp("target")), mx.float32)
    return theirs, ours


@pytest.mark.parametrize("chunks", [(), (5, 5, 5), (1,)], ids=["at once", "chunks", "token by token"])
def test_target_logits(pair, chunks):
    theirs, ours = pair
    logits, _, _ = reference.forward(ours, TEXT, chunks)
    np.testing.assert_allclose(logits, hf_oracle.target_logits(theirs, TEXT), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("ordered", [False, True], ids=["dense head", "centroid head"])
def test_draft_steps(kind, pair, ordered, tmp_path):
    """Four steps, before and past the window: tokens, logits (of the shortlist) and the carried hidden state."""
    theirs, ours = pair
    their_drafter = hf_oracle.random_drafter(kind, seed=2, ordered=ordered)
    drafter = loading.load_drafter(converted(their_drafter, tmp_path), ours.config, mx.float32)
    for length in (4, 9, 40):
        want = hf_oracle.draft_steps(theirs, their_drafter, TEXT[:length], 4)
        tokens, scores, carried = reference.draft_steps(ours, drafter, TEXT[:length], 4)
        assert tokens == want.tokens
        np.testing.assert_allclose(np.stack(carried), want.hidden, atol=CLOSE, rtol=0)
        for (logits, ids), row in zip(scores, want.logits, strict=True):
            assert len(ids) == (64 if ordered else hf_oracle.VOCAB)
            np.testing.assert_allclose(logits, row[ids], atol=CLOSE, rtol=0)


def test_speculative_text_is_their_greedy_text(kind, pair, tmp_path):
    theirs, ours = pair
    their_drafter = hf_oracle.random_drafter(kind, seed=2)
    drafter = loading.load_drafter(converted(their_drafter, tmp_path), ours.config, mx.float32)
    prompts = [TEXT[:5], TEXT[:19]]
    texts, _ = tiny.decode(ours, drafter, prompts, 3, 40)
    assert texts == [hf_oracle.greedy(theirs, prompt, 40) for prompt in prompts]
