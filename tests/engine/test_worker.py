"""The worker: rounds between messages, deliveries to many readers, what fails, what ends. Its runner is scripted."""

import asyncio
import gc
import os
import threading
import time
import weakref

import pytest
from scripted import Busy, Scripted, request, requests

from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.engine import threads
from mlx_gemma_mtp.engine.outbox import LIMIT
from mlx_gemma_mtp.engine.streams import AsyncStream, Stream
from mlx_gemma_mtp.engine.worker import Worker


class Driven:
    """A worker and its scripted runner."""

    def __init__(self, kind=Scripted, **options):
        self.worker = Worker()
        self.worker.drive(lambda: self._made(kind(**options)))

    def _made(self, runner):
        self.runner = runner
        return runner

    def stream(self, *asked, cancel=None, progress=None, whole=False) -> Stream:
        return Stream(self.worker, asked, cancel, progress, self, whole)

    def astream(self, *asked, cancel=None, progress=None, whole=False) -> AsyncStream:
        async def begin():
            return asked

        return AsyncStream(self.worker, begin, cancel, progress, self, whole)

    def settled(self):
        """Returns the runner, once the worker has taken in all that came before."""
        self.worker.call(lambda: None)
        return self.runner


@pytest.fixture
def driven():
    made = []

    def make(kind=Scripted, **options) -> Driven:
        made.append(Driven(kind, **options))
        return made[-1]

    yield make
    for each in made:
        each.worker.close()


def tokens(stream) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for chunk in stream:
        found.setdefault(chunk.index, []).extend(chunk.tokens)
    return [found[index] for index in sorted(found)]


def reasons(stream) -> list[str]:
    return [chunk.result.finish_reason for chunk in stream if chunk.result is not None]


def test_streams_get_their_own_chunks_in_order(driven):
    found = tokens(driven().stream(*requests(3, 5, 1)))
    assert found == [[0, 1, 2], [0, 1, 2, 3, 4], [0]]


def test_a_whole_call_gets_results_alone(driven):
    chunks = list(driven().stream(*requests(3, 5), whole=True))
    assert [(chunk.index, chunk.result.tokens) for chunk in chunks] == [(0, [0, 1, 2]), (1, [0, 1, 2, 3, 4])]


def test_many_threads_interleave(driven):
    """Eight threads, each with streams of its own that it reads in turn."""
    shared, texts = driven(), {}

    def read(number: int) -> None:
        streams = [shared.stream(request(20 + number)) for _ in range(4)]
        found = [[] for _ in streams]
        while any(streams):
            for place, stream in enumerate(streams):
                chunk = stream and next(stream, None)
                found[place] += chunk.tokens if chunk else []
                streams[place] = stream if chunk else None
        texts[number] = found

    everyone = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in everyone:
        thread.start()
    for thread in everyone:
        thread.join(60)
    assert texts == {number: [list(range(20 + number))] * 4 for number in range(8)}


