"""Prompts that go on from what others computed: their texts are those of a cold run, and little of them is computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
from schedules import (
    CHUNK,
    LONGEST,
    PAIRS,
    Asked,
    Clock,
    Drive,
    Failing,
    Outcome,
    Schedule,
    alone,
    check,
    engine_of,
    ids_of,
    request_of,
    runner_of,
)

from mlx_gemma_mtp.engine.demand import Demand
from mlx_gemma_mtp.engine.keeping import LONG, share
from mlx_gemma_mtp.engine.plan import Piece
from mlx_gemma_mtp.engine.prefix import Kind
from mlx_gemma_mtp.engine.runner import Runner
from mlx_gemma_mtp.machine.pressure import CRITICAL, NORMAL, WARNING
from mlx_gemma_mtp.speculative.budget import Budget

GRID = CHUNK // 4
PLENTY = 1 << 30


class Driven:
    """Schedules on one runner, one after the other; every text is compared with its cold one.

    computed: prompt tokens that were prefilled, by request.
    """

    def __init__(self, pair: str = "bundled", **options):
        options.setdefault("prefixes", PLENTY)
        self.pair, self.clock, self.options = pair, Clock(), options
        self.runner = runner_of(engine_of(pair), self.clock, Schedule((), **options))
        self.computed: dict[int, int] = {}

    @property
    def prefixes(self):
        return self.runner.keeping.prefixes

    def run(self, *requests: Asked) -> list[Outcome]:
        pieces: list[Piece] = []
        usual = Runner._prefill

        def prefill(runner, some):
            pieces.extend(some)
            return usual(runner, some)

        drive = Drive(engine_of(self.pair), Schedule(requests, **self.options), self.runner, self.clock)
        with mock.patch.object(Runner, "_prefill", prefill):
            outcomes = drive.run()
        self.clock.now += 1000
        for each in outcomes:
            check(self.pair, each)
            fed = sum(piece.stop - piece.start for piece in pieces if piece.id == each.request.id)
            self.computed[each.request.id] = fed
            stats = each.result.stats
            assert fed + stats.cached_tokens >= stats.prompt_tokens  # more where memory was short
            assert 0 <= stats.kept_tokens <= grid(stats.prompt_tokens - 1) - grid(stats.cached_tokens)
        return outcomes


def cached(outcomes: list[Outcome]) -> list[int]:
    return [each.result.stats.cached_tokens for each in outcomes]


def kept(outcomes: list[Outcome]) -> list[int]:
    return [each.result.stats.kept_tokens for each in outcomes]


def grid(tokens: int) -> int:
    return tokens // GRID * GRID


SAMPLE = [("bundled", "greedy"), ("bundled", "penalised"), ("e2b", "sampled")]  # the others are slow
OTHERS = [("bundled", "sampled"), ("e2b", "greedy"), ("e2b", "penalised")]


@pytest.mark.parametrize(
    ("pair", "settings"), [*SAMPLE, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_hits_of_every_kind(pair, settings):
    """The same prompt again, its next turns, another end: within a window, past it, and past the wrapped ring."""
    for length in (70, 129, 420):
        driven, asked = Driven(pair), Asked(prompt=(0, length), settings=settings, drafts=4)
        ids = ids_of(engine_of(pair), asked)
        first, again = driven.run(asked), driven.run(asked)
        assert cached(first) == [0] and cached(again) == [grid(length - 1)]  # the end of the prompt
        assert kept(first) == [grid(length - 1)] and kept(again) == [0]
        (turn,) = driven.run(replace(asked, turns=1))
        assert grid(length - 1) + GRID < turn.result.stats.cached_tokens <= length + LONGEST  # and of the reply
        assert turn.result.stats.cached_tokens >= length + LONGEST - 1 or settings == "penalised"
        (turn,) = driven.run(replace(asked, turns=2))
        assert turn.result.stats.cached_tokens >= length + LONGEST
        (other,) = driven.run(replace(asked, tail=40))
        assert other.result.stats.cached_tokens == grid(length - 1) and len(ids) == length


@pytest.mark.parametrize(("limit", "found"), [(8, 97 + 7), (4, 97 + 3), (3, 96)])
def test_a_short_reply_is_kept_where_it_spares_a_quarter_of_a_step(limit, found):
    """An agent's call of a tool is short. Its last token has no K/V."""
    driven, asked = Driven(), Asked(prompt=(0, 97), limit=limit)
    driven.run(asked)
    assert cached(driven.run(replace(asked, limit=LONGEST, turns=1))) == [found]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("length", [97, 420])
