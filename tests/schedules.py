"""Schedules of requests, driven round by round through a Runner without a thread: what came of each, and what comes of
the same request alone.

A schedule is plain data, so hypothesis can draw it and make a failing one smaller. Its clock shows rounds.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle, islice

import mlx.core as mx
from cost_tables import table
from held_out import PROMPTS
from hypothesis import strategies as st
from near_ties import NEAR
from trained import OF_MOE

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.checks.equality import _logits as reference_logits
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.engine.intake import Options
from mlx_gemma_mtp.engine.request import Chunk, Delivery, Request, Result
from mlx_gemma_mtp.engine.runner import Runner
from mlx_gemma_mtp.machine import blas
from mlx_gemma_mtp.sampling.distribution import Distribution
from mlx_gemma_mtp.sampling.noise import gumbel
from mlx_gemma_mtp.sampling.penalties import TokenCounts
from mlx_gemma_mtp.sampling.rules import Rules
from mlx_gemma_mtp.speculative.budget import Budget
from mlx_gemma_mtp.speculative.depth import Depth
from mlx_gemma_mtp.speculative.readback import TokenLogprob

CHUNK = 64  # prompt tokens a forward pass: prompts of a chunk, of several, and of parts of one
LONGEST = 24  # tokens of a text
PATIENCE = 4000  # rounds, in which every schedule ends
PAIRS = {"bundled": {}, "e2b": {"model": "tests/data/e2b/target", "draft_model": "tests/data/e2b/drafter"}}
QUANTISED = {  # the same pairs with K/V in few bits: each text is that of its own engine
    f"{pair}, K/V of {'all' if rings else 'full'} layers in {bits} bits": {
        **options,
        "kv_bits": bits,
        "kv_bits_rings": rings,
    }
    for pair, options in PAIRS.items()
    for bits in (8, 4)
    for rings in (False, True)
}

WORD = {"type": "string", "minLength": 1, "maxLength": 3}
TOOL = {
    "type": "function",
    "function": {"name": "read", "parameters": {"type": "object", "properties": {"path": WORD}, "required": ["path"]}},
}
CALLED = {"tools": [TOOL], "tool_choice": "required"}
FREE = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
SAMPLED = replace(FREE, temperature=1.0, top_k=64, top_p=0.95, seed=5)
PENALISED = replace(SAMPLED, temperature=0.8, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3)
# Texts of three tokens, each about as likely, so that they soon repeat themselves.
FEW = replace(SAMPLED, temperature=20.0, top_k=3, top_p=1.0, logit_bias=dict.fromkeys((280, 290, 300), 100.0))
OBJECT = {"type": "object", "properties": {"n": {"type": "integer"}, "s": WORD}, "required": ["n", "s"]}
# What a request may ask for, by name: its settings, and the options of its call. The simplest come first.
SETTINGS: dict[str, tuple[SamplingParams, dict]] = {
    "greedy": (FREE, {}),
    "greedy, to its end": (replace(FREE, ignore_eos=False), {}),
    "sampled": (SAMPLED, {}),
    "sampled, another seed": (replace(SAMPLED, seed=6, top_k=20, min_p=0.02), {}),
    "sampled, the whole vocabulary": (replace(SAMPLED, top_k=-1, top_p=1.0, temperature=1.3), {}),
    "penalised": (PENALISED, {}),
    "penalised, greedy": (replace(PENALISED, temperature=0.0), {}),
    "biased": (replace(FREE, logit_bias={9: 4.0, 10: -mx.inf, 107: -mx.inf}), {}),
    "reported": (replace(FREE, logprobs=3), {}),
    "reported, sampled": (replace(SAMPLED, logprobs=0), {}),
    "a stop string": (replace(FREE, stop=("e", "zzz")), {}),
    "until it repeats": (replace(FEW, stop_repetition=6), {}),
    "until it repeats, or a stop string": (replace(FEW, stop_repetition=4, stop=("(2<", "zzz"), seed=9), {}),
    "a stop string of several letters": (replace(SAMPLED, stop=("re", "in", "self.")), {}),
}
BOUND: dict[str, tuple[SamplingParams, dict]] = {
    "an expression": (SamplingParams(temperature=0.0, regex="[ab]{3}[0-9]{2}[xyz]{4}", seed=0), {}),
    "an object": (SamplingParams(temperature=1.0, json_schema=OBJECT, seed=2), {}),
    "a call": (SamplingParams(temperature=0.0, seed=0), CALLED),
    "a call, sampled": (SamplingParams(temperature=1.0, seed=3), CALLED),
}
EVERY = SETTINGS | BOUND
# Tokens of a prompt: one, few, about a window (128), about two, and past it with the ring wrapped more than once.
LENGTHS = (5, 1, 2, 33, 63, 64, 65, 127, 128, 129, 200, 257, 420)
DRAFTS = (0, 1, 4, "auto")
PREFIXES = 8 << 20  # bytes: a dozen of the prompts above
SAID = 7  # tokens of the turn that follows a reply


_pairs: dict[Engine, str] = {}


@cache
def engine_of(pair: str) -> Engine:
    """The engine of "moe" or of a name in PAIRS or QUANTISED, loaded once."""
    options = {"num_draft_tokens": 4, "dtype": "float32", "prefill_chunk": CHUNK, "learning": False}
    engine = load(**(PAIRS | QUANTISED | {"moe": OF_MOE})[pair], **options)
    _pairs[engine] = pair
    return engine


@dataclass(frozen=True)
class Asked:
    """A request of a schedule. Rounds are counted from the first of the schedule for `at`, from the arrival for all
    else.

    prompt: (which text, how many tokens of it). tail: so many tokens of the next text behind them. turns: so many times
    the text that this gives alone follows, and SAID tokens of the next text. spelt: so many tokens at the end of the
    last of these texts come back as others. salt: of its prefixes. timeout, cancelled: rounds until it is over, None
    for never. pause: (rounds until its reader stops, rounds until it reads again), None for a reader that always reads.
    """

    at: int = 0
    prompt: tuple[int, int] = (0, 5)
    settings: str = "greedy"
    limit: int = LONGEST
    drafts: int | str = 0
    priority: int = 0
    tail: int = 0
    turns: int = 0
    spelt: int = 0
    salt: str | None = None
    timeout: int | None = None
    cancelled: int | None = None
    pause: tuple[int, int] | None = None

    @property
    def alone(self) -> Asked:
        """The same request by itself, without drafts, to its end."""
        return Asked(prompt=self.prompt, settings=self.settings, tail=self.tail, turns=self.turns, spelt=self.spelt)


@dataclass(frozen=True)
class Schedule:
    """rows: the most in a batch. spare: bytes for K/V as a multiple of what the largest request needs alone, None for
    all that there is. budget: prompt tokens a round. prefixes: bytes for these, 0 keeps none.
    """

    requests: tuple[Asked, ...]
    rows: int = 8
    spare: float | None = None
    budget: int = CHUNK
    prefixes: int = PREFIXES


@dataclass
class Outcome:
    """What came of a request. rounds: the numbers of the rounds that ran between its arrival and its end."""

    request: Request
    asked: Asked
    chunks: list[Chunk] = field(default_factory=list)
    first: int | None = None  # the round of its first token
    last: int | None = None  # and of its last
    rounds: int = 0
    over: bool = False

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def result(self) -> Result:
        (result,) = [chunk.result for chunk in self.chunks if chunk.result is not None]
        return result


class Clock:
    """Shows how many rounds have begun; told so by whoever drives them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def prompt_of(engine: Engine, which: int, length: int) -> list[int]:
    """The first tokens of a chat turn, followed by those of other turns where it is too short."""
    turns = (engine.text.encode(each) for each in islice(cycle(PROMPTS), which, None))
    ids: list[int] = []
    while len(ids) < length:
        ids += next(turns)
    return ids[:length]


