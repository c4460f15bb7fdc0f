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
from mlx_gemma_mtp.machine import memory
from mlx_gemma_mtp.speculative.costs import UNKNOWN

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=64, seed=5)
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
    """The rows of a batch that ends are forgotten, those of an open one are not."""
    stream = engine.stream(*CALLS[0])
    first = [next(stream) for _ in range(read)]
    assert engine.generate(*CALLS[1][:1], SAMPLED)[0].tokens == alone[1][0]
    texts = [[], [], []]
    for chunk in [*first, *stream]:
        texts[chunk.index] += chunk.tokens
    assert texts == alone[0]


def test_a_stream_that_is_closed_early_leaves_nothing_behind(engine, alone, monkeypatch):
    """Nobody else's rows go with it, its figures are complete, and what its rounds took is learnt."""
    learnt = []
    monkeypatch.setattr(Costs, "learn", lambda self, verified, drafted: learnt.append(True))
    stays, goes = engine.stream(*CALLS[0]), engine.stream(PROMPTS[:2], [GREEDY, replace(GREEDY, max_tokens=2)])
    chunks = [next(stays) for _ in range(4)]
    ended = next(chunk.result for chunk in goes if chunk.result is not None)
    assert ended.stats.host_syncs == 0
    goes.close()
    assert ended.stats.host_syncs > 0 and ended.stats.peak_memory_gb > 0
    texts = [[], [], []]
    for chunk in [*chunks, *stays]:
        texts[chunk.index] += chunk.tokens
    assert texts == alone[0] and any(learnt)


def test_streams_that_are_dropped_are_closed(engine, monkeypatch):
    made, depth = [], engine._depth
    monkeypatch.setattr(engine, "_depth", lambda: made.append(depth()) or made[-1])
    for _ in range(20):
        next(engine.stream(PROMPTS[0], GREEDY))
    gc.collect()
    assert len(made) == 20 and not any(each._own or each._chosen.counts or each._pass.parts for each in made)


def test_waiting_prompts_cost_nothing_after_a_cancel(engine, monkeypatch):
    """Of five batches one was begun: the others make no cache, prefill nothing and measure nothing."""
    cancel, begun, batch = threading.Event(), [], engine._batch
    monkeypatch.setattr(engine, "max_rows", 2)
    monkeypatch.setattr(engine, "_batch", lambda some, drafts: begun.append(len(some)) or batch(some, drafts))
    results = {}
    for chunk in engine.stream(PROMPTS[:9], GREEDY, cancel=cancel):
        cancel.set()
        if chunk.result is not None:
            results[chunk.index] = chunk.result.finish_reason
    assert begun == [2] and results == dict.fromkeys(range(9), "cancelled")


def test_a_second_thread_is_told_in_a_line(engine, alone):
    """While a round runs. Afterwards any thread may go on, even one for each chunk."""
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def pause(done, total):
        inside.set()
        go_on.wait(30)

    other = threading.Thread(target=lambda: engine.generate(PROMPTS[0], GREEDY, progress=pause))
    other.start()
    inside.wait(30)
    for call in (
        lambda: engine.generate(PROMPTS[0], GREEDY),
        lambda: engine.stream(PROMPTS[0], GREEDY),
        lambda: engine.calibrate(1),
    ):
        with pytest.raises(UserError, match="another thread") as raised:
            call()
        errors.append(str(raised.value))
    go_on.set()
    other.join()
    assert all("\n" not in error for error in errors)
    stream, tokens = engine.stream(PROMPTS[5], GREEDY), []

    def read():
        tokens.append(next(stream, None))

    while not tokens or tokens[-1] is not None:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert [t for chunk in tokens[:-1] for t in chunk.tokens] == alone[2][0]


def _in_a_child(engine, stream, answers) -> None:
    for call in (
        lambda: engine.generate("x", GREEDY),
        lambda: engine.stream("x", GREEDY),
        lambda: engine.calibrate(1),
        lambda: next(stream),
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
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_in_a_child, args=(engine, stream, answers))
    child.start()
    try:
        said = [answers.get(timeout=30) for _ in range(5)]
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert all("'spawn'" in line and "\n" not in line for line in said), said
    assert len(list(stream)) > 1  # the parent's stream goes on


def test_weights_stay_wired_until_the_last_stream_ends(monkeypatch):
    """A begins, B begins, A ends: B's weights are still wired; after B the limit is what it was."""
    limits = [7]
    monkeypatch.setattr(memory, "metal_available", lambda: True)
    monkeypatch.setattr(memory, "total_bytes", lambda: 100)
    monkeypatch.setattr(memory.mx, "set_wired_limit", lambda n: limits.append(n) or limits[-2])
    a, b = memory.wired_limit(), memory.wired_limit()
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert limits[-1] == 100
    b.__exit__(None, None, None)
    assert limits[-1] == 7
