"""benchmarks.server: what it takes for a whole answer, and what it makes of its figures."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.server import peers, soak
from benchmarks.server.__main__ import main


def lines(*events: dict | str) -> bytes:
    return "".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in events).encode()


def chunk(text: str) -> dict:
    return {"choices": [{"delta": {"content": text}}]}


def test_a_stream_that_is_cut_is_no_answer():
    good = soak.Good(soak.CHAT, {"stream": True}, "ab")
    assert soak.text_of(good, lines(chunk("a"), chunk("b"), "[DONE]")) == "ab"
    for cut in (lines(chunk("a"), chunk("b")), lines(chunk("a"), {"error": {"message": "x"}}, "[DONE]")):
        with pytest.raises((ValueError, LookupError)):
            soak.text_of(good, cut)
    claude = soak.Good(soak.CLAUDE, {"stream": True})
    said = {"type": "content_block_delta", "delta": {"text": "x"}}
    assert soak.text_of(claude, lines(said, {"type": "message_stop"})) == "x"
    with pytest.raises(ValueError):
        soak.text_of(claude, lines(said))


def test_another_s_text_is_wrong_and_an_error_has_failed(monkeypatch):
    answers = iter(["its own", "another's", ValueError("500")])

    async def ask(port: int, good: soak.Good) -> str:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    monkeypatch.setattr(soak, "ask", ask)
    seen, good = soak.Seen(), soak.Good(soak.CHAT, {}, "its own")
    for _ in range(3):
        asyncio.run(soak._well(0, good, seen))
    assert (seen.good, len(seen.wrong), len(seen.failed)) == (3, 1, 1)


def test_good_requests_are_of_all_routes_and_settings():
    some = soak.goods(soak.KINDS)
    assert {good.path for good in some} == {soak.CHAT, soak.TEXT, soak.CLAUDE}
    assert {good.body["stream"] for good in some} == {True, False}
    assert some == soak.goods(soak.KINDS)


def test_servers_are_judged_by_their_texts():
    ways = [peers.Way(name, [], "") for name in ("ours", "slow", "slower")]
    for way, seconds in zip(ways, (1.0, 2.0, 4.0), strict=True):
        texts = ["abcd", "efgh" if way.name != "slower" else "xxxx"]
        way.calls += [{"texts": texts, "seconds": seconds, "firsts": [0.1, 0.2]}] * 3
    found = peers.judged(ways, list)
    assert found["better"] == "slow" and found["ratios"] == {"slow": [2.0, 2.0, 2.0], "slower": [4.0, 4.0, 4.0]}
    assert [line["equal_texts"] for line in found["servers"]] == [2, 2, 1]


def test_what_cannot_be_measured_is_told(capsys):
    assert main(["cost", "--repeats", "0"]) == 2
    assert "--repeats is 0, expected at least 1" in capsys.readouterr().err