def test_a_reply_that_comes_back_in_another_spelling_is_gone_on_from(pair, length):
    """A text is cut into other tokens than the model said it in: at its end, where a limit cut it off, most of all."""
    driven, asked = Driven(pair), Asked(prompt=(0, length), drafts=3)
    driven.run(asked)
    for spelt in (2, 5):
        found = cached(driven.run(replace(asked, turns=1, spelt=spelt)))
        assert found == [length + LONGEST - spelt]
    assert cached(driven.run(replace(asked, turns=1, spelt=LONGEST))) == [grid(length)]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_system_message_is_shared(pair):
    """Turns are found in the ids. Whoever comes later with another question goes on from where the message ends."""
    engine = engine_of(pair)
    system = {"role": "system", "content": "You are terse. " * 30}
    prompts = [engine.text.encode([system, {"role": "user", "content": each * 12}]) for each in ("Why? ", "Who? ")]
    border = engine.text.borders(prompts[0])[1]
    assert border > 2 * CHUNK and len(prompts[0]) > border + CHUNK // 2
    with mock.patch("schedules.ids_of", lambda engine, asked: prompts[asked.prompt[0]]):
        driven = Driven(pair)
        drive = lambda which: Drive(engine, Schedule((Asked(prompt=(which, 1)),)), driven.runner, driven.clock).run()  # noqa: E731
        first, second = drive(0)[0].result, drive(1)[0].result
    assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, grid(border))
    (lasting,) = [each for each in driven.prefixes._entries if each.kind is Kind.BORDER]
    assert lasting.least <= grid(border) <= len(lasting.tokens), "a turn that goes on does not let it go"
    with mock.patch("schedules.ids_of", lambda engine, asked: prompts[asked.prompt[0]]):
        cold = Driven(pair, prefixes=0)
        lone = [
            Drive(engine, Schedule((Asked(prompt=(which, 1)),)), cold.runner, cold.clock).run()[0] for which in (0, 1)
        ]
    assert [each.result.tokens for each in lone] == [first.tokens, second.tokens]
    assert cached(lone) == [0, 0]


@pytest.mark.parametrize("pair", PAIRS)
def test_one_copy_serves_the_system_message_and_the_prompt(pair):
    """Both lie in one piece: the copy reaches back to the first of them."""
    driven = Driven(pair)
    with mock.patch.object(type(driven.runner.keeping), "_borders", lambda self, held: (192, 208, 240)):
        driven.run(Asked(prompt=(0, 250)))
    (entry,) = [each for each in driven.prefixes._entries if each.kind is Kind.BORDER and len(each.tokens) == 240]
    assert entry.least == 208 and entry.saved.bytes == driven.runner.scheduler.memory.saved(240, 32)
    assert driven.prefixes.bytes == sum(each.saved.bytes for each in driven.prefixes._entries)
    outcomes = driven.run(Asked(prompt=(0, 215), tail=20))
    assert cached(outcomes) == [208]


def test_prompts_that_part_anywhere_are_found_the_third_time():
    """There is no border where they part. The second one sees that, and keeps it for all that follow."""
    driven = Driven()
    found = [cached(driven.run(Asked(prompt=(0, 200), tail=tail)))[0] for tail in (100, 0)]
    assert found == [0, grid(199)] or found == [0, 0]
    driven = Driven()
    ids = [ids_of(engine_of("bundled"), Asked(prompt=(0, 200))) + [which] * 90 for which in (300, 301, 302)]
    assert len({tuple(each[:200]) for each in ids}) == 1
    for which, expected in enumerate((0, 0, grid(200))):
        with mock.patch("schedules.ids_of", lambda engine, asked: ids[which]):  # noqa: B023
            drive = Drive(engine_of("bundled"), Schedule((Asked(limit=3),)), driven.runner, driven.clock)
            assert cached(drive.run()) == [expected]


@pytest.mark.parametrize("pair", PAIRS)
def test_equal_prompts_at_once_are_prefilled_once(pair):
    driven = Driven(pair)
    requests = [Asked(prompt=(0, 300), settings="sampled", drafts=i % 3) for i in range(6)]
    outcomes = driven.run(*requests)
    assert sorted(cached(outcomes)) == [0] + [grid(299)] * 5
    assert sum(driven.computed.values()) == 300 + 5 * (300 - grid(299))


def test_eight_with_one_long_beginning_prefill_it_once():
    driven = Driven()
    outcomes = driven.run(*(Asked(prompt=(0, 1000), tail=i + 1, limit=3) for i in range(8)))
    assert sum(driven.computed.values()) <= 1000 + 8 * (8 + GRID) and min(cached(outcomes)) == 0


@pytest.mark.parametrize("pair", PAIRS)
def test_each_turn_of_a_conversation_computes_what_is_new(pair):
    """Six turns: of each its own tokens, and at most a chunk besides."""
    driven, before = Driven(pair), 0
    for turn in range(6):
        (outcome,) = driven.run(Asked(prompt=(1, 150), turns=turn, drafts=turn % 3))
        prompt = outcome.result.stats.prompt_tokens
        assert driven.computed[outcome.request.id] <= prompt - before + CHUNK
        before = prompt
    assert driven.prefixes.counts.hits == 5


