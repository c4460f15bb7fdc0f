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
from mlx_gemma_mtp.models import gemma4
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.sampling.params import COUPLED, REJECTION
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.loop import Speculation, compact
from mlx_gemma_mtp.speculative.prefill import prefill

ROOMS = (
    "cache/cache",
    "cache/kv",
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
        cache = Cache(model.config.kv, 1, len(text), len(text), mx.float32)
        hidden = model(mx.array([text]), cache.span(slice(0, 1), len(text)))
        text.append(int(mx.argmax(model.logits(hidden[:, -1]))))
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
    model, seen = tiny.target(kind), []
    call = gemma4.Block.__call__
    monkeypatch.setattr(gemma4.Block, "__call__", lambda self, x, *rest: seen.append(len(x)) or call(self, x, *rest))
    tokens, column = mx.array(tiny.prompts(2)[1:] * 2)[:, :6], mx.array([5, 2])
    every = model(tokens, Cache(model.config.kv, 2, 16, 16, mx.float32).span(slice(0, 2), 6))
    del seen[:]
    one = model(tokens, Cache(model.config.kv, 2, 16, 16, mx.float32).span(slice(0, 2), 6), column)
    assert seen == [12 if layer.owns_kv else 2 for layer in model.config.layers]
    np.testing.assert_allclose(np.array(one[:, 0]), np.array(every)[[0, 1], [5, 2]], atol=1e-5)


@pytest.mark.parametrize("kind", ["moe", "e2b"])
def test_padding_of_ragged_prompts_goes_through_no_layer(kind, monkeypatch):
    """In chunks of 16, so that rows end in the first, in the second, or go on to the third."""
    model, seen = tiny.target(kind), []
    call = gemma4.Block.__call__
    monkeypatch.setattr(gemma4.Block, "__call__", lambda self, x, *rest: seen.append(len(x)) or call(self, x, *rest))
    batch = [tiny.prompts(8)[i] for i in (0, 1, 7)]  # of 3, 17 and 41 tokens
    cache = Cache(model.config.kv, 3, 41, 16, mx.float32)
    hidden = prefill(model, cache, slice(0, 3), batch)
    owners = sum(layer.owns_kv for layer in model.config.layers)
    readers = len(model.config.layers) - owners
    assert seen == [count for tokens in (3 + 16 + 16, 0 + 1 + 16, 9) for count in [tokens] * owners + [3] * readers]
    assert cache.lengths.tolist() == cache.length_bound == [3, 17, 41]
    for row, prompt in enumerate(batch):
        alone = prefill(model, Cache(model.config.kv, 1, 41, 64, mx.float32), slice(0, 1), [prompt])
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
    whole, _ = tiny.decode(moe, drafter, batch, 3, 30, block=64)
    for block in (1, 5, 16):
        assert tiny.decode(moe, drafter, batch, 3, 30, block=block)[0] == whole


def test_the_draft_position_is_a_setting(moe):
    """Another query position drafts other tokens and emits the same."""
    batch, drafter = tiny.prompts(2), tiny.drafter(moe)
    emitted, drafts = [], []
    for position in (0, -1):
        cache = Cache(moe.config.kv, 2, 64, 16, mx.float32, lookback=-position)
        rules = Rules.of([tiny.GREEDY] * 2, tiny.VOCAB)
        loop = Speculation(moe, drafter, cache, rules, prefill(moe, cache, slice(0, 2), batch), Drafting(position))
        rows = loop.start(3).tokens
        drafts.append(loop.inputs.drafts.tokens.tolist())
        for _ in range(30):
            rows = [row + more for row, more in zip(rows, loop.step(3).tokens, strict=True)]
        emitted.append([row[:20] for row in rows])
    assert emitted[0] == emitted[1] and drafts[0] != drafts[1]


def test_rows_leave_between_rounds(moe):
    """After rows left, the others go on with the same text, and a built verify of the old rows does not leak."""
    batch, drafter = tiny.prompts(8), tiny.drafter(moe)
    plain, _ = tiny.decode(moe, None, batch, 0, COUNT)
    cache = Cache(moe.config.kv, 8, 48, 16, mx.float32)
    rules = Rules.of([tiny.GREEDY] * 8, tiny.VOCAB)
    loop = Speculation(moe, drafter, cache, rules, prefill(moe, cache, slice(0, 8), batch))
    names = list(range(8))
    texts = dict(enumerate(loop.start(3).tokens))
    for leavers in ([], [2], [0, 7], [], [5], [1, 3, 4]):
        for _ in range(4):
            for name, tokens in zip(names, loop.step(3).tokens, strict=True):
                texts[name] = texts[name] + tokens
        rows = compact([name not in leavers for name in names])
        if len(rows) < len(names):
            names = [names[row] for row in rows]
            loop.retain(rows, Rules.of([tiny.GREEDY] * len(rows), tiny.VOCAB))
    while len(texts[6]) < COUNT:
        texts[6] = texts[6] + loop.step(3).tokens[0]
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
        batch = tiny.prompts(4)
        cache = Cache(moe.config.kv, 4, 64, 16, mx.float32)
        rules = Rules.of([tiny.SAMPLED] * 4, tiny.VOCAB)
        loop = Speculation(moe, drafter, cache, rules, prefill(moe, cache, slice(0, 4), batch), Drafting(accept=accept))
        loop.start(num_draft)
        for done in range(5):
            assert loop.host_syncs == 1 + done
            loop.step(num_draft)
    waits = {name: _waits(name) for name in ROOMS}
    # Weights and Rope's tables are evaluated once; prefill waits for each chunk, rows that move for their copies.
    assert waits.pop("speculative/loop") == {"_readback": ["eval", "tolist"]}
    assert waits.pop("speculative/prefill") == {"prefill": ["eval"]}
    assert waits.pop("cache/cache") == {"move": ["eval", "eval"]}
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


@pytest.mark.parametrize("num_draft", [0, 3])
def test_a_long_cache_is_written_in_place(num_draft):
    """A round's peak stays far below a copy of the cache's four large buffers (with a handle kept it is 51 MB more)."""
    model = tiny.target("dense")
    drafter = tiny.drafter(model, "dense") if num_draft else None
    cache = Cache(model.config.kv, 1, 200_000, 64, mx.float32)
    rules = Rules.of([tiny.GREEDY], tiny.VOCAB)
    loop = Speculation(model, drafter, cache, rules, prefill(model, cache, slice(0, 1), tiny.prompts(1)))
    loop.start(num_draft)
    for _ in range(2):
        loop.step(num_draft)
    one_buffer = max(layer.keys.nbytes for layer in cache.layers)  # 12.8 MB
    masks_and_scores = 6 * 4 * (num_draft + 1) * 200_000  # a float32 score a head, and masks
    mx.eval(cache.lengths)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        loop.step(num_draft)
    assert mx.get_peak_memory() - before < one_buffer + masks_and_scores


@pytest.mark.parametrize("rows", [[3, 1, 2], [3, 2], [2, 1], [3], [0, 1]])
def test_a_long_cache_is_written_in_place_after_rows_left(rows):
    """Leaving copies the rows that move, and the verify after it writes in place again."""
    model = tiny.target("dense")
    cache = Cache(model.config.kv, 4, 100_000, 64, mx.float32)
    rules = lambda count: Rules.of([tiny.GREEDY] * count, tiny.VOCAB)  # noqa: E731
    hidden = prefill(model, cache, slice(0, 4), tiny.prompts(4))
    loop = Speculation(model, tiny.drafter(model, "dense"), cache, rules(4), hidden)
    loop.start(3)
    for _ in range(2):
        loop.step(3)
    one_row = sum(2 * layer.keys.nbytes // 4 for layer in cache.layers)
    scores = 4 * 4 * 4 * 2 * 100_000 // 4  # of the slots in use these are few
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loop.retain(rows, rules(len(rows)))
    for _ in range(3):
        loop.step(3)
    movers = sum(place != row for place, row in enumerate(rows))
    assert mx.get_peak_memory() - before < movers * one_row + scores < 4 * one_row


def test_the_bound_of_the_lengths_follows_the_tokens(moe):
    """After each readback the host knows the lengths exactly, so that capacities grow by tokens and not by drafts."""
    batch = tiny.prompts(3)
    wrong = tiny.OracleDrafter(mx.zeros((3, 200), mx.int32), mx.zeros((3, 200), mx.bool_))
    cache = Cache(moe.config.kv, 3, 48, 16, mx.float32)
    loop = Speculation(
        moe, wrong, cache, Rules.of([tiny.GREEDY] * 3, tiny.VOCAB), prefill(moe, cache, slice(0, 3), batch)
    )
    loop.start(7)
    for done in range(30):
        assert cache.length_bound == cache.lengths.tolist() == [len(prompt) + done for prompt in batch]
        loop.step(7)
    slots = [layer.slots for layer in cache.layers if layer.spec.window is None]
    assert slots == [256] * len(slots)  # the longest row has 47 tokens, and would have 257 if every draft counted
    loop.retain([2, 1], Rules.of([tiny.GREEDY] * 2, tiny.VOCAB))
    loop.step(0)  # the oracle knows three rows
    assert cache.length_bound[:2] == cache.lengths.tolist()[:2] == [len(batch[2]) + 31, len(batch[1]) + 31]


def test_a_verify_that_was_only_built_leaves_no_trace(moe):
    """Rows leave, or the verify narrows, before it is dispatched: the cache has the buffers that it had before."""
    cache = Cache(moe.config.kv, 2, 48, 16, mx.float32)
    rules = Rules.of([tiny.GREEDY] * 2, tiny.VOCAB)
    loop = Speculation(moe, tiny.drafter(moe), cache, rules, prefill(moe, cache, slice(0, 2), tiny.prompts(2)))
    held = cache.buffers
    loop.start(3)
    assert not any(now is old for now, old in zip(cache.buffers[0], held[0], strict=True))  # of the next verify
    loop.retain([0, 1], rules)
    assert all(
        now is old
        for new, before in zip(cache.buffers, held, strict=True)
        for now, old in zip(new, before, strict=True)
    )
