"""Many callers of one engine at once: threads, tasks, streams read in turn; every text is that of its prompt alone."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import islice

import mlx.core as mx
import pytest
from schedules import FREE, PAIRS, SETTINGS, Asked, alone, engine_of, expected, prompt_of
from watchdog import within

from mlx_gemma_mtp import UserError, load
from mlx_gemma_mtp.engine.outbox import LIMIT as LIMIT_OF_CHUNKS
from mlx_gemma_mtp.models.loading import model_bytes

PROMPTS = [(which, length) for which in range(3) for length in (5, 65, 129)]
LIMIT = 20
NAMES = ("greedy", "sampled", "penalised", "a stop string", "reported")


@pytest.fixture(scope="module", params=PAIRS)
def pair(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def texts(pair) -> dict[tuple, list[int]]:
    """The tokens of every prompt and setting alone, made before anybody calls at once."""
    asked = [Asked(prompt=prompt, settings=name, limit=LIMIT) for prompt in PROMPTS for name in NAMES]
    return {(each.prompt, each.settings): expected(pair, each)[0] for each in asked}


def call(engine, prompt, name, drafts, **options):
    """The arguments of a call of the engine."""
    params = replace(SETTINGS[name][0], max_tokens=LIMIT)
    return (prompt_of(engine, *prompt), params), {"num_draft_tokens": drafts, **options}


def test_eight_threads(pair, texts):
    """Each with calls of its own, one prompt or several, all settings and draft lengths mixed."""
    engine, wrong, barrier = engine_of(pair), [], threading.Barrier(8)

    def work(seed: int) -> None:
        r = random.Random(seed)
        barrier.wait(60)
        for _ in range(3):
            prompt, name, drafts = r.choice(PROMPTS), r.choice(NAMES), r.choice((0, 1, 4, "auto"))
            (ids, params), options = call(engine, prompt, name, drafts)
            try:
                results = [engine.generate(ids, params, **options)]
                if seed % 2:
                    results += engine.generate([ids, ids], params, **options)
            except Exception as error:
                results, said = [], f"{type(error).__name__}: {error}"
                wrong.append((prompt, name, drafts, said))
            wrong.extend((prompt, name, drafts) for each in results if each.tokens != texts[prompt, name])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    with within(300):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("order", range(3))
def test_two_streams_read_in_turn_in_one_thread(pair, texts, order):
    """The second begins while the first one's rounds run; whichever is read, the other goes on."""
    engine, r = engine_of(pair), random.Random(order)
    keys = [(PROMPTS[order], "greedy"), (PROMPTS[order + 4], "sampled")]
    with within(300):
        streams = {}
        for key in keys:
            args, options = call(engine, *key, drafts=4)
            streams[key] = engine.stream(*args, **options)
            next(streams[key])
        made = {key: [] for key in keys}
        while streams:
            key = r.choice(list(streams))
            chunk = next(streams[key], None)
            if chunk is None:
                del streams[key]
            else:
                made[key] += chunk.tokens
    for key in keys:
        assert made[key] and texts[key][-len(made[key]) :] == made[key]


def test_tasks_threads_and_streams_at_once(pair, texts):
    """Everything that may call, at the same time."""
    engine = engine_of(pair)
    keys = [(prompt, NAMES[i % len(NAMES)]) for i, prompt in enumerate(PROMPTS)]

    async def whole(key):
        args, options = call(engine, *key, drafts=4)
        return key, (await engine.agenerate(*args, **options)).tokens

    async def piece_by_piece(key):
        args, options = call(engine, *key, drafts="auto")
        return key, [token async for chunk in engine.astream(*args, **options) for token in chunk.tokens]

    async def left_early(key):
        args, options = call(engine, *key, drafts=1)
        stream = engine.astream(*args, **options)
        async for _ in stream:
            break
        await stream.aclose()
        return key, texts[key]

    async def in_a_thread(key):
        args, options = call(engine, *key, drafts=0)
        return key, (await asyncio.to_thread(engine.generate, *args, **options)).tokens

    async def everybody():
        ways = (whole, piece_by_piece, left_early, in_a_thread)
        return await asyncio.gather(*(way(key) for key in keys for way in ways))

    with within(300):
        made = asyncio.run(everybody())
    assert [key for key, tokens in made if tokens != texts[key]] == []


def test_a_task_that_is_cancelled_ends_its_request(pair, texts):
    engine = engine_of(pair)
    ids = prompt_of(engine, 0, 65)

    async def both():
        long = asyncio.create_task(engine.agenerate(ids, replace(FREE, max_tokens=4000)))
        args, options = call(engine, PROMPTS[0], "greedy", drafts=4)
        short = await engine.agenerate(*args, **options)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return short.tokens

    with within(300):
        assert asyncio.run(both()) == texts[PROMPTS[0], "greedy"]
        args, options = call(engine, PROMPTS[1], "greedy", drafts=4)
        assert engine.generate(*args, **options).tokens == texts[PROMPTS[1], "greedy"]


def test_who_never_reads_stops_nobody_but_himself(pair, texts):
    """A text beyond what an outbox holds: others come and go, and nothing of it is lost when it is read at last."""
    count = 2 * LIMIT_OF_CHUNKS
    engine, params = engine_of(pair), replace(FREE, max_tokens=count)
    ids = prompt_of(engine, 1, 65)
    with within(600):
        silent = engine.stream(ids, params, num_draft_tokens=0)
        for prompt in PROMPTS:
            args, options = call(engine, prompt, "greedy", drafts=4)
            assert engine.generate(*args, **options).tokens == texts[prompt, "greedy"]
        tokens = [token for chunk in silent for token in chunk.tokens]
        assert tokens == engine.generate(ids, params, num_draft_tokens=0).tokens
    assert len(tokens) == count


