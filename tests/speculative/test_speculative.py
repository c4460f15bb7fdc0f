"""The loop:
MTP gives plain decoding's tokens, for every draft length, batch, drafter and model kind; one readback a round.
"""

import ast
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

import mlx_gemma_mtp
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.models import gemma4
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.sampling.params import COUPLED, REJECTION
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.loop import Joiner, Speculation, compact
from mlx_gemma_mtp.speculative.prefill import prefill

ROOMS = (
    "cache/cache",
    "cache/kv",
    "cache/packed",
    "cache/saved",
    "cache/shelf",
    "cache/spec",
    "models/drafter",
    "models/gemma4",
    "models/layers",
    "models/linear",
    "models/moe",
    "ops/fused",
    "sampling/distribution",
    "sampling/noise",
    "sampling/penalties",
    "sampling/rejection",
    "speculative/drafting",
    "speculative/guide",
    "speculative/loop",
    "speculative/prefill",
    "speculative/readback",
    "speculative/rounds",
)
SETTINGS = {"greedy": tiny.GREEDY, "sampled": tiny.SAMPLED, "penalised": tiny.PENALISED}
COUNT = 40  # five times the window of 8


@pytest.fixture(scope="module")
def moe():
    return tiny.target("moe")


def naive(model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache to speak of: the whole text anew for every token."""
    text = list(prompt)
    for _ in range(count):
        _, hidden = prefill(model, [text], len(text))
        text.append(int(mx.argmax(model.logits(hidden))))
    return text[len(prompt) :]


@pytest.mark.parametrize("kind", ["moe", "dense", "e2b", "e4b"])
def test_plain_decoding_is_the_model(kind):
    """Chunked prefill of ragged prompts and one-token rounds, past wrapped windows, equal the model run anew each
    time.
    """
    model = tiny.target(kind)
    batch = tiny.prompts(4)
    texts, _ = tiny.decode(model, None, batch, 0, 30)
    assert texts == [naive(model, prompt, 30) for prompt in batch]
    assert len({token for text in texts for token in text}) > 20  # text that varies


@pytest.mark.parametrize("kind", ["moe", "e2b"])
def test_of_a_prompt_one_token_goes_through_the_layers_that_only_read(kind, monkeypatch):
    """And no padding through any layer. In chunks of 16, so that rows end in the first, in the second, or go on to the
    third.
    """
    model, seen = tiny.target(kind), []
    call = gemma4.Block.__call__
    monkeypatch.setattr(gemma4.Block, "__call__", lambda self, x, *rest: seen.append(len(x)) or call(self, x, *rest))
    prompts = [tiny.prompts(8)[i] for i in (0, 1, 7)]  # of 3, 17 and 41 tokens
    caches, hidden = prefill(model, prompts, 16)
    layers = model.config.layers
    pieces = (3 + 16 + 16, 3), (1 + 16, 2), (9, 1)  # tokens, and prompts that have some
    assert seen == [tokens if layer.owns_kv else rows for tokens, rows in pieces for layer in layers]
    assert [cache.lengths.tolist() for cache in caches] == [cache.length_bound for cache in caches] == [[3], [17], [41]]
    for row, prompt in enumerate(prompts):
        _, alone = prefill(model, [prompt], 64)
        np.testing.assert_allclose(np.array(hidden[row]), np.array(alone[0]), atol=1e-5)


@pytest.mark.parametrize(
    "kind, centroids, settings",
    [
        *(("moe", False, name) for name in SETTINGS),
        *(("e2b", True, name) for name in SETTINGS),
        ("dense", True, "greedy"),
        ("e4b", False, "sampled"),
    ],
)
def test_mtp_equals_plain_decoding(kind, centroids, settings):
    model, params = tiny.target(kind), SETTINGS[settings]
    drafter = tiny.drafter(model, kind, centroids)
    batch = tiny.prompts(8)
    plain, _ = tiny.decode(model, None, batch, 0, COUNT, params)
    for num_draft in (1, 3, 7):
        assert tiny.decode(model, drafter, batch, num_draft, COUNT, params)[0] == plain, num_draft
    for row in (1, 3):
        assert tiny.decode(model, drafter, [batch[row]], 4, COUNT, params)[0] == [plain[row]]


@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rows", [1, 8])
def test_oracle_drafters(moe, rate, rows):
    """Always wrong, 70 % right, always right: the same tokens; and the drafts that can be kept are kept."""
    batch = tiny.prompts(rows)
    plain, _ = tiny.decode(moe, None, batch, 0, COUNT)
    texts = [prompt + text for prompt, text in zip(batch, plain, strict=True)]
    width = max(map(len, texts)) + 16
    mx.random.seed(5)
    hit = mx.random.uniform(shape=(rows, width)) < rate
    oracle = tiny.OracleDrafter(mx.array([text + [0] * (width - len(text)) for text in texts]), hit)
    for num_draft in range(1, 8):
        drafted, loop = tiny.decode(moe, oracle, batch, num_draft, COUNT)
        assert drafted == plain, num_draft
        if rate == 0:
            assert loop.host_syncs == COUNT  # a token a round
        if rate == 1:
            assert loop.host_syncs == 1 + -(-(COUNT - 1) // (num_draft + 1))


def test_always_right_drafts_are_all_kept_past_the_window(moe):
    """The K/V that verify writes are those that plain decoding writes, or acceptance would break."""
    batch = tiny.prompts(2)
    plain, _ = tiny.decode(moe, None, batch, 0, 90)
    texts = mx.array([(p + t)[:90] for p, t in zip(batch, plain, strict=True)])
    oracle = tiny.OracleDrafter(texts, mx.ones(texts.shape, mx.bool_))
    _, loop = tiny.decode(moe, oracle, batch, 4, 60)
    lengths = loop.cache.lengths.tolist()
    assert lengths == [len(p) + 60 - 1 + (5 - 59 % 5) % 5 for p in batch]


def test_chunk_sizes_do_not_change_the_text(moe):
    batch = tiny.prompts(8)
    drafter = tiny.drafter(moe)
    whole, _ = tiny.decode(moe, drafter, batch, 3, 30, chunk=64)
    for chunk in (1, 5, 16):
        assert tiny.decode(moe, drafter, batch, 3, 30, chunk=chunk)[0] == whole


def test_the_draft_position_is_a_setting(moe):
    """Another query position drafts other tokens and emits the same."""
    batch, drafter = tiny.prompts(2), tiny.drafter(moe)
    emitted, drafts = [], []
    for position in (0, -1):
        loop = tiny.begun(moe, drafter, batch, drafting=Drafting(position))
        rows = tiny.round_of(loop, 3).tokens
        drafts.append(loop.inputs.drafts.tokens.tolist())
        for _ in range(30):
            rows = [row + more for row, more in zip(rows, tiny.round_of(loop, 3).tokens, strict=True)]
        emitted.append([row[:20] for row in rows])
    assert emitted[0] == emitted[1] and drafts[0] != drafts[1]


def test_rows_leave_between_rounds(moe):
    """After rows left, the others go on with the same text, and a built verify of the old rows does not leak."""
    batch, drafter = tiny.prompts(8), tiny.drafter(moe)
    plain, _ = tiny.decode(moe, None, batch, 0, COUNT)
    loop = tiny.begun(moe, drafter, batch)
    names = list(range(8))
    texts = dict(enumerate(tiny.round_of(loop, 3).tokens))
    for leavers in ([], [2], [0, 7], [], [5], [1, 3, 4]):
        for _ in range(4):
            for name, tokens in zip(names, tiny.round_of(loop, 3).tokens, strict=True):
                texts[name] = texts[name] + tokens
        rows = compact([name not in leavers for name in names])
        if len(rows) < len(names):
            names = [names[row] for row in rows]
            loop.arrange(rows, Rules.of([tiny.GREEDY] * len(rows), tiny.VOCAB))
    while len(texts[6]) < COUNT:
        texts[6] = texts[6] + tiny.round_of(loop, 3).tokens[0]
    for name, text in texts.items():
        assert text[:COUNT] == plain[name][: len(text)], name


@pytest.mark.parametrize(
    "live, places",
    [([True] * 3, [0, 1, 2]), ([False, True, True], [2, 1]), ([True, False, False, True], [0, 3]), ([False] * 2, [])],
)
def test_the_last_live_row_fills_the_hole(live, places):
    assert compact(live) == places


def test_one_readback_a_round(moe):
    """Counted where it happens; and nowhere else in the loop can the host wait for the device."""
    drafts = tiny.drafter(moe)
    for accept, drafter, num_draft in ((COUPLED, None, 0), (COUPLED, drafts, 3), (REJECTION, drafts, 3)):
        loop = tiny.begun(moe, drafter, tiny.prompts(4), tiny.SAMPLED, drafting=Drafting(accept=accept))
        for done in range(5):
            assert loop.host_syncs == done
            tiny.round_of(loop, num_draft)
    waits = {name: _waits(name) for name in ROOMS}
    # Weights and Rope's tables are evaluated once; prefill waits for each chunk, rows that move for their copies, and
    # buffers that grow for the larger ones.
    assert waits.pop("speculative/loop") == {"_readback": ["eval", "tolist"]}
    assert waits.pop("speculative/prefill") == {"prefill": ["eval"]}
    assert waits.pop("cache/cache") == {"_place": ["eval"]}
    assert waits.pop("cache/kv") == {"resize": ["eval"]}
    assert waits.pop("models/layers") == {"__init__": ["eval", "eval"]}
    assert waits.pop("models/linear") == {"finish_loading": ["eval"]}
    assert not any(waits.values()), waits


def _waits(module: str) -> dict[str, list[str]]:
    """Calls in a module that wait for the device, by function."""
    source = (Path(mlx_gemma_mtp.__file__).parent / f"{module}.py").read_text()
    found: dict[str, list[str]] = {}
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                name = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else None
                if name in ("eval", "item", "tolist", "synchronize"):
                    found.setdefault(function.name, []).append(name)
    return found


LONG = 8000  # tokens


@pytest.fixture(scope="module")
def wide():
    """A model whose K/V weigh more than its scores, and its drafter: 16 MB a row of LONG tokens."""
    change = lambda raw: raw | {"text_config": raw["text_config"] | {"global_head_dim": 128}}  # noqa: E731
    return tiny.target("dense", change=change), lambda model: tiny.drafter(model, "dense", change=change)


def long_rows(model, rows: int) -> Cache:
    """A cache of rows that have LONG tokens each, all zeros."""
    cache = Cache(model.config.kv, 8, mx.float32)
    cache.arrange([long_one(model)] * rows)
    return cache


def long_one(model) -> Saved:
    kept = lambda spec: (1, spec.kv_heads, LONG if spec.window is None else spec.window - 1, spec.head_dim)  # noqa: E731
    return Saved(LONG, tuple((mx.zeros(kept(spec)), mx.zeros(kept(spec))) for spec in model.config.kv))


def greedy(rows: int) -> Rules:
    return Rules.of([tiny.GREEDY] * rows, tiny.VOCAB)


@pytest.mark.parametrize("num_draft", [0, 3])
def test_a_long_cache_is_written_in_place(wide, num_draft):
    """A round's peak stays far below a copy of the cache (with a handle kept it is all of it)."""
    model, drafter = wide
    cache = long_rows(model, 1)
    loop = Speculation(model, drafter(model) if num_draft else None, cache)
    loop.begin(mx.zeros((1, 32)), greedy(1))
    for _ in range(3):
        tiny.round_of(loop, num_draft)
    mx.eval(cache.lengths)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        tiny.round_of(loop, num_draft)
    assert mx.get_peak_memory() - before < cache.bytes / 4


@pytest.mark.parametrize("rows", [[3, 1, 2], [3, 2], [2, 1], [3], [0, 1]])
def test_a_long_cache_is_written_in_place_after_rows_left(wide, rows):
    """Leaving copies the rows that move, and the verify after it writes in place again."""
    model, drafter = wide
    cache = long_rows(model, 4)
    loop = Speculation(model, drafter(model), cache)
    loop.begin(mx.zeros((4, 32)), greedy(4))
    for _ in range(3):
        tiny.round_of(loop, 3)
    one_row = cache.bytes // 4
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loop.arrange(rows, greedy(len(rows)))
    for _ in range(3):
        tiny.round_of(loop, 3)
    movers = sum(place != row for place, row in enumerate(rows))
    assert mx.get_peak_memory() - before < (1.5 * movers + 0.5) * one_row < 4 * one_row


@pytest.mark.parametrize("places", [[0, 1, "new"], ["new", 1, 2], [2, "new", 1], ["new", "new", "new"]])
def test_a_long_cache_is_written_in_place_after_rows_joined(wide, places):
    """In a hole, at the end, or while another moves: restoring a row is part of the verify's own writes."""
    model, drafter = wide
    cache, saved = long_rows(model, 3), long_one(model)
    mx.eval(list(saved.layers))
    loop = Speculation(model, drafter(model), cache)
    loop.begin(mx.zeros((3, 32)), greedy(3))
    for _ in range(3):
        tiny.round_of(loop, 3)
    one_row = cache.bytes // 3
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loop.arrange([Joiner(saved, 5) if place == "new" else place for place in places], greedy(3))
    for _ in range(3):
        tiny.round_of(loop, 3)
    movers = sum(place not in ("new", at) for at, place in enumerate(places))
    new = places.count("new")  # each is laid out once as a row, and movers are copied out besides
    assert mx.get_peak_memory() - before < (1.5 * movers + new + 0.5) * one_row


def test_the_bound_of_the_lengths_follows_the_tokens(moe):
    """After each readback the host knows the lengths exactly, so that capacities grow by tokens and not by drafts."""
    batch = tiny.prompts(3)
    wrong = tiny.OracleDrafter(mx.zeros((3, 200), mx.int32), mx.zeros((3, 200), mx.bool_))
    loop = tiny.begun(moe, wrong, batch)
    cache = loop.cache
    tiny.round_of(loop, 7)
    for done in range(30):
        assert cache.length_bound == cache.lengths.tolist() == [len(prompt) + done for prompt in batch]
        tiny.round_of(loop, 7)
    assert cache.classes == [256] * 3  # the longest row has 47 tokens, and would have 257 if every draft counted
    loop.arrange([2, 1], Rules.of([tiny.GREEDY] * 2, tiny.VOCAB))
    tiny.round_of(loop, 0)  # the oracle knows three rows
    assert cache.length_bound == cache.lengths.tolist() == [len(batch[2]) + 31, len(batch[1]) + 31]


def test_a_verify_that_was_only_built_leaves_no_trace(moe):
    """Rows leave, or the verify narrows, before it is dispatched: the cache has the buffers that it had before."""
    loop = tiny.begun(moe, tiny.drafter(moe), tiny.prompts(2))
    cache, rules = loop.cache, loop.inputs.rules
    held = cache.buffers
    tiny.round_of(loop, 3)
    assert not any(now is old for now, old in zip(cache.buffers[0], held[0], strict=True))  # of the next verify
    loop.arrange([0, 1], rules)
    assert all(
        now is old
        for new, before in zip(cache.buffers, held, strict=True)
        for now, old in zip(new, before, strict=True)
    )
