"""One row's failure is that row's: it ends with finish_reason 'error' and a reason, and the others do not notice."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
import tiny
from constraints import Stairs

from convert.cli import main as convert
from mlx_gemma_mtp import SamplingParams, load, verify
from mlx_gemma_mtp.engine.calibration import Costs
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.sampling.params import ACCEPT, REJECTION
from mlx_gemma_mtp.speculative.costs import UNKNOWN
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.guide import guide
from mlx_gemma_mtp.speculative.loop import Firsts, Joiner, compact
from mlx_gemma_mtp.speculative.prefill import prefill
from mlx_gemma_mtp.speculative.readback import NOT_FINITE, NOTHING_ALLOWED, sound
from mlx_gemma_mtp.text.reply import Reply

PROMPTS = ["Describe the function open().", "def area(width, height):", "What is a list?"]
FREE = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(num_draft_tokens=4)


@pytest.fixture(scope="module")
def alone(engine):
    return [engine.generate(prompt, FREE, num_draft_tokens=0).tokens for prompt in PROMPTS]


def among_good_ones(engine, alone, bad: SamplingParams, place: int, drafts: int | str = 4):
    """The bad row's result; the good rows beside it say what they say alone."""
    every = [bad if i == place else FREE for i in range(3)]
    results = engine.generate(PROMPTS, every, num_draft_tokens=drafts)
    for i, result in enumerate(results):
        if i != place:
            assert (result.tokens, result.finish_reason, result.error) == (alone[i], "length", None)
    return results[place]


# ---- constraints


def tokens_with(engine: Engine, letters: str) -> tuple[int, ...]:
    """Every token that has one of these letters, bytes included."""
    words = engine.text.fast_tokenizer.get_vocab()
    single = {f"<0x{ord(letter):02X}>" for letter in letters}
    return tuple(token for word, token in words.items() if set(word) & set(letters) or word in single)


@pytest.mark.parametrize("drafts", [0, 4, "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_that_leave_no_token(engine, alone, drafts, temperature):
    """A bias forbids all that the expression allows: at once, or from the third token on."""
    pytest.importorskip("llguidance")
    letters = dict.fromkeys(tokens_with(engine, "ab"), -mx.inf)
    at_once = SamplingParams(temperature=temperature, seed=1, regex="[ab]{5}", logit_bias=letters)
    result = among_good_ones(engine, alone, at_once, 1, drafts)
    assert (result.finish_reason, result.error, result.tokens) == ("error", NOTHING_ALLOWED, [])
    later = replace(at_once, regex="[xy]{2}[ab]{5}")
    result = among_good_ones(engine, alone, later, 0, drafts)
    assert (result.finish_reason, result.error) == ("error", NOTHING_ALLOWED)
    assert len(result.text) == 2 and set(result.text) <= set("xy")


def test_suppressed_tokens_that_leave_none(engine, alone, monkeypatch):
    pytest.importorskip("llguidance")
    digits = tokens_with(engine, "0123456789")
    defaults = replace(engine.defaults, suppress_token_ids=digits)
    engine = Engine(engine.target, engine.drafter, engine.text, defaults, num_draft_tokens=4)
    plain = [engine.generate(prompt, FREE, num_draft_tokens=0).tokens for prompt in PROMPTS]
    result = among_good_ones(engine, plain, SamplingParams(temperature=0.0, regex="[0-9]{3}"), 2)
    assert (result.finish_reason, result.error) == ("error", NOTHING_ALLOWED)


def test_a_bias_that_forbids_everything(engine, alone):
    nothing = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(4096), -mx.inf))
    result = among_good_ones(engine, alone, nothing, 0)
    assert (result.finish_reason, result.error, result.text) == ("error", NOTHING_ALLOWED, "")


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_limit_of_the_matcher_is_no_end(engine, alone, drafts, monkeypatch):
    """llguidance stops half way through an object: that is no JSON, and says so."""
    llguidance = pytest.importorskip("llguidance")
    usual, limits = llguidance.LLMatcher, llguidance.LLParserLimits(max_lexer_states=120)

    class Limited:
        grammar_from_json_schema = staticmethod(usual.grammar_from_json_schema)
        validate_grammar_with_warnings = staticmethod(usual.validate_grammar_with_warnings)

        def __new__(cls, tokenizer, grammar):
            return usual(tokenizer, grammar, limits=limits)

    monkeypatch.setattr(llguidance, "LLMatcher", Limited)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "string", "minLength": 50, "maxLength": 60}},
        "required": ["n"],
    }
    result = among_good_ones(engine, alone, SamplingParams(temperature=0.0, json_schema=schema), 1, drafts)
    assert result.finish_reason == "error" and "too many states" in result.error and "\n" not in result.error
    with pytest.raises(ValueError):
        json.loads(result.text)


