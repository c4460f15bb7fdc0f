"""Streams that tell which draft each piece of their text was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from serving import ASKED, NAME, NOW, Scripted, events, ids_of, post, serving

CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": ASKED, "max_tokens": 200, "draft_positions": True}
END = "<turn|>"
REPLIES = {
    "plain": "Hello there, all of you." + END,
    "emoji": "\U0001f469\u200d\U0001f4bb\U0001f600 é" + END,
    "thought": "<|channel>thought\nHm, so.\n<channel|>  The answer." + END,
    "call": "Let me see. <|tool_call>call:now{}<tool_call|>Done." + END,
    "cut": "no end of \U0001f600",
}


@pytest.fixture(scope="module")
def script(engine):
    script = SimpleNamespace(rounds=[])
    with serving(Scripted(engine, lambda number: script.rounds)) as script.url:
        yield script


def told(url: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each round gave, and the usage. Fails where the pieces of an event are not its text."""
    found = events(url, CHAT, body | {"stream_options": {"include_usage": True}})[:-1]
    rounds = []
    for each in found[:-1]:
        (choice,) = each["choices"]
        if "draft_positions" in choice:
            rounds.append(choice["draft_positions"])
            assert "".join(text for text, _ in rounds[-1]["pieces"]) == choice["delta"]["content"]
        else:
            assert not choice["delta"].get("content")
    return rounds, found[-1]["usage"]


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_pieces_joined_are_the_text(script, engine, name, size):
    ids = ids_of(engine, REPLIES[name])
    script.rounds = [ids[:1], *(ids[at : at + size] for at in range(1, len(ids), size))]
    rounds, usage = told(script.url, BODY | {"tools": [NOW]})
    assert sum(each["tokens"] for each in rounds) == usage["completion_tokens"]
    details = usage["completion_tokens_details"]
    assert sum(each["accepted"] for each in rounds) == details["accepted_prediction_tokens"]
    assert sum(each["drafted"] - each["accepted"] for each in rounds) == details["rejected_prediction_tokens"]
    assert all(place is not None for each in rounds for _, place in each["pieces"])


def test_positions_count_from_one_and_the_target_s_own_is_zero(script, engine):
    first, *ids = ids_of(engine, "Hello there, all of you.")
    script.rounds = [[first], ids[:3], ids[3:5], ids[5:]]
    spelled = [engine.text.fast_tokenizer.decode([token]) for token in ids]
    rounds, _ = told(script.url, BODY)
    assert [place for _, place in rounds[0]["pieces"]] == [0]
    pieces = [piece for each in rounds[1:3] for piece in each["pieces"]]
    assert pieces == [[text, place] for text, place in zip(spelled, [1, 2, 0, 1, 0], strict=False)]


def test_the_stop_string_has_no_piece(script, engine):
    first, *ids = ids_of(engine, "Hello there. And more.")
    script.rounds = [[first], ids]
    rounds, _ = told(script.url, BODY | {"stop": " And"})
    assert "".join(text for each in rounds for text, _ in each["pieces"]) == "Hello there."


def test_the_engine_s_own_rounds(url, engine):
    """The real pair: every round tells what its stats say, and drafts that were kept are the text."""
    body = BODY | {"max_tokens": 48, "temperature": 0, "ignore_eos": True}
    rounds, usage = told(url, body)
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    for each in rounds:
        assert each["accepted"] <= each["drafted"] and each["tokens"] <= each["accepted"] + 1
    kept = sum(place > 0 for each in rounds for _, place in each["pieces"])
    assert kept == usage["completion_tokens_details"]["accepted_prediction_tokens"]
    plain, usage = told(url, body | {"num_draft_tokens": 0})
    assert {place for each in plain for _, place in each["pieces"]} == {0}
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_without_the_field_nothing_is_told(url):
    found = events(url, CHAT, {"messages": ASKED, "max_tokens": 8})
    assert not any("draft_positions" in choice for each in found[:-1] for choice in each["choices"])


def test_without_a_stream_it_is_refused(url):
    answer = post(url, CHAT, BODY)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "draft_positions"
    assert post(url, "/v1/messages", {"messages": ASKED, "max_tokens": 2, "draft_positions": True}).status_code == 400