def test_one_stream_that_two_threads_read(driven):
    """Each chunk goes to one of them, and both see the end."""
    stream, found = driven().stream(request(500)), [[], []]
    readers = [threading.Thread(target=lambda place=place: found[place].extend(stream)) for place in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert sorted(t for part in found for chunk in part for t in chunk.tokens) == list(range(500))


def test_idle_workers_do_nothing(driven):
    """No round is computed where there is nothing to do, and none is before its time."""
    idle = driven()
    list(idle.stream(request(3)))
    before = idle.runner.rounds
    time.sleep(0.05)
    assert idle.settled().rounds == before == 3


def test_a_deadline_is_kept_while_nothing_else_goes_on(driven):
    """A request that rests, since nobody reads it, ends in time nevertheless."""
    late = driven()
    asked = request(10**6, deadline=time.monotonic() + 0.2)
    stream = late.stream(asked)
    while not late.settled().paused:
        pass
    rounds = late.runner.rounds
    while late.settled().live:
        time.sleep(0.01)
    assert late.runner.rounds == rounds + 1 and reasons(stream) == ["timeout"]


def test_a_slow_reader_delays_nobody_and_loses_nothing(driven):
    shared = driven()
    slow = shared.stream(request(3 * LIMIT))
    next(slow)
    assert len(tokens(shared.stream(request(2 * LIMIT)))[0]) == 2 * LIMIT
    assert shared.settled().paused and not shared.runner.busy
    assert [t for chunk in slow for t in chunk.tokens] == list(range(1, 3 * LIMIT))


def test_calls_run_in_the_worker_between_rounds(driven):
    shared = driven(Busy)
    assert shared.worker.call(threading.get_ident) == shared.runner.thread != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        shared.worker.call(lambda: 1 / 0)
    assert tokens(shared.stream(request(2))) == [[0, 1]]


def test_listeners_are_called_in_the_callers_thread_and_in_order():
    worker, told = Worker(), []

    def work(first, second):
        for place in range(3):
            first(place)
            second(place, "x")
        return "done"

    listeners = (lambda *what: told.append((threading.get_ident(), what)),) * 2
    assert worker.call(work, *listeners) == "done"
    me = threading.get_ident()
    assert told == [(me, what) for place in range(3) for what in ((place,), (place, "x"))]
    worker.close()


def test_a_call_ends_when_its_caller_has_left():
    """A listener that raises; its function does not go on for nobody."""
    worker, reached, left = Worker(), [], threading.Event()

    def work(tell):
        tell()
        left.wait(30)
        reached.append("before")
        tell()
        reached.append("after")

    def listener():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.call(work, listener)
    left.set()
    assert worker.call(lambda: list(reached)) == ["before"]
    worker.close()


class Panic(BaseException):
    """As what Rust libraries raise: no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_a_round_that_raises_ends_its_requests_alone(driven, kind):
    def work():
        if shared.runner.rounds == 3:
            raise kind("no more")

    shared = driven(work=work)
    (chunk,) = (each for each in shared.stream(request(9)) if each.result)
    assert (chunk.result.finish_reason, chunk.result.error, chunk.result.tokens) == ("error", "no more", [0, 1])
    assert tokens(shared.stream(request(2))) == [[0, 1]]


@pytest.mark.parametrize("where", ["round", "fail", "busy"])
def test_a_worker_that_fails_tells_everybody(driven, where):
    """Who waits, and who comes later: at once, and with the reason."""

    class Broken(Scripted):
        def round(self, deliver):
            if self.rounds == 2:
                raise SystemExit("enough") if where == "round" else ValueError("enough")
            super().round(deliver)

        def fail(self, error):
            raise TypeError("more than enough")

        @property
        def busy(self):
            if where == "busy" and self.rounds == 2:
                raise ValueError("enough")
            return super().busy

    broken = driven(Broken)
    for whole in (False, True):
        with pytest.raises(RuntimeError, match=r"worker failed: .*load it again"):
            list(broken.stream(request(9), whole=whole))
    for call in (lambda: broken.worker.call(len), broken.worker.check, lambda: broken.stream(request())):
        with pytest.raises(RuntimeError, match="worker failed") as raised:
            call()
        assert "\n" not in str(raised.value)
    broken.worker.close()


def test_a_call_whose_worker_stops_is_told(driven):
    """The one that runs when it next tells something, and the one that waits behind it."""
    shared, told, begun = driven(), [], threading.Event()

    def function(tell):
        begun.set()
        while True:
            tell()
            time.sleep(0.001)

    def call(*what):
        try:
            shared.worker.call(*what)
        except UserError as error:
            told.append(str(error))

    calls = (function, lambda: None), (lambda tell: time.sleep(9), lambda: None)
    everyone = [threading.Thread(target=call, args=what) for what in calls]
    everyone[0].start()
    begun.wait(30)
    everyone[1].start()
    shared.worker.close()
    for thread in everyone:
        thread.join(30)
    assert told == ["the engine is closed; load it again"] * 2


def test_a_request_that_is_refused_takes_its_call_along(driven):
    """The second of two: the reader gets the reason, and the first ends."""
    shared = driven(refuse=UserError("too many wait"))
    with pytest.raises(UserError, match="too many wait"):
        list(shared.stream(*requests(10**6, 3), whole=True))
    while shared.settled().live:
        pass
    assert tokens(shared.stream(request(2))) == [[0, 1]]


def test_closing_a_stream_ends_it_within_a_round(driven):
    shared = driven()
    stream = shared.stream(request(10**6))
    next(stream)
    stream.close()
    stream.close()
    before = shared.settled().rounds
    while shared.settled().live:
        pass
    assert shared.runner.rounds <= before + 2 and next(stream, None) is None


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_is_forgotten_ends(driven, begun):
    shared = driven()
    stream = shared.stream(request(10**6))
    if begun:
        next(stream)
    del stream
    gc.collect()
    while shared.settled().live:
        pass


def test_a_reader_that_waits_hears_of_the_close(driven):
    """Another thread closes the stream whose next chunk is waited for."""
    gate = threading.Event()
    shared = driven(wait=gate)
    stream, found = shared.stream(request(10**6)), []
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    time.sleep(0.02)
    stream.close()
    gate.set()
    reader.join(30)
    assert not reader.is_alive()


def test_what_is_done_is_not_cancelled(driven):
    shared = driven()
    stream = shared.stream(request(2))
    list(stream)
    stream.close()
    del stream
    assert not [what for what in shared.settled().log if what[0] == "cancel"]


@pytest.mark.parametrize("whole", [False, True])
def test_an_event_ends_a_call_whoever_reads(driven, whole):
    shared, cancel = driven(), threading.Event()
    threading.Timer(0.05, cancel.set).start()
    assert reasons(shared.stream(*requests(10**6, 10**6), cancel=cancel, whole=whole)) == ["cancelled"] * 2
    assert reasons(shared.stream(request(10**6), cancel=cancel)) == ["cancelled"]
    assert shared.settled().log[-2][0] == "submit" and not shared.worker._cancels


@pytest.mark.parametrize("kind", [OSError, SystemExit, Panic])
def test_an_event_that_raises_ends_its_call_alone(driven, kind):
    class Wrong:
        def is_set(self):
            raise kind("no such event")

    shared = driven()
    with pytest.raises(kind, match="no such event"):
        list(shared.stream(request(10**6), cancel=Wrong()))
    while shared.settled().live:
        pass
    assert tokens(shared.stream(request(2))) == [[0, 1]]


def test_progress_is_told_in_the_readers_thread(driven):
    """Of all prompts together; a prompt that is prefilled once more, after a preemption, counts once."""
    shared, told = driven(), []
    asked = request(2, 0, prompt=5), request(2, 1, prompt=7)
    stream = shared.stream(*asked, progress=lambda *how: told.append((threading.get_ident(), how)))
    list(stream)
    assert told == [(threading.get_ident(), (5, 12)), (threading.get_ident(), (12, 12))]


@pytest.mark.parametrize("whole", [False, True])
def test_a_listener_that_raises_ends_its_call_alone(driven, whole):
    shared, other = driven(), []

    def listener(done, total):
        raise KeyError("mine")

    stays = shared.stream(request(2000))
    with pytest.raises(KeyError, match="mine"):
        list(shared.stream(request(10**6), progress=listener, whole=whole))
    other = tokens(stays)
    assert other == [list(range(2000))]
    while shared.settled().live:
        pass


def test_a_listener_may_call_the_engine_the_worker_may_not(driven):
    """The reader's functions are in its own thread; what the worker calls would wait for itself."""
    shared, found = driven(), []
    list(shared.stream(request(1), progress=lambda *_: found.append(tokens(shared.stream(request(2))))))
    assert found == [[[0, 1]]]
    for call in (
        lambda: shared.worker.call(len),
        lambda: list(shared.stream(request())),
        shared.worker.check,
        shared.worker.close,
    ):
        with pytest.raises(UserError, match="from within its own work") as raised:
            shared.worker.call(call)
        assert "\n" not in str(raised.value)


def test_closing_ends_everything(driven):
    """Open streams end with what they have, calls that wait return, later ones are told, closing again is nothing."""
    shared = driven()
    streams = [shared.stream(request(10**6)) for _ in range(3)]
    found = []
    waiting = threading.Thread(target=lambda: found.extend(reasons(shared.stream(request(10**9), whole=True))))
    waiting.start()
    for stream in streams:
        next(stream)
    while len(shared.settled().live) < 4:
        pass
    for _ in range(2):
        shared.worker.close()
    waiting.join(30)
    assert found == ["cancelled"] and [reasons(stream) for stream in streams] == [["cancelled"]] * 3
    assert shared.runner.closed
    for call in (lambda: shared.worker.call(len), lambda: shared.stream(request()), shared.worker.check):
        with pytest.raises(UserError, match="is closed") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_calls_that_meet_the_close_are_told():
    """Many threads call while the worker ends: each gets an answer."""
    for _ in range(20):
        shared, answers = Driven(), []

        def call(shared=shared, answers=answers):
            try:
                answers.append(reasons(shared.stream(request(50), whole=True)))
            except UserError as error:
                answers.append(str(error))

        callers = [threading.Thread(target=call) for _ in range(6)]
        for caller in callers:
            caller.start()
        shared.worker.close()
        for caller in callers:
            caller.join(30)
        assert len(answers) == 6
        assert all("closed" in each or each in (["cancelled"], ["length"]) for each in answers), answers


def test_threads_are_used_again():
    """By the next worker, once the last one is closed or stopped; the parked one keeps nothing alive."""
    Worker().close()
    before = threads._pool.threads
    for _ in range(5):
        shared = Driven()
        list(shared.stream(request(2)))
        runner = weakref.ref(shared.runner)
        shared.worker.close()
        del shared
        while threads._pool.idle.empty():
            time.sleep(0.001)
        gc.collect()
        assert runner() is None
    assert threads._pool.threads == before


def test_a_cancelled_task_cancels_its_requests(driven):
    shared = driven()

    async def main():
        reading = asyncio.ensure_future(_all(shared.astream(request(10**9), whole=True)))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(main())
    while shared.settled().live:
        pass


async def _all(stream) -> list:
    return [chunk async for chunk in stream]


def test_coroutines_read_many_streams(driven):
    """Interleaved, some whole, each complete and in order."""
    shared = driven()

    async def main():
        return await asyncio.gather(*[_all(shared.astream(request(30 + n), whole=n % 3 == 0)) for n in range(40)])

    for n, chunks in enumerate(asyncio.run(main())):
        assert chunks[-1].result.tokens == list(range(30 + n))
        assert n % 3 == 0 or [t for chunk in chunks for t in chunk.tokens] == list(range(30 + n))


def test_leaving_an_async_for_ends_the_call(driven):
    """By aclose, and by forgetting."""
    shared = driven()

    async def main(close: bool):
        stream = shared.astream(request(10**9))
        async for _ in stream:
            break
        if close:
            await stream.aclose()
            assert await _all(stream) == []
        del stream
        gc.collect()
        while shared.settled().live:
            await asyncio.sleep(0.001)

    asyncio.run(main(True))
    asyncio.run(main(False))


def test_a_stream_that_is_closed_while_it_begins(driven):
    """Its prompt is being encoded: nothing is computed for it afterwards."""
    shared = driven()

    async def main():
        encoded = asyncio.Event()

        async def begin():
            await encoded.wait()
            return [request(10**9)]

        stream = AsyncStream(shared.worker, begin, None, None, shared)
        reader = asyncio.ensure_future(anext(stream, None))
        await asyncio.sleep(0)
        await stream.aclose()
        encoded.set()
        assert await reader is None and await _all(stream) == []
        assert not shared.settled().log

    asyncio.run(main())


def test_a_slow_coroutine_is_paused_and_loses_nothing(driven):
    shared = driven()

    async def main():
        stream = shared.astream(request(3 * LIMIT))
        first = await anext(stream)
        while not shared.settled().paused:
            await asyncio.sleep(0.001)
        return [first, *await _all(stream)]

    assert [t for chunk in asyncio.run(main()) for t in chunk.tokens] == list(range(3 * LIMIT))


def test_a_stream_that_is_read_in_another_event_loop_is_told(driven):
    """Nobody would wake its reader: it gets what is there, and a line."""
    shared, made = driven(), []

    async def begin():
        made.append(shared.astream(request(10**9)))
        return await anext(made[0])

    assert asyncio.run(begin()).tokens == [0]
    while shared.settled().live:
        assert tokens(shared.stream(request(2))) == [[0, 1]]
    with pytest.raises(UserError, match="another event loop"):
        asyncio.run(_all(made[0]))
    assert asyncio.run(_all(made[0])) == []


def test_two_tasks_that_read_one_stream_are_told(driven):
    shared = driven(wait=threading.Event())

    async def main():
        stream = shared.astream(request(3))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        shared.runner.wait.set()
        return await first

    assert asyncio.run(main()).tokens == [0]


@pytest.mark.parametrize("paused", [False, True])
def test_an_event_loop_that_is_closed_amid_a_stream(driven, paused):
    """Its requests end, those too that rest since nobody reads them: with the next round. Others go on."""
    shared, gate = driven(), threading.Event()

    async def read():
        async for _ in shared.astream(request(10**9)):
            gate.set()

    loop = asyncio.new_event_loop()
    task = loop.create_task(read())
    loop.call_later(0.05, loop.stop)
    loop.run_forever()
    while paused and not shared.settled().paused:
        pass
    loop.close()
    assert gate.is_set()
    while shared.settled().live:
        assert tokens(shared.stream(request(2))) == [[0, 1]]
    assert not shared.worker._resting and not shared.worker._outboxes
    task.get_coro().close()


def test_a_refusal_reaches_a_coroutine(driven):
    shared = driven(refuse=UserError("too many wait"))

    async def main():
        with pytest.raises(UserError, match="too many wait"):
            await _all(shared.astream(*requests(10**6, 3), whole=True))

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_and_ends(driven):
    """Calls, open streams, closing, and the end of the child, which waits for no thread."""
    shared = driven()
    stream = shared.stream(request(10**6))
    next(stream)
    child = os.fork()
    if not child:
        said = 0
        for call in (lambda: shared.worker.call(len), lambda: next(stream), lambda: shared.stream(request())):
            try:
                call()
            except UserError as error:
                said += "'spawn'" in str(error)
        shared.worker.close()
        threads._end()
        os._exit(0 if said == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    next(stream)
