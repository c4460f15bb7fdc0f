"""Several streams of one engine: open at once, read in any order, closed early; threads; forks."""

import gc
import multiprocessing
import os
import random
import threading
from dataclasses import replace

import pytest
from held_out import PROMPTS

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine.calibration import Costs
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.engine.intake import Intake, Options
from mlx_gemma_mtp.machine import device, memory
from mlx_gemma_mtp.speculative.costs import UNKNOWN

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=64, seed=5)
LONG = replace(GREEDY, max_tokens=4000)
CALLS = [(PROMPTS[:3], GREEDY), (PROMPTS[3:5], SAMPLED), (PROMPTS[5:6], GREEDY)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    loaded = load()
    for costs in loaded.costs.values():  # nothing is measured
        costs.table = lambda *_: UNKNOWN
    return loaded


@pytest.fixture(scope="module")
def alone(engine) -> list[list[list[int]]]:
    return [[engine.generate(p, params, num_draft_tokens=0).tokens for p in prompts] for prompts, params in CALLS]


@pytest.mark.parametrize("drafts", ["auto", 3])
@pytest.mark.parametrize("order", range(2))
def test_open_streams_do_not_know_of_each_other(engine, alone, drafts, order):
    """Three at once, read in a random order; each text is that of its prompt alone."""
    chance = random.Random(order)
    streams = [engine.stream(prompts, params, num_draft_tokens=drafts) for prompts, params in CALLS]
    texts, waiting = [[[] for _ in prompts] for prompts, _ in CALLS], [0, 1, 2]
    while waiting:
        number = chance.choice(waiting)
        chunk = next(streams[number], None)
        if chunk is None:
            waiting.remove(number)
        else:
            texts[number][chunk.index] += chunk.tokens
    assert texts == alone


@pytest.mark.parametrize("read", [1, 4, 5])
def test_a_call_in_the_middle_of_a_stream(engine, alone, read):
    """It waits for nobody's reader, and disturbs no text."""
    stream = engine.stream(*CALLS[0])
    first = [next(stream) for _ in range(read)]
    assert engine.generate(*CALLS[1][:1], SAMPLED)[0].tokens == alone[1][0]
    texts = [[], [], []]
    for chunk in [*first, *stream]:
        texts[chunk.index] += chunk.tokens
    assert texts == alone[0]


def test_a_stream_that_is_closed_early_leaves_nothing_behind(engine, alone, monkeypatch):
    """Nobody else's rows go with it, figures are complete, and what its rounds took is learnt."""
    learnt = []
    monkeypatch.setattr(Costs, "learn", lambda self, verified, drafted: learnt.append(True))
    stays, goes = engine.stream(*CALLS[0]), engine.stream(PROMPTS[:2], [LONG, replace(GREEDY, max_tokens=2)])
    chunks = [next(stays) for _ in range(4)]
    ended = next(chunk.result for chunk in goes if chunk.result is not None)
    assert ended.stats.host_syncs > 0 and ended.stats.peak_memory_gb > 0
    goes.close()
    texts = [[], [], []]
    for chunk in [*chunks, *stays]:
        texts[chunk.index] += chunk.tokens
    assert texts == alone[0]
    assert engine.generate(PROMPTS[0], GREEDY).tokens == alone[0][0] and learnt
    depth = engine.call(lambda: engine._models["depth"])
    assert not depth._own and not depth._chosen.counts and not depth._pass.parts


def test_streams_that_are_dropped_are_closed(engine):
    for _ in range(20):
        next(engine.stream(PROMPTS[0], LONG))
    gc.collect()
    assert engine.generate(PROMPTS[0], GREEDY).finish_reason == "length"
    assert not engine._worker._outboxes


def test_waiting_prompts_end_with_their_call(engine):
    """More than there are rows: all are told, and nobody waits for their turn."""
    cancel, results = threading.Event(), {}
    for chunk in engine.stream(PROMPTS[:9] * 3, LONG, cancel=cancel):
        cancel.set()
        if chunk.result is not None:
            results[chunk.index] = chunk.result.finish_reason
    assert results == dict.fromkeys(range(27), "cancelled")


def test_threads_share_the_engine(engine, alone):
    """Eight at once, some with streams that they read in turn, some with whole calls: each text is as alone."""
    texts = {}

    def read(place: int) -> None:
        prompts, params = CALLS[place % 3]
        if place < 4:
            texts[place] = [result.tokens for result in engine.generate(prompts, params)]
            return
        streams, texts[place] = [engine.stream(prompt, params) for prompt in prompts], [[] for _ in prompts]
        while any(streams):
            for row, stream in enumerate(streams):
                chunk = stream and next(stream, None)
                texts[place][row] += chunk.tokens if chunk else []
                streams[row] = stream if chunk else None

    everyone = [threading.Thread(target=read, args=(place,)) for place in range(8)]
    for thread in everyone:
        thread.start()
    for thread in everyone:
        thread.join(300)
    assert texts == {place: alone[place % 3] for place in range(8)}


def test_any_thread_reads_a_stream(engine, alone):
    """Even one for each chunk."""
    stream, tokens = engine.stream(PROMPTS[5], GREEDY), []

    def read():
        tokens.append(next(stream, None))

    while not tokens or tokens[-1] is not None:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert [t for chunk in tokens[:-1] for t in chunk.tokens] == alone[2][0]


@pytest.mark.parametrize("settings", [{}, {"tools": [{"name": "f"}], "tool_choice": "required"}], ids=["text", "calls"])
def test_texts_are_encoded_in_many_threads(engine, settings):
    """At once: raw, with control strings, with grammars, which are compiled when the first needs them."""
    pytest.importorskip("llguidance")
    special = [{"role": "user", "content": "<|turn>user\n<bos>"}]
    prompts = ["a" * 50, special, "x<|turn>y", "def f(x):", special * 1] * 4
    params = replace(GREEDY, ignore_eos=False, regex=None if settings else "[ab]{3}")
    own, found = Intake(engine.text, engine.defaults, engine.target.config, 2, None, {}), {}

    def encode(place: int) -> None:
        found[place] = own.requests([prompts[place]], params, Options(**settings))[0]

    everyone = [threading.Thread(target=encode, args=(place,)) for place in range(len(prompts))]
    for thread in everyone:
        thread.start()
    for thread in everyone:
        thread.join(60)
    told = [{"type": "function", "function": {"name": "f"}}] if settings else None
    usual = [engine.text.encode(prompt, tools=told) for prompt in prompts]
    assert [found[place].prompt for place in range(len(prompts))] == usual
    assert len({each.id for each in found.values()}) == len(prompts)
    assert all(each.constraint is not None for each in found.values())


def _in_a_child(engine, stream, answers) -> None:
    for call in (
        lambda: engine.generate("x", GREEDY),
        lambda: engine.stream("x", GREEDY),
        lambda: engine.calibrate(1),
        lambda: next(stream),
        lambda: engine.call(len),
        load,
    ):
        try:
            answers.put(f"no error: {call()}")
        except UserError as error:
            answers.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_in_a_line(engine):
    """It would wait for ever for threads that did not come along."""
    stream = engine.stream(PROMPTS[0], LONG)
    next(stream)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_in_a_child, args=(engine, stream, answers))
    child.start()
    try:
        said = [answers.get(timeout=30) for _ in range(6)]
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert all("'spawn'" in line and "\n" not in line for line in said), said
    assert next(stream).result is None  # the parent's stream goes on
    stream.close()


def test_weights_stay_wired_until_the_last_stream_ends(monkeypatch):
    """A begins, B begins, A ends: B's weights are still wired; after B the limit is what it was."""
    limits = [7]
    monkeypatch.setattr(device, "traits", lambda: device.TABLE[device.Kind.METAL])
    monkeypatch.setattr(memory, "total_bytes", lambda: 100)
    monkeypatch.setattr(memory.mx, "set_wired_limit", lambda n: limits.append(n) or limits[-2])
    a, b = memory.wired_limit(), memory.wired_limit()
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert limits[-1] == 100
    b.__exit__(None, None, None)
    assert limits[-1] == 7