def ids_of(engine: Engine, asked: Asked) -> list[int]:
    """The whole prompt of a request."""
    which, length = asked.prompt
    ids = prompt_of(engine, which, length) + prompt_of(engine, which + 1, asked.tail)
    if not asked.turns:
        return ids
    before = replace(asked, turns=asked.turns - 1, spelt=0).alone
    text = alone(_pairs[engine], before).tokens
    text = [*text[: len(text) - asked.spelt], *(each ^ 1 for each in text[len(text) - asked.spelt :])]
    return ids_of(engine, before) + text + prompt_of(engine, which + asked.turns, SAID)


def request_of(engine: Engine, asked: Asked, now: float = 0.0) -> Request:
    """The request as the engine makes it, with a deadline by the schedule's clock."""
    params, options = EVERY[asked.settings]
    options = Options(num_draft_tokens=asked.drafts, priority=asked.priority, cache_salt=asked.salt, **options)
    prompts = [ids_of(engine, asked)]
    (request,) = engine._intake.requests(prompts, replace(params, max_tokens=asked.limit), options)
    request.deadline = None if asked.timeout is None else now + asked.timeout
    return request


def runner_of(engine: Engine, clock: Callable[[], float], schedule: Schedule) -> Runner:
    """A runner of the engine's models, without a thread. Costs and budget are constants: no clock chooses anything."""
    rejection = engine.settings.drafting.rejection
    depth = Depth(lambda kind, rows: table(0.02, 0.1), rejection, frozen=True)
    settings = replace(engine.settings, max_rows=schedule.rows, prefix_memory=schedule.prefixes)
    make = lambda settings: Runner(  # noqa: E731
        engine.target, engine.drafter, None, depth, settings,
        budget=Budget(CHUNK, CHUNK // 4, schedule.budget), clock=clock,
    )  # fmt: skip
    runner = make(settings)
    if schedule.spare is None:
        return runner
    scheduler = runner.scheduler
    sizes = [
        scheduler.memory.alone(len(ids_of(engine, asked)), asked.limit, CHUNK, scheduler.block)
        for asked in schedule.requests
    ]
    weights = scheduler.memory.weights
    return make(replace(settings, memory_limit=weights + int(schedule.spare * (max(sizes) - weights))))


class Drive:
    """A schedule on its way: `turn` runs a round, `outcomes` are those of the requests by id.

    runner: one that ran others before, with the clock that it was made with; None makes both.
    """

    def __init__(self, engine: Engine, schedule: Schedule, runner=None, clock: Clock | None = None):
        self.engine, self.schedule, self.clock = engine, schedule, clock or Clock()
        self.runner = runner_of(engine, self.clock, schedule) if runner is None else runner
        self.began = self.clock.now
        self.outcomes: dict[int, Outcome] = {}
        self.waiting = sorted(schedule.requests, key=lambda asked: asked.at)  # stable: as they stand
        self.now = self.ran = 0

    def run(self) -> list[Outcome]:
        """Every request to its end. The outcomes are in the order of the schedule."""
        while self.waiting or self.unfinished():
            assert self.now < PATIENCE, f"after {self.now} rounds: {self.unfinished()}"
            self.turn()
        assert not self.runner.busy
        return sorted(self.outcomes.values(), key=lambda each: self.schedule.requests.index(each.asked))

    def unfinished(self) -> list[tuple[Asked, int]]:
        return [(each.asked, len(each.tokens)) for each in self.outcomes.values() if not each.over]

    def turn(self) -> None:
        """What is due in this round, then the round."""
        self.clock.now = self.began + self.now
        while self.waiting and self.waiting[0].at <= self.now:
            asked = self.waiting.pop(0)
            request = self.made(asked)
            self.outcomes[request.id] = Outcome(request, asked)
            self.runner.submit(request)
        for number, outcome in self.outcomes.items():
            self.tell(number, outcome)
        deadline = self.runner.next_deadline()
        if self.runner.busy or (deadline is not None and deadline <= self.clock.now):
            self.ran += 1
            for each in self.outcomes.values():
                each.rounds += not each.over
            self.round()
        self.now += 1

    def made(self, asked: Asked) -> Request:
        return request_of(self.engine, asked, self.clock.now)

    def round(self) -> None:
        self.runner.round(self.take)

    def tell(self, number: int, outcome: Outcome) -> None:
        """Cancels, pauses and resumes a request where that is due."""
        asked, since = outcome.asked, self.now - outcome.asked.at
        if outcome.over:
            return
        if asked.cancelled is not None and since == asked.cancelled:
            self.runner.cancel(number)
        if asked.pause is not None and since == asked.pause[0]:
            self.runner.pause(number)
        if asked.pause is not None and since == sum(asked.pause):
            self.runner.resume(number)

    def take(self, deliveries: Sequence) -> None:
        for delivery in deliveries:
            if not isinstance(delivery, Delivery):  # how far a prompt is
                continue
            outcome = self.outcomes[delivery.id]
            assert not outcome.over, (outcome.asked, delivery)
            outcome.chunks.append(delivery.chunk)
            if delivery.chunk.tokens:
                outcome.first = self.now if outcome.first is None else outcome.first
                outcome.last = self.now
            outcome.over = delivery.chunk.result is not None


class Failing(Drive):
    """A Drive whose rounds may raise `fault`: whoever is there fails, as the worker has it.

    failed: the turns in which one raised. present: the requests that were there at the last of them.
    """

    fault: type[Exception]

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.failed: list[int] = []
        self.present: set[int] = set()

    def round(self) -> None:
        try:
            super().round()
        except self.fault as error:
            self.failed.append(self.now)
            self.present = {number for number, each in self.outcomes.items() if not each.over}
            self.take(self.runner.fail(error))


@cache
def alone(pair: str, asked: Asked) -> Result:
    """What comes of a request by itself, without drafts and to its end; made once. asked: as `Asked.alone`."""
    (outcome,) = Drive(engine_of(pair), Schedule((asked,), prefixes=0)).run()
    assert outcome.result.stats.cached_tokens == 0
    assert outcome.result.finish_reason in ("stop", "length", "tool_calls", "repetition"), outcome.result.error
    return outcome.result


def expected(pair: str, asked: Asked) -> tuple[list[int], str]:
    """The tokens of a request and why it ends, by what it does alone: a lower limit cuts the text and no more."""
    whole = alone(pair, asked.alone)
    ended = len(whole.tokens) + (whole.end_token is not None) <= asked.limit
    return whole.tokens[: asked.limit], whole.finish_reason if ended else "length"


def scores(pair: str, asked: Asked, at: int) -> mx.array:
    """The scores [V] of every token as the one that follows the first `at` of a request's lone text: after all settings
    but the filters, with the noise where it is sampled.
    """
    engine, settings = engine_of(pair), EVERY[asked.settings][0].resolved(engine_of(pair).defaults)
    vocab, prompt = engine.target.config.vocab_size, ids_of(engine, asked)
    text = alone(pair, asked.alone).tokens[:at]
    unfiltered = replace(settings, temperature=settings.temperature or 1.0, top_k=-1, top_p=1.0, min_p=0.0)
    rules = Rules.of([unfiltered], vocab, engine.settings.suppress)
    counts = TokenCounts.of([prompt], vocab, [text]) if rules.penalties else None
    logits = reference_logits(engine, [*prompt, *text])[:, -1:]
    found = Distribution.of(logits, rules, None, token_counts=counts)
    if not settings.temperature:
        return found.scores[0, 0]
    return (found.scores + gumbel(rules.keys, mx.array([[len(prompt) + at]]), found.names()))[0, 0]


def is_exact(outcome: Outcome) -> bool:
    """Whether a request's numbers are those of its lone run, bit for bit. MLX's own BLAS adds up in one order whatever
    the width; but the rings of rounds and of chunks have other sizes, so that attention past the window adds up in
    another order. So a turn that goes on from a reply, and a text that is prefilled anew, differ in the last bits.
    """
    return blas.is_reference() and not outcome.asked.turns and not outcome.request.stats.preemptions


def is_near_tie(pair: str, asked: Asked, tokens: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a text leaves its lone one at a near-tie, which another order of sums may flip; it is listed as a
    warning.
    """
    at = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
    if at is None:
        return False
    each = scores(pair, asked, at)
    gap = abs(each[tokens[at]].item() - each[expected[at]].item())
    if gap <= NEAR:
        warnings.warn(f"near-tie: {asked}, token {at}: {tokens[at]} for {expected[at]}, {gap:.2g}", stacklevel=2)
    return gap <= NEAR


def same_reports(found: Sequence[TokenLogprob], wanted: Sequence[TokenLogprob], exact: bool) -> bool:
    """Whether log-probabilities are equal; exact: bit for bit."""
    if exact:
        return list(found) == list(wanted)
    both = zip(found, wanted, strict=True)
    return all(a.token == b.token and abs(a.logprob - b.logprob) < NEAR for a, b in both)


def check(pair: str, outcome: Outcome, cut: Sequence[str] = ()) -> None:
    """A request's chunks add up to its result, and its tokens are those of its lone run: all of them, or the first ones
    where it was ended from outside, for one of the reasons in `cut`.
    """
    asked, result = outcome.asked, outcome.result
    (tokens, reason), exact = expected(pair, asked), is_exact(outcome)
    assert outcome.tokens == result.tokens, asked
    assert "".join(chunk.text for chunk in outcome.chunks) == result.text, asked
    if not exact and result.tokens != tokens[: len(result.tokens)] and is_near_tie(pair, asked, result.tokens, tokens):
        return
    ends = {"cancelled": asked.cancelled, "timeout": asked.timeout}
    if result.finish_reason in cut or ends.get(result.finish_reason) is not None:
        assert result.tokens == tokens[: len(result.tokens)], asked
    else:
        assert (result.finish_reason, result.error) == (reason, None), asked
        assert result.tokens == tokens, asked
    if result.logprobs is not None:
        reported = alone(pair, asked.alone).logprobs[: len(result.tokens)]
        assert [each.token for each in result.logprobs] == result.tokens, asked
        assert same_reports(result.logprobs, reported, exact), asked


def check_all(pair: str, schedule: Schedule) -> Drive:
    """Runs a schedule and checks what came of every request."""
    drive = Drive(engine_of(pair), schedule)
    for outcome in drive.run():
        check(pair, outcome)
        assert outcome.result.stats.host_syncs <= outcome.rounds, outcome.asked
    return drive


def _requests(settings: Sequence[str]) -> st.SearchStrategy[Asked]:
    rounds = lambda most: st.none() | st.integers(0, most)  # noqa: E731
    return st.builds(
        Asked,
        at=st.integers(0, 30),
        prompt=st.tuples(st.integers(0, 2), st.sampled_from(LENGTHS)),
        settings=st.sampled_from(list(settings)),
        limit=st.integers(1, LONGEST),
        drafts=st.sampled_from(DRAFTS),
        priority=st.integers(0, 2),
        tail=st.sampled_from([0, 0, 0, 3, 70]),
        turns=st.sampled_from([0, 0, 0, 1, 2]),
        salt=st.sampled_from([None, None, None, "other"]),
        timeout=rounds(40),
        cancelled=rounds(40),
        pause=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
    )


def _with_turns(requests: Sequence[Asked]) -> tuple[Asked, ...]:
    """The requests, and before those of a later turn the turns before, to their ends."""
    made: list[Asked] = []
    for asked in requests:
        for turn in range(asked.turns):
            start = max(0, asked.at - 25 * (asked.turns - turn))
            made.append(replace(asked.alone, at=start, turns=turn, drafts=asked.drafts, salt=asked.salt))
        made.append(replace(asked, at=asked.at + 5 * asked.turns))
    return tuple(made)


def schedules(settings: Sequence[str] = tuple(EVERY), most: int = 9) -> st.SearchStrategy[Schedule]:
    """Schedules of up to `most` requests with these settings."""
    return st.builds(
        Schedule,
        st.lists(_requests(settings), min_size=1, max_size=most).map(_with_turns),
        rows=st.sampled_from([8, 1, 2, 3]),
        spare=st.sampled_from([None, 1.1, 1.5, 2.5]),
        budget=st.sampled_from([CHUNK, CHUNK // 4, 2 * CHUNK]),
        prefixes=st.sampled_from([PREFIXES, 1 << 30, 1 << 20, 0]),
    )


def drawn(seed: int, requests: int, settings: Sequence[str] = tuple(EVERY), **others) -> Schedule:
    """A schedule by a seed, where there is nothing to make smaller."""
    r = random.Random(seed)
    made = [
        Asked(
            at=r.randrange(30),
            prompt=(r.randrange(3), r.choice(LENGTHS)),
            settings=r.choice(list(settings)),
            limit=r.randint(1, LONGEST),
            drafts=r.choice(DRAFTS),
        )
        for _ in range(requests)
    ]
    return Schedule(tuple(made), **others)
