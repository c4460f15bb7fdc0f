"""The facade on the bundled, trained pair: text in, text and figures out; MTP on and off give the same."""

import asyncio
import copy
import json
import threading
import weakref
from dataclasses import replace
from itertools import count
from pathlib import Path

import mlx.core as mx
import pytest
from held_out import PROMPTS

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine import runner
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.engine.intake import Options
from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.speculative.drafting import Drafting

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(num_draft_tokens=4)


def test_the_bundled_pair_writes_the_same_text_with_and_without_mtp(engine):
    """A ragged batch, past the window of 128, with rows that end at different times."""
    params = [SamplingParams(max_tokens=n) for n in (170, 3, 60, 170)]
    plain = engine.generate(PROMPTS[:4], params, num_draft_tokens=0)
    drafted = engine.generate(PROMPTS[:4], params, num_draft_tokens=4)
    assert [r.tokens for r in plain] == [r.tokens for r in drafted]
    assert [(r.text, r.finish_reason) for r in plain] == [(r.text, r.finish_reason) for r in drafted]
    assert len(plain[1].tokens) == 3 and plain[1].finish_reason == "length"
    alone = [engine.generate(prompt, p) for prompt, p in zip(PROMPTS[:4], params, strict=True)]
    assert [r.tokens for r in alone] == [r.tokens for r in plain]
    assert "```python" in plain[0].text


def test_one_seed_one_text(engine):
    """Sampled: the same for every draft length and batch partner; another seed gives another text."""
    params = SamplingParams(max_tokens=40, temperature=1.0, top_k=64, top_p=0.95, seed=11, ignore_eos=True)
    texts = [engine.generate(PROMPTS[0], params, num_draft_tokens=k).tokens for k in (0, 2, 4)]
    texts.append(engine.generate(PROMPTS[:3], params)[0].tokens)
    assert all(text == texts[0] for text in texts)
    other = SamplingParams(max_tokens=40, temperature=1.0, top_k=64, top_p=0.95, seed=12, ignore_eos=True)
    assert engine.generate(PROMPTS[0], other).tokens != texts[0]


