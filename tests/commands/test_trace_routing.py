"""What `trace_routing` counts, against loops over sets; that it watches the right passes and changes nothing."""

import itertools
import json
import math
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import SamplingParams, load, trace_routing
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.checks import overlap
from mlx_gemma_mtp.checks.overlap import Figures
from mlx_gemma_mtp.checks.routing_trace import Text, Verify, trace, watched
from mlx_gemma_mtp.models.moe import Router

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PROMPTS = ["What is a list?", "def fibonacci(n):", "Write the Python method `__len__(self)` for the class `Row`."]
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, seed=0)
EXPERTS, TOP_K, LAYERS, WIDTH = 7, 2, 3, 4


@pytest.fixture(scope="module")
def engine():
    return load()


@pytest.fixture(scope="module")
def traced(engine):
    """(texts, passes) of a batch in which rows end at different times."""
    return trace(engine, [engine.text.encode(prompt) for prompt in PROMPTS], PARAMS, 3)


def batch(seed: int = 0) -> list[Verify]:
    """Three rows over five passes; row 1 leaves after two, row 0 after four, so that row 2 moves."""
    rng = np.random.default_rng(seed)
    passes = []
    for rows in ((0, 1, 2), (0, 1, 2), (0, 2), (0, 2), (2,)):
        draws = rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, len(rows), WIDTH, 1)), axis=-1)[..., :TOP_K]
        passes.append(Verify(rows, draws, tuple(rng.integers(1, WIDTH + 1, len(rows)).tolist())))
    return passes


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_runs_and_verifies_against_sets():
    """Distinct experts, counted as the length of a union, over every window of every text and every group of rows."""
    passes = batch()
    figures = Figures(EXPERTS, TOP_K)
    figures.add(passes)
    for layer in range(LAYERS):
        texts, groups = defaultdict(list), defaultdict(list)
        for verify in passes:
            chosen = verify.experts[layer].tolist()
            for place, row in enumerate(verify.rows):
                texts[row] += chosen[place][: verify.kept[place]]
            for size in range(1, len(chosen) + 1):
                for start in range(0, len(chosen) - size + 1, size):
                    tokens = itertools.chain(*chosen[start : start + size])
                    groups[size].append(len(set(itertools.chain(*tokens))))
        for count, measured in figures.runs.items():
            windows = [t[i : i + count] for t in texts.values() for i in range(len(t) - count + 1)]
            assert measured.samples == len(windows)
            assert measured.by_layer[layer] == pytest.approx(mean(len(set(itertools.chain(*w))) for w in windows))
        assert max(figures.runs) == max(m for m in overlap.TOKENS if m <= max(map(len, texts.values())))
        assert set(figures.verifies) == {(size, WIDTH) for size in groups}
        for size, unions in groups.items():
            assert figures.verifies[size, WIDTH].samples == len(unions)
            assert figures.verifies[size, WIDTH].by_layer[layer] == pytest.approx(mean(unions))


def test_shares_against_sets():
    passes = batch(1)
    figures = Figures(EXPERTS, TOP_K)
    figures.add(passes)
    for layer in range(LAYERS):
        shares, texts = defaultdict(list), defaultdict(list)
        common = lambda a, b: len(set(a) & set(b)) / TOP_K  # noqa: E731
        for verify in passes:
            chosen = verify.experts[layer].tolist()
            for place, row in enumerate(verify.rows):
                texts[row] += chosen[place][: verify.kept[place]]
            for a, b in itertools.combinations(chosen, 2):
                shares[overlap.ROWS] += map(common, a, b)
        for text in texts.values():
            shares[overlap.NEIGHBOURS] += map(common, text, text[1:])
        done = defaultdict(int)
        for verify in passes:
            chosen = verify.experts[layer].tolist()
            for place, row in enumerate(verify.rows):
                for offset in range(verify.kept[place], WIDTH):
                    if done[row] + offset < len(texts[row]):
                        kind = overlap.FIRST if offset == verify.kept[place] else overlap.LATER
                        shares[kind].append(common(chosen[place][offset], texts[row][done[row] + offset]))
                done[row] += verify.kept[place]
        assert set(shares) == set(overlap.KINDS)
        for kind, values in shares.items():
            assert figures.shares[kind].samples == len(values), kind
            assert figures.shares[kind].by_layer[layer] == pytest.approx(mean(values)), kind


