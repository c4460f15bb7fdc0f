"""Agents that share a system prompt, turn by turn: how long each waits for its first text, and how fast texts come.

The trace is made of this project's own pages: the system prompt is a piece of one, as long as that of an agent with
tools, and each turn brings a piece of another, as a tool's result does. All agents take a turn at once, and go on when
all have their replies, which become part of their conversations. What a server knew of a prompt is what its usage says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.server.peers import CHAT, Way
from benchmarks.server.processes import Readers
from benchmarks.serving.intervals import of_median
from benchmarks.workers import OURS, Failed


@dataclass(frozen=True)
class Trace:
    """What agents say. system, turn: characters of the prompt that they share, and of what each turn brings."""

    agents: int
    turns: int
    system: int
    turn: int

    def shared(self, run: int) -> str:
        """Returns the system prompt of a run; no two runs share a beginning."""
        return f"Run {run}. You are an agent.\n" + _page("serving.md", 0, self.system)

    def said(self, run: int, agent: int, turn: int) -> str:
        """Returns what an agent is told in a turn."""
        at = (agent * self.turns + turn) * self.turn
        return f"Agent {agent} of run {run}, step {turn}:\n" + _page("usage.md", at, self.turn)


def _page(name: str, at: int, length: int) -> str:
    text = (ROOT / "docs" / name).read_text()
    begin = at % max(1, len(text) - length)
    return text[begin : begin + length]


def play(way: Way, readers: Readers, trace: Trace, tokens: int, run: int) -> dict[str, Any]:
    """Plays a trace on a server. Returns what the readers read, a list of the turns each."""
    talks = [[{"role": "system", "content": trace.shared(run)}] for _ in range(trace.agents)]
    turns = []
    for turn in range(trace.turns):
        for agent, talk in enumerate(talks):
            talk.append({"role": "user", "content": trace.said(run, agent, turn)})
        more = {"max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        bodies = [{"model": way.model, "messages": talk} | more for talk in talks]
        turns.append(readers.read(way.server.url, CHAT, bodies))
        for talk, text in zip(talks, turns[-1]["texts"], strict=True):
            talk.append({"role": "assistant", "content": text})
    return {key: [turn[key] for turn in turns] for key in turns[0]}


def measure(
    some: list[Way], trace: Trace, tokens: int, repeats: int, note: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Every server in turn, in an order that turns; those that fail are dropped. The first round warms up."""
    readers, found = Readers(), {way.name: [] for way in some}
    try:
        for repeat in range(-1, repeats):
            at = repeat % len(some)
            for way in some[at:] + some[:at]:
                try:
                    played = play(way, readers, trace, tokens, repeat + 1 + 1000 * trace.agents)
                except Failed as error:
                    if way.name.startswith(OURS):
                        raise
                    note(f"failed: {way.name}: {error}")
                    some = [each for each in some if each is not way]
                    found.pop(way.name, None)
                    continue
                if repeat >= 0:
                    found[way.name].append(played)
                    note(f"{trace.agents} agents, {repeat + 1} of {repeats}: {way.name}: {in_short(played)}")
        return found
    finally:
        readers.close()


def in_short(played: dict[str, Any]) -> str:
    """Returns what a trace took, for whoever waits."""
    later = statistics.median(each for turn in played["firsts"][1:] for each in turn)
    return f"{sum(played['seconds']):.2f} s, first texts of later turns {later:.2f} s, {known(played):.0%} known"


def known(played: dict[str, Any]) -> float:
    """Returns the share of the prompts' tokens that a server did not compute."""
    return sum(map(sum, played["known"])) / max(1, sum(map(sum, played["prompts"])))


def line(name: str, agents: int, calls: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures of one server: medians with intervals, seconds and tokens a second; the share of the prompts'
    tokens that were known; and the share of the replies that are this package's own.
    """
    first = [each for call in calls for each in call["firsts"][0]]
    later = [each for call in calls for turn in call["firsts"][1:] for each in turn]
    rates = [sum(map(sum, call["tokens"])) / sum(call["seconds"]) for call in calls]
    return {
        "server": name,
        "agents": agents,
        "first_turn_s": of_median(first).as_list(),
        "later_turns_s": of_median(later).as_list(),
        "tokens_per_s": of_median(rates).as_list(),
        "tokens_per_s_a_user": of_median([rate / agents for rate in rates]).as_list(),
        "tokens": [sum(map(sum, call["tokens"])) for call in calls],
        "prompt_tokens_known": statistics.median(map(known, calls)),
        "equal_texts": statistics.fmean(
            mine == theirs for one, other in zip(ours, calls, strict=True)
            for turn, again in zip(one["texts"], other["texts"], strict=True)
            for mine, theirs in zip(turn, again, strict=True)
        ),
    }  # fmt: skip


def ratios(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns how many times sooner later turns begin here than at the better peer, and how many times faster texts
    come, of the lines of one number of agents. Without a peer there are none.
    """
    ours, *others = sorted(lines, key=lambda each: not each["server"].startswith(OURS))
    if not others:
        return {}
    soonest = min(each["later_turns_s"][0] for each in others)
    fastest = max(each["tokens_per_s"][0] for each in others)
    return {"later_turns": soonest / ours["later_turns_s"][0], "tokens": ours["tokens_per_s"][0] / fastest}
