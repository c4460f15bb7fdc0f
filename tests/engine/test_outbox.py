"""Outboxes: everything arrives in order, whole calls wake their reader once, who falls behind is paused and goes on."""

import asyncio
import threading

import pytest
from scripted import request, requests

from mlx_gemma_mtp.engine.outbox import LIMIT, AsyncOutbox, Outbox, ReaderGone
from mlx_gemma_mtp.engine.request import Advance, Chunk, Delivery, Request, Result
from mlx_gemma_mtp.engine.stats import Stats


def chunk(asked: Request, token: int = 0) -> Delivery:
    return Delivery(asked.id, Chunk(asked.index, "x", [token]))


def last(asked: Request) -> Delivery:
    return Delivery(asked.id, Chunk(asked.index, "", [], Result("", [], "stop", Stats(1))))


def test_a_reader_gets_everything_in_order():
    asked = requests(3, 3)
    outbox = Outbox(asked)
    outbox.put([chunk(asked[0], 1), chunk(asked[1], 2)])
    outbox.put([chunk(asked[1], 3), last(asked[0])])
    found = outbox.get() + outbox.get()
    assert [(each.id, each.chunk.tokens) for each in found] == [
        (asked[0].id, [1]),
        (asked[1].id, [2]),
        (asked[1].id, [3]),
        (asked[0].id, []),
    ]
    assert not outbox.complete
    outbox.put([last(asked[1])])
    assert outbox.complete


def test_a_whole_call_is_handed_over_at_once():
    """The reader is woken when the last result is there, and gets results alone."""
    asked, woken = requests(3, 3), []
    outbox = Outbox(asked, whole=True)
    outbox._ring = lambda: woken.append(True)
    for item in (chunk(asked[0]), last(asked[1]), Advance(asked[0].id, 1, 2), chunk(asked[0])):
        assert outbox.put([item]) == [] and not woken
    assert outbox.put([last(asked[0])]) == [] and woken == [True]
    assert [each.id for each in outbox.get()] == [asked[1].id, asked[0].id]


def test_who_wants_to_hear_of_the_prefill_is_told():
    asked = request()
    for told, whole in ((True, True), (True, False), (False, True), (False, False)):
        outbox = Outbox([asked], whole, told)
        outbox.put([Advance(asked.id, 1, 2)])
        outbox.put([last(asked)])
        assert [type(each) for each in outbox.get()] == [Advance if told else Delivery]


def test_who_falls_behind_is_paused_and_goes_on_at_half():
    slow, other = requests(9999, 9999)
    outbox = Outbox([slow, other])
    for _ in range(LIMIT - 1):
        assert outbox.put([chunk(slow)]) == []
    assert outbox.put([chunk(slow), chunk(other)]) == [slow.id] and outbox.paused == {slow.id}
    assert outbox.put([chunk(slow)]) == []  # what was under way; it is paused already
    asks = [outbox.taken(slow.id) for _ in range(LIMIT)]
    assert asks.index(True) == LIMIT // 2 and asks.count(True) == 1
    assert not outbox.taken(other.id)


def test_a_request_that_is_done_is_not_paused():
    asked = request()
    outbox = Outbox([asked])
    assert outbox.put([chunk(asked)] * LIMIT + [last(asked)]) == []


def test_whole_calls_are_never_paused():
    asked = request()
    outbox = Outbox([asked], whole=True)
    assert all(outbox.put([chunk(asked)]) == [] for _ in range(2 * LIMIT))


def test_a_reader_that_reads_while_it_is_paused_is_never_forgotten():
    """The worker and the reader race for each round: in the end everything was read, and nobody waits."""
    rounds, asked = 40 * LIMIT, request(10**9)
    outbox, go_on = Outbox([asked]), threading.Event()
    go_on.set()
    paused = []

    def worker():
        for place in range(rounds):
            go_on.wait(30)
            if outbox.put([chunk(asked, place)]):
                go_on.clear()
                paused.append(place)
                if asked.id not in outbox.paused:  # resumed meanwhile
                    go_on.set()

    thread = threading.Thread(target=worker)
    thread.start()
    tokens = []
    while len(tokens) < rounds:
        for each in outbox.get():
            tokens += each.chunk.tokens
            if outbox.taken(asked.id):
                outbox.paused.discard(asked.id)
                go_on.set()
    thread.join(30)
    assert tokens == list(range(rounds)) and not thread.is_alive()


@pytest.mark.parametrize("wait", [False, True])
def test_a_failure_reaches_the_reader(wait):
    outbox = Outbox([request()])
    if wait:
        threading.Timer(0.05, outbox.fail, [KeyError("x")]).start()
    else:
        outbox.fail(KeyError("x"))
    with pytest.raises(KeyError):
        outbox.get()
    assert outbox.complete


def test_a_coroutine_reads_what_another_thread_delivers():
    """Every item, in order, however the two threads interleave."""

    async def read(rounds: int) -> list[int]:
        asked = request(10**9)
        outbox = AsyncOutbox([asked])
        thread = threading.Thread(target=lambda: [outbox.put([chunk(asked, place)]) for place in range(rounds)])
        thread.start()
        tokens = []
        while len(tokens) < rounds:
            tokens += [each.chunk.tokens[0] for each in await asyncio.wait_for(outbox.aget(), 30)]
        thread.join()
        return tokens

    for rounds in (1, 2, 5000):
        assert asyncio.run(read(rounds)) == list(range(rounds))


def test_a_sleeping_coroutine_is_woken_once():
    """Not once for each chunk that comes while its event loop is busy."""
    calls = []

    async def read() -> int:
        asked = request(10**9)
        outbox, loop = AsyncOutbox([asked]), asyncio.get_running_loop()
        reading = asyncio.ensure_future(outbox.aget())
        await asyncio.sleep(0)
        soon = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: calls.append(args) or soon(*args)
        for _ in range(5):
            outbox.put([chunk(asked)])
        await reading
        return len([await outbox.aget() for _ in range(4)])

    assert asyncio.run(read()) == 4 and len(calls) == 1


def test_a_closed_event_loop_is_noticed():
    asked = request(10**9)

    async def leave() -> AsyncOutbox:
        return AsyncOutbox([asked])

    loop = asyncio.new_event_loop()
    outbox = loop.run_until_complete(leave())
    outbox.put([chunk(asked)])
    loop.close()
    with pytest.raises(ReaderGone):
        outbox.put([chunk(asked)])