def test_literal_choices():
    """One layer, one row: 0 1 | 1 2 | 4 5 with the last rejected, then 0 1 | 0 1 in its place."""
    first = Verify((0,), np.array([[[[0, 1], [1, 2], [4, 5]]]]), (2,))
    second = Verify((0,), np.array([[[[4, 1], [0, 1], [0, 1]]]]), (3,))
    figures = Figures(6, 2)
    figures.add([first, second])
    assert {m: u.pooled for m, u in figures.runs.items()} == {1: 2.0, 2: (3 + 3 + 3 + 2) / 4, 3: (4 + 4 + 3) / 3} | {
        4: 4.0,
        5: 4.0,
    }
    assert figures.verifies[1, 3].pooled == (5 + 3) / 2
    assert figures.shares[overlap.NEIGHBOURS].pooled == (0.5 + 0.5 + 0.5 + 1) / 4
    assert figures.shares[overlap.FIRST].pooled == 0.5 and overlap.LATER not in figures.shares


def test_formulas():
    """E(1 - (1 - k/E)^M) at the 26B's sizes; its inverse; the exponent of an exact power."""
    assert [round(overlap.uniform(128, 8, m), 1) for m in (1, 2, 3, 4, 5, 8, 16)] == [
        8,
        15.5,
        22.5,
        29.1,
        35.3,
        51.6,
        82.4,
    ]
    assert overlap.independent_tokens(128, 8, overlap.uniform(128, 8, 5.5)) == pytest.approx(5.5)
    assert overlap.independent_tokens(128, 8, 128) == math.inf
    assert overlap.gamma(8, {m: 8 * m**0.77 for m in range(1, 33)}) == pytest.approx(0.77)
    assert overlap.gamma(4, {1: 4.0, 2: 8.0, 3: 12.0}) == pytest.approx(1.0)
    assert math.isnan(overlap.gamma(4, {1: 4.0}))


def test_a_text_ends_where_generate_ends_it():
    end = frozenset({9})
    text = Text(5)
    assert text.take([1, 2], end) == 2 and text.take([3, 9, 4], end) == 2
    assert text.ended and text.tokens == [1, 2, 3]
    full = Text(3)
    assert full.take([1], end) == 1 and full.take([2, 3, 4], end) == 2 and full.ended and full.tokens == [1, 2, 3]


def test_the_text_is_that_of_generate(engine, traced):
    texts, passes = traced
    expected = engine.generate(PROMPTS, PARAMS, num_draft_tokens=3)
    assert texts == [result.tokens for result in expected]
    assert len({verify.rows for verify in passes}) > 1  # rows did leave
    assert all(type(layer.router) is Router for layer in engine.target.layers)
    sampled = SamplingParams(max_tokens=10, temperature=1.0, top_k=50, seed=5)
    texts, _ = trace(engine, [engine.text.encode(PROMPTS[0])], sampled, 2)
    assert texts == [engine.generate(PROMPTS[0], sampled, num_draft_tokens=0).tokens]


def test_others_are_not_traced(engine, traced):
    """A text that is decoded meanwhile: its passes are in no trace, and it goes on afterwards."""
    beside = replace(PARAMS, max_tokens=200, ignore_eos=True)
    expected = engine.generate("a", beside).tokens
    stream = engine.stream("a", beside)
    chunks = [next(stream)]
    texts, passes = trace(engine, [engine.text.encode(prompt) for prompt in PROMPTS], PARAMS, 3)
    assert texts == traced[0] and [verify.kept for verify in passes] == [verify.kept for verify in traced[1]]
    chunks += stream
    assert [token for chunk in chunks for token in chunk.tokens] == expected