class Breaks(Stairs):
    """Stairs that break: raises at the given call of `mask` or `advance` on the text itself, never on a copy."""

    def __init__(self, where: str, after: int):
        super().__init__()
        self.where, self.after = where, after

    def copy(self):
        return Stairs(self.step, self.advanced)

    def mask(self):
        if self.where == "mask" and self.advanced >= self.after:
            raise KeyError("a step is missing")
        return super().mask()

    def advance(self, token):
        if self.where == "advance" and self.advanced >= self.after:
            raise KeyError("a step is missing")
        super().advance(token)


@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("where, after, kept", [("mask", 0, 0), ("mask", 5, 5), ("advance", 0, 0), ("advance", 5, 5)])
def test_a_constraint_that_raises(where, after, kept, num_draft, accept):
    model = tiny.target("moe")
    batch = tiny.prompts(3)
    params = tiny.SAMPLED if accept == REJECTION else tiny.GREEDY
    constraints = [None, Breaks(where, after), Stairs()]
    drafting = Drafting(accept=accept)
    loop = tiny.begun(model, tiny.drafter(model), batch, params, constraints=constraints, drafting=drafting)
    done, texts, live = tiny.round_of(loop, num_draft), [[], [], []], [0, 1, 2]
    reasons = {}
    for _ in range(12):
        for name, tokens, error in zip(live, done.tokens, done.errors, strict=True):
            texts[name] += tokens
            if error is not None:
                reasons[name] = error
        stay = compact([name not in reasons for name in live])
        if len(stay) < len(live):
            live = [live[place] for place in stay]
            rules = Rules.of([params] * len(live), tiny.VOCAB)
            loop.arrange(stay, rules, guide=guide([constraints[name] for name in live], tiny.VOCAB))
        done = tiny.round_of(loop, num_draft)
    assert reasons == {1: "KeyError: 'a step is missing'"} and len(texts[1]) == kept
    assert [token % 7 for token in texts[2]] == [i % 7 for i in range(len(texts[2]))]
    if accept != REJECTION:
        plain, _ = tiny.decode(model, None, batch, 0, 12, constraints=[None, Stairs(), Stairs()])
        assert [texts[0][:12], texts[1], texts[2][:12]] == [plain[0], plain[1][:kept], plain[2]]


@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("where, after, kept", [("mask", 0, 0), ("advance", 0, 0), ("mask", 1, 1), ("advance", 1, 1)])
def test_a_constraint_that_raises_while_its_row_comes(where, after, kept, accept):
    """With the first token, which comes beside rows that decode, or in the row's first round: it alone ends, and the
    others do not notice.
    """
    model = tiny.target("moe")
    free, bound, broken = tiny.prompts(3)
    params = [tiny.GREEDY] * 3 if accept != REJECTION else [tiny.GREEDY, tiny.GREEDY, tiny.SAMPLED]
    rules = lambda *rows: Rules.of([params[row] for row in rows], tiny.VOCAB)  # noqa: E731
    constraints = [None, Stairs(), Breaks(where, after)]
    loop = tiny.begun(
        model, tiny.drafter(model), [free, bound], constraints=constraints[:2], drafting=Drafting(accept=accept)
    )
    texts = [list(tokens) for tokens in tiny.round_of(loop, 3).tokens]
    caches, hidden = prefill(model, [broken], 16)
    firsts = Firsts(hidden, [len(broken)], rules(2), guide=guide(constraints[2:], tiny.VOCAB))
    done = loop.step([3, 2], firsts)
    assert done.errors == [None, None]
    reason, first = "KeyError: 'a step is missing'", done.firsts.tokens[0]
    if not after:
        assert (done.firsts.errors, first) == ([reason], [])
    else:
        assert done.firsts.errors == [None] and [token % 7 for token in first] == [0]
        texts = [text + tokens for text, tokens in zip(texts, done.tokens, strict=True)]
        loop.arrange(
            [Joiner(caches[0].save(0), first[0]), 0, 1],
            rules(2, 0, 1),
            guide=guide([constraints[row] for row in (2, 0, 1)], tiny.VOCAB),
        )
        done = loop.step([1, 3, 3])
        assert done.errors == [reason, None, None] and done.tokens[0] == []
        loop.arrange([1, 2], rules(0, 1), guide=guide(constraints[:2], tiny.VOCAB))
        done = replace(done, tokens=done.tokens[1:])
    while min(map(len, texts)) < 12:
        texts = [text + tokens for text, tokens in zip(texts, done.tokens, strict=True)]
        done = loop.step([3, 3])
    plain, _ = tiny.decode(model, None, [free, bound], 0, 12, constraints=[None, Stairs()])
    assert [text[:12] for text in texts] == plain


