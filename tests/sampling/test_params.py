"""Settings are checked when they are made, with one line that names the value."""

import copy
import math
import pickle
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models.config import GenerationDefaults
from mlx_gemma_mtp.sampling.distribution import Distribution, Rules, sample
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.sampling.penalties import TokenCounts


def test_settings_come_from_the_folder_where_none_are_given():
    defaults = GenerationDefaults.from_dict({"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 64})
    p = SamplingParams(top_k=5).resolved(defaults)
    assert (p.temperature, p.top_p, p.top_k) == (0.7, 0.95, 5) and p.seed is not None
    assert SamplingParams(top_k=-1).resolved(defaults).top_k == -1
    greedy = SamplingParams().resolved(GenerationDefaults.from_dict({"do_sample": False, "temperature": 0.7}))
    assert (greedy.temperature, greedy.top_k) == (0, -1)


def nested(depth: int) -> dict:
    """An object within an object, so many times."""
    found: dict = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"max_tokens": 2.5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"logprobs": -1},
        {"stop_repetition": 3},
        {"stop_repetition": 8.0},
        {"stop_repetition": True},
        {"logprobs": 21},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
        {"thinking_budget": -1, "thinking": True},
        {"thinking_budget": 5},
        {"regex": "a", "grammar": "b"},
        {"ignore_eos": True, "json_schema": "{}"},
        {"stop": ("",)},
        {"stop": "text"},
        {"stop": b"text"},
        {"stop": 5},
        {"stop": (5,)},
        {"stop": (b"a",)},
        {"stop": ("a", None)},
        {"stop": {"a": 1}},
        {"stop": np.array(1)},
        {"stop": np.array("a")},
        {"stop": mx.array(1)},
        {"stop": [10**5000]},
        {"temperature": True},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"temperature": np.array([0.5, 0.5])},
        {"temperature": np.float32(math.inf)},
        {"temperature": 1j},
        {"top_p": True},
        {"top_k": True},
        {"top_k": 64.0},
        {"max_tokens": None},
        {"max_tokens": True},
        {"max_tokens": "5"},
        {"min_p": "0"},
        {"repetition_penalty": 1e-46},
        {"repetition_penalty": 1e39},
        {"presence_penalty": 1e39},
        {"frequency_penalty": -1e39},
        {"logit_bias": {1: 1e39}},
        {"logit_bias": {1: -1e39}},
        {"logit_bias": {1: "x"}},
        {"logit_bias": {1: None}},
        {"logit_bias": {1: True}},
        {"logit_bias": {1: 10**400}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {1.0: 1.0}},
        {"logit_bias": {None: 1.0}},
        {"logit_bias": [5]},
        {"logit_bias": "5"},
        {"logprobs": True},
        {"logprobs": 2.0},
        {"seed": 0.0},
        {"seed": 10**5000},
        {"ignore_eos": "no"},
        {"ignore_eos": None},
        {"thinking": 1},
        {"thinking_budget": 2.0, "thinking": True},
        {"thinking_budget": 10**5000},
        {"thinking_budget": 10**400},
        {"max_tokens": -(10**5000)},
        {"max_tokens": Fraction(10**5000, 3)},
        {"logit_bias": {10**5000: 1}},
        {"logit_bias": {10**400: 1}},
        {"logit_bias": {2**31: 1}},
        {"json_schema": '{"a":NaN}'},
        {"json_schema": '{"a":[-Infinity]}'},
        {"json_schema": '{"a":1e999}'},
        {"json_schema": {"a": math.inf}},
        {"json_schema": {"a": 10**5000}},
        {"json_schema": '{"a":' + "1" * 5000 + "}"},
        {"json_schema": '{"type":"object","a":"\\ud800"}'},
        {"json_schema": {"const": "\ud800"}},
        {"json_schema": {"\ud800": 1}},
        {"json_schema": {"pattern": "\ud800"}},
        {"json_schema": "[" * 100_000},
        {"json_schema": '{"a":' * 100_000},
        {"json_schema": {"a": nested(100_000)}},
        {"json_schema": "[1]"},
        {"json_schema": "null"},
        {"json_schema": ""},
        {"json_schema": 5},
        {"json_schema": ["object"]},
        {"json_schema": {"type": object()}},
        {"json_schema": {"minimum": math.nan}},
        {"json_schema": "\udcff"},
        {"regex": b"a"},
        {"regex": {"a": 1}},
        {"regex": "\udcff"},
        {"grammar": 5},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))) as raised:
        SamplingParams(**bad)
    assert "expected" in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_numbers_are_kept_as_pythons():
    """numpy's are accepted, and nothing after this sees them."""
    params = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        top_p=np.float64(0.9),
        top_k=np.uint8(5),
        min_p=Fraction(1, 8),
        presence_penalty=np.float16(0.5),
        repetition_penalty=2,
        logit_bias={np.int64(5): np.float32(1), 6: -np.inf, 7: np.float32(-np.inf)},
        logprobs=np.int32(2),
        seed=np.uint64(7),
    )
    numbers = [v for v in vars(params).values() if isinstance(v, (int, float, np.generic)) and not isinstance(v, bool)]
    assert {type(n) for n in (*numbers, *params.logit_bias, *params.logit_bias.values())} == {int, float}
    assert (params.max_tokens, params.temperature, params.top_k, params.min_p, params.seed) == (3, 0.5, 5, 0.125, 7)
    assert params.logit_bias == {5: 1.0, 6: -math.inf, 7: -math.inf}