def test_conversations_stay_within_their_bytes():
    """Many of them, each of two turns, in room for a few."""
    conversations(30)


@pytest.mark.slow
def test_hundreds_of_conversations_stay_within_their_bytes():
    conversations(500)


def conversations(count: int) -> None:
    limit, clock, engine = 3 << 20, Clock(), engine_of("bundled")
    runner = runner_of(engine, clock, Schedule((), prefixes=limit))
    prefixes, before = runner.keeping.prefixes, 0
    for number in range(count):
        first = [300 + number % 500, *ids_of(engine, Asked(prompt=(number % 3, 90 + number % 70)))]
        for _ in range(2):
            with mock.patch("schedules.ids_of", lambda engine, asked: first):  # noqa: B023
                drive = Drive(engine, Schedule((Asked(limit=20),)), runner, clock)
                (outcome,) = drive.run()
            first = [*first, *outcome.tokens, *range(300, 310)]
            assert 0 < prefixes.bytes == sum(each.saved.bytes for each in prefixes._entries) <= limit
        assert prefixes.counts.hits > before, "the second turn goes on from the first"
        before = prefixes.counts.hits
    assert prefixes.counts.evicted > count


def test_what_a_prompt_goes_on_from_may_go():
    """It is found, and thrown out before anything of it is read: the prompt has a copy by then."""
    driven = Driven()
    driven.run(Asked(prompt=(0, 300)))
    usual = Runner._launch

    def launch(runner, deliver):
        runner.keeping.prefixes.clear()
        usual(runner, deliver)

    with mock.patch.object(Runner, "_launch", launch):
        assert cached(driven.run(Asked(prompt=(0, 300), settings="sampled"))) == [grid(299)]