def test_a_first_token_that_is_not_finite():
    """A staged prompt of which the model's scores are NaN ends, with its reason, beside a row that decodes."""
    model = tiny.target("moe")
    batch = tiny.prompts(2)
    loop = tiny.begun(model, tiny.drafter(model), batch[:1])
    text = list(tiny.round_of(loop, 3).tokens[0])
    rules = Rules.of([tiny.GREEDY] * 2, tiny.VOCAB)
    _, hidden = prefill(model, [batch[1]] * 2, 16)
    nan = mx.where(mx.array([[True], [False]]), mx.nan, hidden)
    done = loop.step([3], Firsts(nan, [len(batch[1])] * 2, rules))
    assert (done.errors, done.firsts.errors) == ([None], [NOT_FINITE, None])
    plain, _ = tiny.decode(model, None, batch, 0, 5)
    assert done.firsts.tokens == [[], plain[1][:1]] and done.firsts.drafted == [None, None]
    assert (text + done.tokens[0])[:2] == plain[0][:2]


# ---- text


class Panic(BaseException):
    """As what Rust libraries raise: no Exception."""


class Panics(Stairs):
    """Stairs of a library that panics in `where`."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def copy(self):
        return self

    def mask(self):
        if self.where == "mask":
            raise Panic("unreachable")
        return super().mask()

    def advance(self, token):
        if self.where == "advance":
            raise Panic("unreachable")
        super().advance(token)


def test_a_librarys_panic_is_its_rows_alone():
    rows = guide([Panics("mask"), Panics("advance"), Stairs()], tiny.VOCAB)
    assert rows.look([[], [0], [0]]).failures == {0: "Panic: unreachable"}
    assert rows.advance([[], [0], [0]]) == {1: (0, "Panic: unreachable")}


@pytest.mark.parametrize("kind", [UnicodeError, Panic])
@pytest.mark.parametrize("method", ["push", "finish"])
def test_a_text_stream_that_raises(engine, alone, method, kind, monkeypatch):
    usual, calls = getattr(Reply, method), []

    def broken(self, *token):
        if self._answer._stops._stop == ("never",) and (method == "finish" or calls.append(0) or len(calls) == 7):
            raise kind("half a\ncharacter")
        return usual(self, *token)

    monkeypatch.setattr(Reply, method, broken)
    result = among_good_ones(engine, alone, replace(FREE, stop=("never",), max_tokens=12), 1)
    assert (result.finish_reason, result.error) == ("error", f"{kind.__name__}: half a character")
    assert result.tokens == alone[1][: 7 if method == "push" else 12]
    assert engine.text.fast_tokenizer.decode(result.tokens).startswith(result.text.rstrip()) and result.text


# ---- scores that are not finite


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> Path:
    """A 4-bit toy of the E2B kind in its folder, with its drafter beside."""
    folder = tmp_path_factory.mktemp("toy")
    checkpoints.pair(folder, "E2B")
    return converted(folder)


def converted(folder: Path) -> Path:
    source = next(path for path in folder.iterdir() if "assistant" not in path.name)
    drafter = next(path for path in folder.iterdir() if "assistant" in path.name)
    for path, flags, out in ((source, ["-q"], folder / "toy"), (drafter, [], folder / "toy-assistant")):
        assert convert(["--hf-path", str(path), "--mlx-path", str(out), *flags]) == 0
    return folder / "toy"


def poisoned(folder: Path, where: str, out: Path) -> Path:
    """A copy of the folder with one NaN in one scale."""
    for name in ("toy", "toy-assistant"):
        shutil.copytree(folder.parent / name, out / name)
    [file] = (out / "toy").glob("*.safetensors")
    tensors = mx.load(str(file))
    name = next(name for name in tensors if where in name and name.endswith(".scales"))
    scales = np.array(tensors[name].astype(mx.float32))
    scales.flat[scales.size // 2] = np.nan
    tensors[name] = mx.array(scales).astype(tensors[name].dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    return out / "toy"


@pytest.mark.parametrize("where", ["layers.3.mlp.down_proj", "embed_tokens."])
def test_one_nan_in_one_scale(four_bits, where, tmp_path, capsys):
    """Every row ends at once, whatever is drafted; `verify` fails and says why."""
    folder = poisoned(four_bits, where, tmp_path)
    engine = load(str(folder), num_draft_tokens=3)
    for params in (FREE, replace(FREE, temperature=1.0, seed=3, logprobs=2)):
        for drafts in (0, 3):
            for result in engine.generate(PROMPTS, params, num_draft_tokens=drafts):
                assert (result.finish_reason, result.error, result.tokens) == ("error", NOT_FINITE, [])
    capsys.readouterr()
    quick = ["--max-tokens", "6", "--rows", "2", "--num-draft-tokens", "2", "--samples", "8"]
    assert verify.main(["--model", str(folder), *quick, "--json"]) == 1
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert not record["equal"] and all(NOT_FINITE in each for cell in record["cells"] for each in cell["errors"])
    assert record["same_distribution"] == {"1.0": None}
    assert verify.main(["--model", str(folder), *quick]) == 1
    assert f"prompt 1, plain, after 0 tokens: {NOT_FINITE}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["e2b", "moe"])
@pytest.mark.parametrize("num_draft", [0, 3])
def test_only_the_row_that_meets_the_nan_ends(kind, num_draft):
    """A token's own input (E2B), or one expert (MoE): rows that do not meet it say what they say without it."""
    model, batch = tiny.target(kind), tiny.prompts(8)
    good, _ = tiny.decode(model, None, batch, 0, 30)
    if kind == "e2b":
        every = [token for text in good for token in text]
        rare = min(sorted(set(every)), key=every.count)
        table = model.embed_tokens_per_layer.weight
        table[rare, 3] = mx.nan
    else:
        down = model.layers[4].experts.switch_glu.down_proj
        down.weight[6, 0, 0] = mx.nan
        down.derive()
    drafter = tiny.drafter(model, kind) if num_draft else None
    texts, errors = ended(model, drafter, batch, num_draft, 30)
    assert errors and set(errors.values()) == {NOT_FINITE} and any(len(text) > 1 for text in texts)
    for row, text in enumerate(texts):
        alone, failed = ended(model, drafter, [batch[row]], num_draft, 30)
        assert alone == [text] and (0 in failed) == (row in errors), row
        assert text == good[row][: len(text)] and (row in errors or len(text) == 30), row
        if kind == "e2b" and not num_draft:  # a draft that is refused was in the row's own cache, too
            own = batch[row] + good[row]
            assert (row in errors) == (rare in own[:-1])
            assert not text or rare not in own[: len(batch[row]) + len(text) - 1]


