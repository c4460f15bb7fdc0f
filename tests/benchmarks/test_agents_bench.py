"""benchmarks.serve: what agents say, and what is made of the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.server import agents, peers
from benchmarks.server.peers import Way
from benchmarks.workers import OURS
from mlx_gemma_mtp.files.hub import Pair


def call(firsts: list[list[float]], tokens: int, seconds: float, known: int = 0, text: str = "yes") -> dict:
    turns = {"tokens": [tokens], "prompts": [40], "known": [known], "texts": [text]}
    return {"firsts": firsts, "seconds": [seconds] * len(firsts)} | {key: [n] * len(firsts) for key, n in turns.items()}


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
    assert asked[1][1]["messages"][2]["content"] == "said 1" and len(found["firsts"]) == 2


def test_figures_and_ratios():
    mine = [call([[1.0], [0.1], [0.3]], 10, 2.0, 30)]
    ours = agents.line(f"{OURS}, drafts auto", 1, mine, mine)
    assert ours["first_turn_s"][0] == 1.0 and ours["later_turns_s"][0] == 0.2 and ours["tokens_per_s"][0] == 5.0
    assert ours["prompt_tokens_known"] == 0.75 and ours["equal_texts"] == 1.0 and ours["tokens"] == [30]
    assert agents.in_short(mine[0]) == "6.00 s, first texts of later turns 0.20 s, 75% known"
    slow = agents.line("mlx-lm", 1, [call([[2.0], [0.8], [0.8]], 10, 4.0)], mine)
    quick = agents.line("mlx-vlm", 1, [call([[2.0], [0.9], [0.9]], 10, 3.0, text="no")], mine)
    assert (slow["prompt_tokens_known"], slow["equal_texts"], quick["equal_texts"]) == (0.0, 1.0, 0.0)
    found = agents.ratios([slow, ours, quick])
    assert found == {"later_turns": pytest.approx(4.0), "tokens": pytest.approx(1.5, rel=1e-3)}
    assert agents.ratios([ours]) == {}
    missed = {each.what: each.missed for each in serve.told([ours, slow, quick], 8)}
    assert [what for what, bad in missed.items() if bad] == ["8 agents: tokens/s, times the better peer's"]
    assert not any(each.missed for each in serve.told([ours, slow, quick], 4))


def test_peers_keep_beginnings_for_every_client():
    ours, lm, *vlm = peers.ways(Pair(Path("t"), Path("d"), None), [2], 16)
    assert int(lm.command[lm.command.index("--prompt-cache-size") + 1]) >= 3 * 16
    assert len(vlm) == 2 and all(way.environment["APC_ENABLED"] == "1" for way in vlm)
    assert all(int(way.environment["APC_CHECKPOINT_ENTRIES"]) >= 3 * 16 for way in vlm)
    assert not ours.environment
    ours, *others = peers.ways(Pair(Path("t"), Path("d"), None), [2], 16, threads=2)
    assert not ours.environment and {way.environment["OPENBLAS_NUM_THREADS"] for way in others} == {"2"}


def test_bad_counts_are_named(capsys):
    assert serve.main(["--turns", "1"]) == 2 and "--turns is 1, expected at least 2" in capsys.readouterr().err