def test_more_than_there_are_rows(pair, texts):
    """A list of twenty prompts, in an order that is kept, beside another thread's list."""
    engine, keys, made = engine_of(pair), [(PROMPTS[i % 9], NAMES[i % 5]) for i in range(20)], {}

    def work(name: str) -> None:
        params = [replace(SETTINGS[name][0], max_tokens=LIMIT) for _, name in keys]
        made[name] = engine.generate([prompt_of(engine, *prompt) for prompt, _ in keys], params)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    with within(300):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for results in made.values():
        assert [result.tokens for result in results] == [texts[key] for key in keys]


def test_a_timeout_keeps_the_text_so_far():
    engine = engine_of("bundled")
    with within(300):
        result = engine.generate(prompt_of(engine, 0, 65), replace(FREE, max_tokens=8000), timeout=0.5)
    assert result.finish_reason == "timeout" and result.error is None
    whole = alone("bundled", Asked(prompt=(0, 65))).tokens
    assert result.tokens[: len(whole)] == whole[: len(result.tokens)]


def test_an_engine_that_is_closed_ends_its_streams():
    """With streams open: each ends with what it has, and every later call is told in a line."""
    engine = load(num_draft_tokens=0)
    with within(300):
        streams = [engine.stream(prompt_of(engine, i, 40), replace(FREE, max_tokens=5000)) for i in range(3)]
        chunks = [[next(stream)] for stream in streams]
        engine.close()
        for some, stream in zip(chunks, streams, strict=True):
            some += stream
            assert some[-1].result.finish_reason == "cancelled"
            assert some[-1].result.tokens == [token for chunk in some for token in chunk.tokens]
        engine.close()
    for late in (lambda: engine.generate("x"), lambda: engine.stream("x"), lambda: asyncio.run(engine.agenerate("x"))):
        with pytest.raises(UserError, match="closed") as raised:
            late()
        assert "\n" not in str(raised.value)


def test_a_full_queue_is_refused_in_a_line():
    with within(300), load(num_draft_tokens=0, max_rows=1, max_waiting=2) as engine:
        ids, params = prompt_of(engine, 0, 5), replace(FREE, max_tokens=3000)
        streams = [engine.stream(ids, params)]
        next(streams[0])  # it has the row
        streams += [engine.stream(ids, params) for _ in range(2)]
        with pytest.raises(UserError, match="2") as raised:
            engine.generate(ids, params)
        assert "\n" not in str(raised.value)
        for stream in streams:
            stream.close()
        assert engine.generate(ids, replace(params, max_tokens=3)).finish_reason == "length"


def test_what_can_never_fit_is_refused_with_the_numbers():
    models = engine_of("bundled").target, engine_of("bundled").drafter
    limit = sum(map(model_bytes, models)) + (16 << 20)  # beside the weights: a row of 8,000 tokens takes twice that
    with within(300), load(num_draft_tokens=0, memory_limit=limit) as engine:
        with pytest.raises(UserError) as raised:
            engine.generate(prompt_of(engine, 0, 8000), replace(FREE, max_tokens=100))
        assert "\n" not in str(raised.value) and "8000" in str(raised.value) and "MB" in str(raised.value)
        assert engine.generate(prompt_of(engine, 0, 5), replace(FREE, max_tokens=3)).finish_reason == "length"


def in_a_program(code: str, **options) -> subprocess.Popen:
    opening = "from mlx_gemma_mtp import load, SamplingParams\nengine = load(num_draft_tokens=0)\n"
    return subprocess.Popen([sys.executable, "-c", opening + code], stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    "code",
    [
        "print(len(engine.generate('x', SamplingParams(max_tokens=3)).tokens))",
        "stream = engine.stream('x', SamplingParams(max_tokens=5000)); next(stream); print(3)",
        "import asyncio; print(len(asyncio.run(engine.agenerate('x', SamplingParams(max_tokens=3))).tokens))",
    ],
    ids=["a call", "an open stream", "a task"],
)
def test_a_program_that_never_closes_exits(code):
    program = in_a_program(code)
    try:
        said, _ = program.communicate(timeout=120)
    finally:
        program.kill()
    assert program.returncode == 0 and said.strip() in ("1", "2", "3")


def counted_memory(engine, requests: int, every: int) -> list[int]:
    """Bytes of MLX's arrays, but for prefixes, after every so many requests of mixed settings, eight at a time."""
    sizes, r = [], random.Random(0)
    for _ in range(requests // every):
        prompts = [prompt_of(engine, r.randrange(3), r.choice((1, 5, 30, 65, 129, 200))) for _ in range(every)]
        params = [replace(SETTINGS[r.choice(NAMES)][0], max_tokens=r.randint(1, 10)) for _ in range(every)]
        for result in engine.generate(prompts, params):
            assert result.error is None
        del result
        gc.collect()
        sizes.append(mx.get_active_memory() - engine.prefixes.bytes)
    return sizes


def test_requests_leave_nothing_behind():
    with within(600):
        sizes = counted_memory(engine_of("bundled"), 160, 40)
    assert sizes[-1] <= sizes[1] + (1 << 20), sizes


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind():
    with within(3000):
        sizes = counted_memory(engine_of("bundled"), 2000, 50)
    assert max(sizes[4:]) <= sizes[3] + (1 << 20), sizes


def test_threads_are_given_back():
    """Engine after engine: the threads of the first ones serve the next."""
    counts = []
    with within(600):
        for _ in range(3):
            with load(num_draft_tokens=0) as engine:
                stream = engine.stream("x", replace(FREE, max_tokens=50))
                assert len(list(islice(stream, 3))) == 3
            counts.append(threading.active_count())
    assert counts[0] == counts[-1], counts
