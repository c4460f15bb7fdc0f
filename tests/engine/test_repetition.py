"""When a text repeats itself: against the definition, token by token, and in replies of the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import FREE, SAMPLED, engine_of, prompt_of
from spelling import Bytes

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.engine.repetition import Repetition
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.stats import Stats
from mlx_gemma_mtp.text.tools import Tools


def repeats(tokens: list[int], length: int) -> bool:
    """The definition: the last `length` tokens are a block of at most half as many, again and again."""
    end = tokens[-length:]
    return len(end) == length and any(end[p:] == end[:-p] for p in range(1, length // 2 + 1))


def first_end(tokens: list[int], length: int) -> int | None:
    """How many tokens there are when the text is found to repeat, None where it never is."""
    watch, so_far = Repetition(length), []
    for token in tokens:
        so_far.append(token)
        if watch.ends(so_far):
            return len(so_far)
    return None


def defined_end(tokens: list[int], length: int) -> int | None:
    return next((n for n in range(1, len(tokens) + 1) if repeats(tokens[:n], length)), None)


# Of few tokens, in blocks that are repeated and cut off, so that periods come, go and lie within each other.
WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
RUNS = st.builds(lambda block, times, cut: (block * times)[: max(len(block) * times - cut, 0)], WORDS,
                 st.integers(1, 12), st.integers(0, 6))  # fmt: skip
TEXTS = st.lists(RUNS, max_size=8).map(lambda runs: [token for run in runs for token in run])


@settings(max_examples=1000, deadline=None)
@given(TEXTS, st.integers(4, 40))
def test_it_is_found_at_the_first_token_for_which_it_holds(tokens, length):
    assert first_end(tokens, length) == defined_end(tokens, length)


@pytest.mark.parametrize("length", range(4, 24))
def test_every_period_after_every_beginning(length):
    """A prefix that shares no token with the block shifts where the block begins."""
    for period in range(1, length):
        for before in range(length + 1):
            tokens = [*range(100, 100 + before), *(i % period for i in range(3 * length))]
            expected = before + length if period <= length // 2 else None
            assert first_end(tokens, length) == expected == defined_end(tokens, length)


LENGTH, LONG = 16, 48
PLAIN = replace(FREE, max_tokens=250)


@pytest.fixture(scope="module")
def looping() -> list[int]:
    """A greedy reply that begins to repeat itself; all of its tokens."""
    engine = engine_of("moe")
    tokens = engine.generate(prompt_of(engine, 0, 65), PLAIN, num_draft_tokens=0).tokens
    assert LENGTH < defined_end(tokens, LENGTH) < defined_end(tokens, LONG) < PLAIN.max_tokens
    return tokens


@pytest.mark.parametrize("drafts", [0, 1, 4, "auto"])
@pytest.mark.parametrize("length", [LENGTH, LONG])
def test_a_reply_ends_where_it_repeats(looping, length, drafts):
    """Also amid the tokens that a round accepts; what that round has after it is dropped, as behind a stop string."""
    engine = engine_of("moe")
    ids, params = prompt_of(engine, 0, 65), replace(PLAIN, stop_repetition=length)
    chunks = list(engine.stream(ids, params, num_draft_tokens=drafts))
    result = chunks[-1].result
    assert (result.finish_reason, result.error, result.end_token) == ("repetition", None, None)
    assert result.tokens == looping[: defined_end(looping, length)]
    assert [token for chunk in chunks for token in chunk.tokens] == result.tokens
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert result.text == engine.text.tokenizer.decode(result.tokens)
    assert result.stats.generation_tokens == len(result.tokens)


def test_a_reply_that_does_not_repeat_is_left_alone(looping):
    engine, params = engine_of("moe"), replace(SAMPLED, max_tokens=60, stop_repetition=20)
    plain = engine.generate(prompt_of(engine, 0, 65), replace(params, stop_repetition=None))
    watched = engine.generate(prompt_of(engine, 0, 65), params)
    assert (watched.tokens, watched.finish_reason) == (plain.tokens, "length")


BYTES = Bytes()
TOOLS = Tools.of([{"name": "f"}])
CALL = '<|tool_call>call:f{a:<|"|>ababababab<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nHm, hm, hm, hm, hm, hm.<channel|>"


def request(limit: int = 1000, stop: tuple[str, ...] = (), **params) -> Request:
    settings = SamplingParams(stop=stop, **params)
    return Request(0, 0, [1], settings, BYTES.reply(TOOLS, stop), frozenset([300]), limit, Stats(1))


@pytest.mark.parametrize("text", [CALL, THOUGHT, "Once, and no no no no no."])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_and_calls_are_watched_too(text, size):
    """Whatever the rounds; what is held back of the text comes with the last chunk."""
    tokens, asked, chunks = BYTES.encode(text), request(stop_repetition=8), []
    for at in range(0, len(tokens), size):
        if asked.finish_reason is None:
            asked.take(tokens[at : at + size], size - 1)
            chunks.append(asked.chunk())
    result, end = chunks[-1].result, defined_end(tokens, 8)
    assert end is not None and (result.finish_reason, result.tokens) == ("repetition", tokens[:end])
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning and not result.tool_calls


@pytest.mark.parametrize(
    "options, tokens, reason",
    [
        ({}, "xaaaa", "repetition"),
        ({"limit": 5}, "xaaaa", "repetition"),  # which says more than a limit
        ({"limit": 4}, "xaaaa", "length"),
        ({"stop": ("aaaa",)}, "xaaaa", "stop"),
        ({"stop": ("aaa",)}, "xaaaa", "stop"),
    ],
)
def test_the_end_that_comes_first_is_told(options, tokens, reason):
    asked = request(stop_repetition=4, **options)
    asked.take(BYTES.encode(tokens), 4)
    result = asked.chunk().result
    assert result.finish_reason == reason
    assert result.text == ("x" if reason == "stop" else tokens[: options.get("limit")])


def test_an_end_token_is_no_part_of_what_repeats():
    asked = request(stop_repetition=4)
    asked.take([*BYTES.encode("aaa"), 300], 3)
    result = asked.chunk().result
    assert (result.finish_reason, result.end_token) == ("stop", 300)
