"""benchmarks.serve: what agents say, and what is made of the figures."""

from __future__ import annotations

import json

import pytest

from benchmarks import serve
from benchmarks.server import agents
from benchmarks.server.peers import Way
from benchmarks.workers import OURS


def call(firsts: list[list[float]], tokens: int, seconds: float, hits: list[float] | None = None) -> dict:
    return {"firsts": firsts, "tokens": [[tokens]] * len(firsts), "seconds": [seconds] * len(firsts), "hits": hits}


def test_agents_of_a_run_share_a_beginning_and_runs_do_not():
    trace = agents.Trace(2, 3, 500, 80)
    assert trace.shared(1) != trace.shared(2) and len(trace.shared(1)) > 500
    said = {trace.said(1, agent, turn) for agent in range(2) for turn in range(3)}
    assert len(said) == 6


def test_replies_become_part_of_conversations(monkeypatch):
    asked = []

    class Reader:
        def read(self, url: str, path: str, bodies: list) -> dict:
            asked.append(json.loads(json.dumps(bodies)))
            return {"texts": [f"said {len(asked)}"] * len(bodies), "firsts": [0.1] * 2, "tokens": [3, 3], "seconds": 1}

    way = Way("mlx-lm", [], "m", server=type("Server", (), {"url": "http://x"})())
    found = agents.play(way, Reader(), agents.Trace(2, 2, 50, 10), 5, 7)
    assert [message["role"] for message in asked[1][0]["messages"]] == ["system", "user", "assistant", "user"]
    assert asked[1][1]["messages"][2]["content"] == "said 1" and found["hits"] is None and len(found["firsts"]) == 2


def test_figures_and_ratios():
    ours = agents.line(f"{OURS}, drafts auto", 1, [call([[1.0], [0.1], [0.3]], 10, 2.0, [30.0, 40.0])])
    assert ours["first_turn_s"][0] == 1.0 and ours["later_turns_s"][0] == 0.2 and ours["tokens_per_s"][0] == 5.0
    assert ours["prefix_hits"] == 0.75
    slow = agents.line("mlx-lm", 1, [call([[2.0], [0.8]], 10, 4.0)])
    quick = agents.line("mlx-vlm", 1, [call([[2.0], [0.9]], 10, 3.0)])
    found = agents.ratios([slow, ours, quick])
    assert found == {"later_turns": pytest.approx(4.0), "tokens": pytest.approx(1.5, rel=1e-3)}
    assert agents.ratios([ours]) == {}
    missed = {each.what: each.missed for each in serve.told([ours, slow, quick], 8)}
    assert [what for what, bad in missed.items() if bad] == ["8 agents: tokens/s, times the better peer's"]
    assert not any(each.missed for each in serve.told([ours, slow, quick], 4))


def test_bad_counts_are_named(capsys):
    assert serve.main(["--turns", "1"]) == 2 and "--turns is 1, expected at least 2" in capsys.readouterr().err