def test_settings_of_each_row_are_its_own(engine):
    """Penalties, biases, min-p, logprobs and none of these in one batch: each row as alone, with and without drafts."""
    common = {"max_tokens": 30, "ignore_eos": True}
    every = [
        SamplingParams(**common, temperature=0.0),
        SamplingParams(**common, temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(**common, temperature=1.0, min_p=0.1, presence_penalty=1.0, seed=3),
        SamplingParams(**common, temperature=0.7, logit_bias={300: 5.0, 12: -mx.inf}, logprobs=2, seed=4),
        SamplingParams(max_tokens=7, temperature=1.0, repetition_penalty=1.5, seed=5),  # it leaves first
    ]
    together = engine.generate(PROMPTS[:5], every)
    plain = engine.generate(PROMPTS[:5], every, num_draft_tokens=0)
    assert [r.tokens for r in together] == [r.tokens for r in plain]
    for prompt, params, result in zip(PROMPTS, every, together, strict=False):
        assert engine.generate(prompt, params).tokens == result.tokens
    assert together[0].tokens != together[1].tokens
    assert [r.logprobs is None for r in together] == [True, True, True, False, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_plain_decoding(engine, temperature):
    params = SamplingParams(max_tokens=40, temperature=temperature, logprobs=5, seed=9, ignore_eos=True)
    plain, drafted = (engine.generate(PROMPTS[:3], params, num_draft_tokens=k) for k in (0, 4))
    for ours, theirs in zip(drafted, plain, strict=True):
        assert [each.token for each in ours.logprobs] == ours.tokens == theirs.tokens
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and len(a.top) == 5
            assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-4)
            assert (a.token, a.logprob) == a.top[0] or temperature
    pieces = [chunk.logprobs for chunk in engine.stream(PROMPTS[0], params)]
    assert [each.token for piece in pieces for each in piece] == drafted[0].tokens


@pytest.mark.parametrize("position", [1, -2, 7, True, -1.0, "0", None])
def test_an_unknown_draft_position_is_named(position):
    with pytest.raises(UserError, match=r"draft_position is .*, expected 0 .* or -1 .*"):
        load(draft_position=position)


@pytest.mark.parametrize("position", [0, -1])
def test_either_draft_position_gives_the_same_text(engine, position):
    plain = engine.generate(PROMPTS[:3], GREEDY, num_draft_tokens=0)
    parts = engine.target, engine.drafter, engine.text, engine.defaults
    with Engine(*parts, drafting=Drafting(position=position)) as own:
        assert [r.tokens for r in own.generate(PROMPTS[:3], GREEDY)] == [r.tokens for r in plain]


def test_a_gpu_gives_buffers_back(engine, monkeypatch):
    """Each CLEAR_EVERY rounds; never on a CPU, where there is nothing to give back."""
    cleared, rounds, usual = [], [], runner.Runner.round
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    monkeypatch.setattr(runner.Runner, "round", lambda self, deliver: rounds.append(1) or usual(self, deliver))
    monkeypatch.setattr(runner, "CLEAR_EVERY", 10)
    engine.generate(PROMPTS[0], GREEDY, num_draft_tokens=0)
    assert device.traits().gives_back or not cleared
    cleared.clear(), rounds.clear()
    traits = replace(device.traits(), gives_back=True)
    monkeypatch.setattr(device, "traits", lambda: traits)
    monkeypatch.setattr(engine._worker._runner, "_rounds", count(1))
    engine.generate(PROMPTS[0], GREEDY, num_draft_tokens=0)
    assert len(cleared) == len(rounds) // 10 >= 3


def test_each_row_gets_the_report_that_it_asked_for(engine):
    every = [replace(GREEDY, logprobs=n, max_tokens=6) for n in (0, 2, 5)]
    results = engine.generate(PROMPTS[:3], every)
    assert [{len(each.top) for each in result.logprobs} for result in results] == [{0}, {2}, {5}]


def test_what_comes_after_the_end_in_a_round_does_not_count(engine):
    """An end token and the last token of the limit, amid what a round emitted."""
    for params, taken, reason in ((SamplingParams(max_tokens=9), [40, 41], "stop"), (GREEDY, [40, 41, 1], "length")):
        (request,) = engine._intake.requests([[2, 5]], params, Options())
        request.limit = 3 if reason == "length" else 9
        request.take([40, 41, 1, 42, 43], 4)
        chunk = request.chunk()
        assert (chunk.tokens, chunk.result.finish_reason, request.stats.accepted) == (taken, reason, 2)


def test_an_unknown_rule_of_acceptance_is_named():
    with pytest.raises(UserError, match="accept is 'typical', expected one of coupled, rejection"):
        load(accept="typical")


def test_a_bias_outside_the_vocabulary_is_named(engine):
    with pytest.raises(UserError, match="logit_bias has token id 4096, expected 0 to 4095"):
        engine.generate(PROMPTS[0], SamplingParams(logit_bias={4096: 1.0}))


def test_figures_add_up(engine):
    result = engine.generate(PROMPTS[0], GREEDY)
    s = result.stats
    assert s.mtp and s.mtp_reason is None and s.generation_tokens == len(result.tokens) == 40
    assert s.prompt_tokens == len(engine.text.encode(PROMPTS[0]))
    assert s.host_syncs == s.rounds + 1 and 1 < s.tokens_per_round <= 5
    assert s.accepted + s.rounds + 1 == 40  # accepted drafts, a bonus token a round, the prefill's token
    assert len(s.acceptance_by_position) == 4 and s.acceptance_by_position[0] >= s.acceptance_by_position[3]
    assert s.generation_tps > 0 and s.prompt_tps > 0 and 0 < s.ttft_s < 60 and s.peak_memory_gb > 0
    plain = engine.generate(PROMPTS[0], GREEDY, num_draft_tokens=0).stats
    assert (plain.mtp, plain.rounds, plain.drafted, plain.host_syncs) == (False, 39, 0, 40)
    assert "draft length" in plain.mtp_reason


def test_no_more_is_drafted_than_can_be_used(engine):
    for wanted in (1, 2, 3):
        s = engine.generate(PROMPTS[0], SamplingParams(max_tokens=wanted, ignore_eos=True)).stats
        assert s.generation_tokens == wanted and s.drafted <= max(0, wanted - 2)


def test_stream_gives_the_text_in_pieces(engine):
    chunks = list(engine.stream(PROMPTS[:2], GREEDY))
    for index in (0, 1):
        own = [c for c in chunks if c.index == index]
        assert [c.result is not None for c in own] == [False] * (len(own) - 1) + [True]
        assert "".join(c.text for c in own) == own[-1].result.text
        assert [t for c in own for t in c.tokens] == own[-1].result.tokens
        assert len(own) > 5


def test_stop_strings_end_inside_a_draft(engine):
    """The text ends before the stop string, whichever round brings it, the same with and without drafts."""
    whole = engine.generate(PROMPTS[0], SamplingParams(max_tokens=80)).text
    stop = whole[30:35]
    results = [
        engine.generate(PROMPTS[0], SamplingParams(max_tokens=80, stop=(stop,)), num_draft_tokens=k) for k in (0, 4)
    ]
    assert results[0].text == results[1].text == whole[: whole.index(stop)]
    assert results[0].tokens == results[1].tokens and {r.finish_reason for r in results} == {"stop"}


def test_eos_inside_a_draft_ends_the_text(engine):
    ended = [engine.generate(p, SamplingParams(max_tokens=200)) for p in PROMPTS[5:8]]
    stopped = [r for r in ended if r.finish_reason == "stop"]
    assert stopped and all(not {1, 6}.intersection(r.tokens) for r in stopped)


def test_suppressed_tokens_never_come(engine):
    usual = engine.generate(PROMPTS[0], GREEDY).tokens
    banned = max(set(usual), key=usual.count)
    defaults = replace(engine.defaults, suppress_token_ids=(banned,))
    with Engine(engine.target, engine.drafter, engine.text, defaults) as other:
        results = [other.generate(PROMPTS[0], GREEDY, num_draft_tokens=k) for k in (0, 4)]
    assert results[0].tokens == results[1].tokens and banned not in results[0].tokens


def test_cancel_ends_with_what_there_is(engine):
    cancel = threading.Event()
    chunks, long = [], replace(GREEDY, max_tokens=4000)
    for chunk in engine.stream(PROMPTS[:2], long, cancel=cancel):
        chunks.append(chunk)
        if len(chunks) == 6:
            cancel.set()
    results = [c.result for c in chunks if c.result is not None]
    assert [r.finish_reason for r in results] == ["cancelled"] * 2
    assert all(0 < len(r.tokens) < 4000 for r in results)
    cancel.set()
    early = list(engine.stream(PROMPTS[0], GREEDY, cancel=cancel))
    assert early[-1].result.finish_reason == "cancelled" and early[-1].result.tokens == []


def test_more_prompts_than_rows_wait_their_turn(engine):
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    results = engine.generate(PROMPTS[:11], short)
    assert len(results) == 11 and results[10].tokens == engine.generate(PROMPTS[10], short).tokens


def test_prefill_progress_and_long_prompts(engine):
    """A prompt of several chunks, past the window."""
    told = []
    long_prompt = (engine.text.encode(PROMPTS[2]) * 40)[:700]
    plain = engine.generate(long_prompt, GREEDY, num_draft_tokens=0, progress=lambda d, t: told.append((d, t)))
    assert told == [(512, 700), (700, 700)]
    assert engine.generate(long_prompt, GREEDY).tokens == plain.tokens


def test_the_context_is_a_limit(engine, monkeypatch):
    context = 1024  # the pair's own is 8192, which would take a minute here
    monkeypatch.setattr(engine.target, "config", replace(engine.target.config, context=context))
    long_prompt = (engine.text.encode(PROMPTS[2]) * 80)[:context]
    with Engine(engine.target, engine.drafter, engine.text, engine.defaults) as short:
        result = short.generate(long_prompt[: context - 6], SamplingParams(max_tokens=50, ignore_eos=True))
        assert len(result.tokens) == 6 and result.finish_reason == "length"
        with pytest.raises(UserError, match=f"{context} tokens, expected fewer than the context of {context}"):
            short.generate(long_prompt, GREEDY)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: e.generate(""), "empty"),
        (lambda e: e.generate([]), "0 prompts"),
        (lambda e: e.generate(["a", "b"], [GREEDY]), "2 prompts with 1 settings"),
        (lambda e: e.generate("a", num_draft_tokens=-1), "num_draft_tokens is -1"),
    ],
)
def test_bad_calls_are_named(engine, call, message):
    with pytest.raises(UserError, match=message):
        call(engine)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "no/such/model"}, "no model 'no/such/model'"),
        ({"model": "nothing-here"}, "no model 'nothing-here'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_bad_loads_are_named(options, message):
    with pytest.raises(UserError, match=message):
        load(**options)


def test_the_cpu_runs_in_float32(engine):
    if not mx.metal.is_available():
        assert engine.target.norm.weight.dtype == mx.float32


@pytest.mark.slow
def test_six_thousand_tokens_of_context(engine):
    """The source of a module as the prompt: the same text with and without drafts, which are still accepted."""
    text = Path(json.__file__).with_name("decoder.py").read_text() * 3
    prompt = engine.text.encode(text, chat_template=False)[:6000]
    plain, drafted = (engine.generate(prompt, GREEDY, num_draft_tokens=k) for k in (0, 4))
    assert len(prompt) == 6000 and drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_round > 2


def test_a_timeout_ends_with_what_there_is(engine):
    result = engine.generate(PROMPTS[0], replace(GREEDY, max_tokens=8000), timeout=0.5)
    assert result.finish_reason == "timeout" and len(result.tokens) < 8000 and result.error is None


def test_coroutines_get_the_same_texts(engine):
    """Whole and in pieces, several at once; a bad call is told when it is awaited."""

    async def main():
        async def pieces(prompt):
            return [token async for chunk in engine.astream(prompt, GREEDY) for token in chunk.tokens]

        whole = engine.agenerate(PROMPTS[:2], GREEDY)
        found = await asyncio.gather(whole, *map(pieces, PROMPTS[:2]))
        with pytest.raises(UserError, match="empty"):
            await engine.agenerate("")
        with pytest.raises(UserError, match="timeout is"):
            await anext(engine.astream("x", timeout="1"))
        return [result.tokens for result in found[0]], found[1:]

    usual = [result.tokens for result in engine.generate(PROMPTS[:2], GREEDY)]
    assert asyncio.run(main()) == (usual, usual)


@pytest.mark.parametrize("way", ["close", "with", "async with", "del"])
def test_a_closed_engine(engine, way):
    """It ends its streams, says so in a line, may be closed again, and keeps nothing of the models."""
    parts = copy.deepcopy(engine.target), None, engine.text, engine.defaults
    own, target = Engine(*parts), weakref.ref(parts[0])
    del parts
    stream = own.stream(PROMPTS[0], replace(GREEDY, max_tokens=8000))
    next(stream)
    if way == "close":
        own.close()
        own.close()
    elif way == "with":
        with own:
            pass
    elif way == "async with":

        async def main():
            async with own:
                pass

        asyncio.run(main())
    if way == "del":
        worker = own._worker
        del own, stream
        worker._ended.wait(30)
    else:
        assert [chunk.result.finish_reason for chunk in stream if chunk.result] == ["cancelled"]
        for call in (
            lambda: own.generate("x"),
            lambda: own.stream("x"),
            lambda: asyncio.run(own.agenerate("x")),
            lambda: own.call(len),
            lambda: own.target,
            lambda: own.description,
            own.__enter__,
        ):
            with pytest.raises(UserError, match="the engine is closed; load it again"):
                call()
    assert target() is None


def test_a_function_of_ones_own_computes_where_the_models_do(engine):
    """With their K/V and streams, between two rounds."""
    told = []
    name = engine.call(lambda tell: tell(threading.current_thread().name) or engine.target.dtype, told.append)
    assert name == mx.float32 and told == ["mlx_gemma_mtp"]
    with pytest.raises(UserError, match="from within its own work"):
        engine.call(lambda: engine.generate("x"))
