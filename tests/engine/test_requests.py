"""Requests: what their tokens become, whichever rounds bring them, and why they end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spelling import Bytes

from mlx_gemma_mtp.engine.request import Request, Result
from mlx_gemma_mtp.engine.stats import Stats
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.speculative.readback import TokenLogprob
from mlx_gemma_mtp.text.messages import normalised
from mlx_gemma_mtp.text.reply import Piece
from mlx_gemma_mtp.text.tools import ToolCall, Tools

BYTES = Bytes()
END, RESPONSE = 300, 301  # end tokens: of a turn, and what follows calls
TOOLS = Tools.of([{"name": "f"}])
CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
REPLY = f"<|channel>thought\nLet me see.\n<channel|>Wait.\n{CALL}{CALL}"


def request(limit: int = 1000, stop: tuple[str, ...] = (), tools: Tools | None = TOOLS, **params) -> Request:
    stream = BYTES.reply(tools, stop)
    ends = frozenset((END, RESPONSE))
    return Request(0, 3, [1], SamplingParams(stop=stop, **params), stream, ends, limit, Stats(1))


def rounds(asked: Request, tokens: list[int], places: list[int]) -> list:
    """The chunks of a request whose tokens come in rounds that end at these places."""
    ends = sorted({place for place in places if place < len(tokens)} | {len(tokens)})
    chunks, before = [], 0
    for end in ends:
        logprobs = [TokenLogprob(token, -1.0, [(token, -1.0)]) for token in tokens[before:end]]
        asked.take(tokens[before:end], None, logprobs=logprobs)
        chunks.append(asked.chunk())
        before = end
        if asked.finish_reason:
            break
    if asked.finish_reason:
        return chunks
    asked.cancel()
    return [*chunks, asked.chunk()]


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.integers(1, 130), max_size=40),
    limit=st.integers(1, 140),
    end=st.sampled_from([None, END]),
    stop=st.sampled_from([(), ("Wait",)]),
    repeats=st.sampled_from([None, 4]),
)
def test_who_surely_goes_on_does(places, limit, end, stop, repeats):
    """Whatever ends a request ends none of which it was said before that it goes on."""
    asked = request(limit, stop, stop_repetition=repeats)
    tokens = BYTES.encode(REPLY) + ([] if end is None else [end])
    ends, before, said = sorted({place for place in places if place < len(tokens)} | {len(tokens)}), 0, 0
    for place in ends:
        goes_on = asked.goes_on(tokens[before:place])
        asked.take(tokens[before:place], None)
        assert not goes_on or (asked.finish_reason is None and asked.error is None)
        asked.chunk()
        before, said = place, said + goes_on
        if asked.finish_reason:
            break
    assert said >= (len(ends) - 1 if before == len(tokens) < limit and not stop and repeats is None else 0)


def whole(reply: str, end: int | None = END, **options) -> Result:
    tokens = BYTES.encode(reply) + ([] if end is None else [end])
    return rounds(request(**options), tokens, [])[-1].result


@settings(max_examples=60, deadline=None)
@given(places=st.lists(st.integers(1, 130), max_size=40), end=st.sampled_from([END, RESPONSE]))
def test_chunks_add_up_to_the_result(places, end):
    tokens = [*BYTES.encode(REPLY), end]
    chunks = rounds(request(logprobs=1), tokens, places)
    result = chunks[-1].result
    assert [chunk.result for chunk in chunks[:-1]] == [None] * (len(chunks) - 1) and {c.index for c in chunks} == {3}
    assert (result.text, result.reasoning) == ("Wait.", "Let me see.")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("f", {"a": "x"})] * 2
    assert (result.finish_reason, result.end_token, result.tokens) == ("tool_calls", end, tokens[:-1])
    assert [each.token for each in result.logprobs] == result.tokens
    for name in ("text", "reasoning"):
        assert "".join(getattr(chunk, name) for chunk in chunks) == getattr(result, name)
    for name in ("tokens", "tool_calls", "logprobs"):
        assert [each for chunk in chunks for each in getattr(chunk, name)] == getattr(result, name)
    assert len({call.id for call in result.tool_calls}) == 2


@pytest.mark.parametrize(
    "reply, end, options, reason, end_token, text, calls",
    [
        ("Hello.", END, {}, "stop", END, "Hello.", 0),
        (CALL, RESPONSE, {}, "tool_calls", RESPONSE, "", 1),
        (CALL[: -len("<tool_call|>")], END, {}, "tool_calls", END, "", 1),  # its end is known at the end alone
        ("<|tool_call>call:f{a:[1", END, {}, "tool_calls", END, "", 1),  # the model left out the brackets
        ('<|tool_call>call:f{a:<|"|>x}', RESPONSE, {}, "tool_calls", RESPONSE, "", 1),
        ("<|tool_call>call:f{a:[1", None, {}, "cancelled", None, "<|tool_call>call:f{a:[1", 0),  # nobody knows
        (f"{CALL}a STOP", None, {"stop": ("STOP",)}, "tool_calls", None, "a ", 1),
        ("a STOP", None, {"stop": ("STOP",)}, "stop", None, "a ", 0),
        (CALL + "ab", None, {"limit": len(BYTES.encode(CALL)) + 1}, "length", None, "a", 1),
        (CALL + "ab", None, {}, "cancelled", None, "ab", 1),
        ("<|tool_call>call:f{a", END, {}, "stop", END, "<|tool_call>call:f{a", 0),
        (CALL, END, {"tools": None}, "stop", END, CALL, 0),
        ("", END, {}, "stop", END, "", 0),
    ],
)
def test_why_a_request_ends(reply, end, options, reason, end_token, text, calls):
    """Calls are the reason only where the model stopped by itself and there are calls to answer."""
    result = whole(reply, end, **options)
    assert (result.finish_reason, result.end_token, result.text) == (reason, end_token, text)
    assert len(result.tool_calls) == calls and END not in result.tokens


def test_results_without_thoughts_and_calls_need_no_more_than_before():
    result = Result("text", [1], "stop", Stats(1))
    assert (result.reasoning, result.tool_calls, result.end_token) == ("", [], None)


def test_a_result_is_a_message_of_the_next_turn():
    """OpenAI's form, which is taken as it is; what is not there is left out."""
    calls = [ToolCall("f", {"a": [1, "ä"]}), ToolCall("g", {})]
    result = Result("Now.", [], "tool_calls", Stats(1), reasoning="Hm.", tool_calls=calls)
    message = result.message()
    assert message["tool_calls"] == [call.as_openai() for call in calls]
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in calls]
    found = normalised([message, *answers])
    assert found[0]["content"] == "Now." and found[0]["reasoning"] == "Hm." and found[2]["name"] == "g"
    assert found[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": [1, "ä"]}}
    assert Result("Yes.", [], "stop", Stats(1)).message() == {"role": "assistant", "content": "Yes."}


class Failing:
    """A stream that fails with a token."""

    stopped = False

    def __init__(self, token: int):
        self.token = token

    def push(self, token: int) -> Piece:
        if token == self.token:
            raise ValueError(f"no text for {token}")
        return Piece(f"{token} ")

    def finish(self, ended: bool = False) -> Piece:
        return Piece("end")


@pytest.mark.parametrize("limit, told", [(9, "cancelled"), (9, "timeout"), (4, None)])
def test_a_text_that_fails_ends_with_the_token_that_it_failed_with(limit, told):
    """Rounds that were begun before the text was made add nothing; whoever ends the request, the text is why."""
    asked = request(limit, logprobs=0)
    asked.stream = Failing(7)
    taken = [[3, 5], [6, 7, 8]][: limit // 2]
    for tokens in taken:
        asked.take(tokens, 1, logprobs=[TokenLogprob(token, -1.0, []) for token in tokens])
    if told is not None:
        chunk = asked.chunk()
        assert (chunk.text, chunk.tokens, chunk.result) == ("3 5 6 ", [3, 5, 6, 7], None) and asked.error
        asked.take([9, 9], 1, logprobs=[TokenLogprob(9, -1.0, [])] * 2)  # of the round that ran meanwhile
        asked.cancel(told)
    result = asked.chunk().result
    assert (result.finish_reason, result.error, result.tokens) == ("error", "ValueError: no text for 7", [3, 5, 6, 7])
    assert [each.token for each in result.logprobs] == result.tokens and result.text == "3 5 6 end"
    assert asked.stats.drafted == len(taken)


def test_chunks_hold_what_came_since_the_last_one():
    asked = request()
    asked.take(BYTES.encode("ab"), None)
    asked.take(BYTES.encode("cd"), 3)
    asked.take(BYTES.encode("e"), 2)
    chunk = asked.chunk()
    assert (chunk.tokens, chunk.drafted, chunk.accepted) == (BYTES.encode("abcde"), 5, 1)
    assert asked.chunk().tokens == []