def test_what_is_meant_is_taken():
    assert SamplingParams(stop=None).stop == () == SamplingParams(stop=[]).stop
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") == SamplingParams(stop=(x for x in "ab")).stop
    assert SamplingParams(logit_bias=None).logit_bias == {}
    assert SamplingParams(json_schema={"type": "object"}).json_schema == '{"type": "object"}'
    assert SamplingParams(max_tokens=10**5000).max_tokens == 2**31 - 1
    assert SamplingParams(thinking=True, thinking_budget=10**5000).thinking_budget == 2**31 - 1


def test_what_the_folder_says_fills_what_is_not_said():
    defaults = GenerationDefaults.from_dict({"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.2})
    filled, said = SamplingParams().resolved(defaults), SamplingParams(min_p=0.0, repetition_penalty=1)
    assert (filled.min_p, filled.repetition_penalty, filled.penalised) == (0.1, 1.2, True)
    assert (said.resolved(defaults).min_p, said.resolved(defaults).penalised) == (0.0, False)
    plain = SamplingParams().resolved(GenerationDefaults.from_dict({"do_sample": True}))
    assert (plain.min_p, plain.repetition_penalty, plain.penalised) == (0.0, 1.0, False)


def test_a_request_cannot_be_changed_from_outside():
    schema, biases, stops = {"type": "object", "properties": {"a": {}}}, {1: 2.0}, ["a"]
    params = SamplingParams(json_schema=schema, logit_bias=biases, stop=stops)
    before, text = copy.deepcopy(params), repr(params)
    schema["properties"]["b"] = biases[2] = 3.0
    stops.append("b")
    assert params == before and repr(params) == text and hash(params) == hash(before)
    assert pickle.loads(pickle.dumps(params)) == params
    assert len({SamplingParams(), SamplingParams(), SamplingParams(seed=1)}) == 2


EXTREMES = {
    "temperature": [0, 1e-46, 1e-40, 1e-9, 1e-7, 1e-6, 1e-5, 1e6, 1e15, 1e16, 1e30, 1e38, 1e39],
    "top_p": [1e-300, 1e-50, 1e-40, 1e-8, 1 - 1e-9, 1.0],
    "min_p": [1e-50, 1e-40, 1 - 1e-12, 1.0],
    "top_k": [1, 2**24, 2**31 - 1, 2**31, 2**40, 2**70],
    "repetition_penalty": [1e-46, 1e-40, 1e-15, 1e-9, 1e15, 1e30, 1e39],
    "presence_penalty": [-1e39, -1e15, 1e-50, 1e15, 1e39],
    "frequency_penalty": [-1e39, -1e15, 1e-50, 1e15, 1e39],
    "logit_bias": [{3: bias} for bias in (-math.inf, -1e39, -1e15, 1e-50, 1e15, 1e39)],
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e15])
@pytest.mark.parametrize("top_k", [-1, 4])
def test_extremes_work_or_are_refused(name, temperature, top_k):
    """No setting that is accepted gives a row without a distribution: each token drawn has a finite score."""
    common = {"temperature": temperature, "top_k": top_k, "top_p": 0.9, "seed": 1}
    mixed = common | {"frequency_penalty": -1e15, "logit_bias": {2: 1e15, 4: -1e15}, "repetition_penalty": 1e-15}
    mx.random.seed(0)
    logits = mx.random.normal((1, 64, 32)) * 40
    for base in (common, mixed):
        for value in EXTREMES[name]:
            try:
                params = SamplingParams(**base | {name: value})
            except UserError:
                continue
            if name == "temperature" and value < 1e-6:
                assert params.temperature == 0
            rules = Rules.of([params], 32)
            token_counts = rules.penalties and TokenCounts(
                mx.arange(32)[None], mx.zeros((1, 32), mx.bool_), mx.full((1, 1, 32), 100_000, mx.int32), 32
            )
            drawn = Distribution.of(logits, rules, 30.0, token_counts=token_counts)
            if drawn.scores is not None:
                scores = np.array(drawn.scores)
                assert not np.isnan(scores).any() and np.isfinite(scores.max(axis=-1)).all(), (base, value)
            picked = np.array(sample(logits, rules, mx.arange(64)[None], 30.0, token_counts=token_counts))
            assert ((picked >= 0) & (picked < 32)).all()
            if value == {3: -math.inf}:
                assert (picked != 3).all()