def test_the_choices_are_those_of_the_text(engine, traced):
    """Each text once more in one pass: every token chose there what the trace says, in every layer."""
    texts, passes = traced
    for row, chosen in overlap.texts_of(passes).items():
        prompt = engine.text.encode(PROMPTS[row])
        tokens = mx.array([prompt + texts[row]])
        with watched(engine.target) as log:
            cache = Cache(engine.target.config.kv, tokens.size, mx.float32).open(tokens.size)
            mx.eval(engine.target(tokens, cache.span(tokens.size)))
        expected = np.stack([np.array(layer) for layer in log])[:, len(prompt) :][:, : chosen.shape[1]]
        assert (
            len(texts[row]) - 1 <= chosen.shape[1] <= len(texts[row])
        )  # the last token is not fed, an end token stops it
        assert np.array_equal(np.sort(expected, axis=-1), np.sort(chosen, axis=-1))


def test_routers_come_back_after_an_error(engine):
    with pytest.raises(ZeroDivisionError), watched(engine.target):
        assert not any(type(layer.router) is Router for layer in engine.target.layers)
        1 / 0  # noqa: B018
    assert all(type(layer.router) is Router for layer in engine.target.layers)


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = trace_routing.main(list(map(str, argv)))
    return code, *capsys.readouterr()


def test_the_command(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    record, picture = tmp_path / "routing.json", tmp_path / "routing.png"
    flags = ("--max-tokens", 12, "--num-draft-tokens", 2, "--batch", 2, "--json", record, "--plot", picture)
    code, out, _ = run(capsys, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *flags)
    assert code == 0 and "6 layers, 24 experts, 4 a token" in out and "at most 2 rows x 3 tokens" in out
    found = json.loads(record.read_text())
    assert found["num_draft_tokens"] == 2 and found["tokens"] > 10
    assert found["runs"][0]["measured"] == 4 and found["runs"][0]["samples"] == found["tokens"]
    assert all(4 < point["measured"] <= min(4 * point["tokens"], 24) for point in found["runs"][1:])
    assert {(point["rows"], point["tokens"]) for point in found["verifies"]} == {(1, 3), (2, 3)}
    assert f"U(M) = 4 M^{found['gamma']:.3f}" in out and len(found["gamma_by_layer"]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG") and sorted(tmp_path.iterdir()) == [record, picture]


def test_plain_decoding_has_no_rejected_drafts(capsys):
    code, out, _ = run(capsys, "--prompt", PROMPTS[0], "--max-tokens", 6, "--num-draft-tokens", 0)
    assert code == 0 and "1 x 1" in out and "rejected draft " not in out and "neighbours in a text" in out


def test_nothing_half_written_stays(capsys, tmp_path, monkeypatch):
    def broken(record, path, kind):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(trace_routing, "plot", broken)
    code, _, err = run(capsys, "--prompt", PROMPTS[0], "--max-tokens", 4, "--plot", tmp_path / "x.png")
    assert code == 2 and "No space left on device" in err and list(tmp_path.iterdir()) == []


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, "--plot", tmp_path / "x.png")
    assert code == 2 and out == "" and "pip install 'mlx-gemma-mtp[bench]'" in err


def test_a_model_without_experts(capsys, tmp_path):
    shutil.copy(CONFIGS / "gemma-4-31B-it.json", tmp_path / "config.json")
    code, out, err = run(capsys, "--model", tmp_path, "--draft-model", "none")
    assert code == 2 and out == "" and "has no experts" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch", "0"], "--batch is 0, expected 1 or more"),
        (["--num-draft-tokens", "-1"], "--num-draft-tokens is -1"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--temp", "-1"], "temperature is -1.0"),
        (["--prompt", " "], "is empty"),
        (["--prompt-file", "nothing-here.txt"], "nothing-here.txt"),
        (["--model", "nothing-here"], "no model 'nothing-here'"),
        (["--json", "nothing/here.json"], "create nothing"),
        (["--plot", "plot.gif"], ".png"),
        (["--plot"], "expected one argument"),
        (["--draft-model", "none"], "there is no drafter"),
        (["--max-tokens", "1", "--prompt", "x"], "at --max-tokens 1"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0]