def test_salts_are_apart():
    driven = Driven()
    driven.run(Asked(prompt=(0, 300), salt="a"))
    requests = [Asked(prompt=(0, 300), salt=salt) for salt in (None, "b", "a")]
    assert [cached(driven.run(each))[0] for each in requests] == [0, 0, grid(299)]
    driven = Driven()  # nobody waits for a prompt of another salt
    driven.runner.budget = Budget(8 * CHUNK, CHUNK // 4)  # both in one round
    outcomes = driven.run(*(Asked(prompt=(0, 300), salt=salt) for salt in ("a", "b")))
    assert cached(outcomes) == [0, 0] and outcomes[0].first == outcomes[1].first


def test_under_pressure_they_go():
    """At the system's warning no more are kept; once it is critical all go, and hits are none."""
    driven, level = Driven(), [NORMAL]
    driven.runner.pressure = lambda: level[0]
    driven.run(Asked(prompt=(0, 300)))
    held = driven.prefixes.bytes
    level[0] = WARNING
    assert cached(driven.run(Asked(prompt=(0, 300)))) == [grid(299)]
    driven.run(Asked(prompt=(1, 300)))
    assert 0 < driven.prefixes.bytes <= held
    level[0] = CRITICAL
    assert cached(driven.run(Asked(prompt=(0, 300), limit=3))) in ([0], [grid(299)])
    assert driven.prefixes.bytes == 0
    level[0] = NORMAL
    assert cached(driven.run(Asked(prompt=(0, 300)))) == [0] and driven.prefixes.bytes > 0


def test_they_go_before_any_row_does():
    """Memory for two texts and hardly more: what was kept makes room, and nobody waits for it or is preempted."""
    requests, peaks = (Asked(prompt=(0, 240), drafts=1), Asked(prompt=(1, 240), drafts=1)), []
    usual = Demand.total

    def total(demand, *args):
        peaks.append(usual(demand, *args))
        return peaks[-1]

    with mock.patch.object(Demand, "total", total):
        Driven(prefixes=0).run(*requests)
    cold, driven = Driven(prefixes=0), Driven()
    for which in range(6):
        driven.run(Asked(prompt=(which + 2, 400), limit=3, salt="others"))
    before, rounds = driven.prefixes.bytes, []
    for each in (cold, driven):
        demand = each.runner.scheduler.demand
        demand.memory = replace(demand.memory, limit=max(peaks))
        outcomes = each.run(*requests)
        rounds.append([(one.rounds, one.last - one.first, one.result.stats.preemptions) for one in outcomes])
    assert rounds[0] == rounds[1]
    assert driven.prefixes.counts.evicted > 0 and driven.prefixes.bytes < before


def test_a_row_that_lost_its_kv_goes_on_from_what_was_kept():
    """Its prompt is not computed again."""
    driven, level = Driven(), [NORMAL]
    driven.runner.pressure = lambda: level[0]
    drive = Drive(
        engine_of("bundled"), Schedule((Asked(prompt=(0, 300)), Asked(prompt=(1, 9)))), driven.runner, driven.clock
    )
    for _ in range(12):
        drive.turn()
    id = next(iter(drive.outcomes))
    assert drive.outcomes[id].tokens and not drive.outcomes[id].over
    driven.runner.pause(id)
    drive.turn()
    scheduler, kept = driven.runner.scheduler, driven.prefixes
    scheduler._forget(scheduler.entries.find(id))
    driven.runner.held[id].saved = None
    driven.runner.resume(id)
    hits = kept.counts.hits
    for outcome in drive.run():
        check("bundled", outcome)
    assert kept.counts.hits == hits + 1
    assert drive.outcomes[id].result.stats.cached_tokens == 0, "of its prompt all was computed at first"


def test_what_a_verify_accepts_after_the_end_is_not_kept():
    """A stop string ends the text amid accepted drafts: the next turn goes on from the text, and says what it must."""
    for pair in PAIRS:
        driven = Driven(pair)
        for settings in ("a stop string", "a stop string of several letters"):
            for length in (70, 250):
                for turns in (0, 1, 2):
                    driven.run(Asked(prompt=(0, length), settings=settings, drafts=4, turns=turns))


def test_nothing_is_kept_where_nothing_is_asked_for():
    driven = Driven(prefixes=0)
    asked = Asked(prompt=(0, 300))
    assert cached(driven.run(asked)) == cached(driven.run(asked)) == [0]
    assert driven.prefixes.bytes == 0 and cached(driven.run(asked, asked)) == [0, 0]


def test_what_somebody_read_is_used():
    """K/V that come with a request: they are kept for others, too, where they are more than what is there."""
    driven, engine, told = Driven(), engine_of("bundled"), []
    driven.prefixes.on_keep = lambda tokens, saved, salt: told.append((list(tokens), saved))
    driven.run(Asked(prompt=(0, 300)))
    tokens, saved = max(told, key=lambda each: len(each[0]))
    usual, told[:] = Drive.made, []
    driven.prefixes.clear()

    def made(drive, asked):
        request = usual(drive, asked)
        if len(request.prompt) > len(tokens):
            request.restored = SimpleNamespace(tokens=saved.tokens, saved=lambda: saved)
        return request

    asked = Asked(prompt=(0, 300), turns=1)
    assert ids_of(engine, asked)[: len(tokens)] == tokens and alone("bundled", asked).tokens
    with mock.patch.object(Drive, "made", made):
        assert cached(driven.run(asked)) == [len(tokens)]
    assert tokens not in [each for each, _ in told], "it is told of nobody: it came from there"
    assert driven.prefixes.known([*tokens, 1]) == len(tokens)


def test_what_cannot_be_made_of_a_file_fails_one_round_and_is_computed():
    """The request that brought it is not asked for it again: others after it are not ended as well."""
    engine, clock, row, late = engine_of("bundled"), Clock(), Asked(prompt=(1, 20)), Asked(at=4, prompt=(0, 150))

    class Bringing(Failing):
        fault = MemoryError

        def made(self, asked):
            request = super().made(asked)
            if asked is late:
                request.restored = SimpleNamespace(tokens=CHUNK, saved=mock.Mock(side_effect=MemoryError))
            return request

    after = replace(row, at=6)
    drive = Bringing(engine, Schedule((row, late, after)), None, clock)
    outcomes = drive.run()
    assert len(drive.failed) == 1 and outcomes[0].result.finish_reason == "error"
    for each in outcomes[1:]:
        check("bundled", each)


def test_a_request_that_begins_anew_holds_nothing_of_before():
    """A plan that raised may have sent it back without the runner's knowledge."""
    runner = runner_of(engine_of("bundled"), Clock(), Schedule(()))
    request = request_of(engine_of("bundled"), Asked(prompt=(0, 90)))
    runner.submit(request)
    held = runner.held[request.id]
    held.saved = held.staged = held.hidden = object()
    runner._known(request.id)
    assert held.saved is held.staged is held.hidden is None
    runner.close()


def test_the_default_share():
    """A quarter of what the limit leaves beside the model and a long text, half where that is little, else nothing."""
    runner = Driven().runner
    memory, config, block = runner.scheduler.memory, engine_of("bundled").target.config, runner.scheduler.block
    long = min(config.context, LONG)
    base = memory.alone(long - memory.advance, memory.advance, CHUNK, block)
    four = 4 * memory.saved(4096)
    for left, expected in ((40 * four, 10 * four), (2 * four, four), (100, 50), (-5, 0)):
        assert share(replace(memory, limit=base + left), config, CHUNK, block) == expected