def ended(model, drafter, batch, num_draft: int, count: int) -> tuple[list[list[int]], dict[int, str]]:
    """Texts through the loop, where rows leave when they have `count` tokens or an error; the errors by row."""
    loop = tiny.begun(model, drafter, batch)
    texts, errors, live, done = [[] for _ in batch], {}, list(range(len(batch))), tiny.round_of(loop, num_draft)
    while True:
        for name, tokens, error in zip(live, done.tokens, done.errors, strict=True):
            texts[name] += tokens
            if error is not None and len(texts[name]) < count:
                errors[name] = error
        stay = compact([name not in errors and len(texts[name]) < count for name in live])
        if not stay:
            return [text[:count] for text in texts], errors
        if len(stay) < len(live):
            live = [live[place] for place in stay]
            loop.arrange(stay, Rules.of([tiny.GREEDY] * len(live), tiny.VOCAB))
        done = tiny.round_of(loop, num_draft)


@pytest.mark.parametrize("accept", ACCEPT)
@pytest.mark.parametrize("drafts", [4, "auto"])
def test_a_drafter_with_a_nan_changes_no_text(engine, accept, drafts, monkeypatch):
    """Its drafts are worthless, and that is all; also to who chooses their number by its confidences."""
    monkeypatch.setattr(Costs, "table", lambda *args: UNKNOWN)
    drafter = copy.deepcopy(engine.drafter)
    broken = Engine(engine.target, drafter, engine.text, engine.defaults, drafting=Drafting(accept=accept))
    drafter.norm.weight = drafter.norm.weight * mx.nan
    for params in (FREE, replace(FREE, temperature=1.0, seed=2)):
        results = broken.generate(PROMPTS, params, num_draft_tokens=drafts)
        assert all(result.finish_reason == "length" and result.error is None for result in results)
        if accept != REJECTION or not params.temperature:
            plain = engine.generate(PROMPTS, params, num_draft_tokens=0)
            assert [result.tokens for result in results] == [result.tokens for result in plain]


def test_the_first_bad_position_counts():
    assert sound([5, 6, 7], [1.0, 2.0, 3.0], []) == ([5, 6, 7], None)
    assert sound([5, 6, 7], [1.0, float("nan"), float("inf")], []) == ([5], NOT_FINITE)
    assert sound([5, 6, 7], [1.0, 2.0, 3.0], [0.0, 1.0, -float("inf")]) == ([5, 6], NOTHING_ALLOWED)
    assert sound([5], [1.0, float("nan")], [3.0, -float("inf")]) == ([5], None)  # of refused drafts nobody asks
