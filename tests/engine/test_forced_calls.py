"""Calls bound by grammars, on a trained pair: forced, strict, beside text and thoughts; with drafts as without.

The pair knows nothing of tools, so every call that it makes is a grammar's. Needs extra `grammar`.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from alike import alike
from trained import OF_MOE

pytest.importorskip("llguidance")

from mlx_gemma_mtp import SamplingParams, UserError, load

ASKED = ["What is the weather in Paris?", "def area(width, height):", "List the files, then read one."]


def tool(name: str, strict: bool = False, required=(), **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


WORD = {"type": "string", "minLength": 1, "maxLength": 3}
WEATHER = tool("weather", required=["city"], city=WORD, unit={"enum": ["C", "F"]})
READ = tool("read", True, ["path"], path=WORD, lines={"type": "array", "items": {"type": "boolean"}, "maxItems": 3})
POINT = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["x"]}
MOVE = tool("move", True, ["to"], to=POINT, note={"anyOf": [WORD, {"type": "null"}]}, sure={"type": "boolean"})
TOOLS = [READ, MOVE]


@pytest.fixture(scope="module")
def engine():
    return load(**OF_MOE, num_draft_tokens=4)


@pytest.fixture(scope="module")
def ids(engine):
    return engine.text.template.control


def alike_as_ids(engine, prompts, params, **options):
    """The results, the same for every draft length.

    Texts become ids without the tools, of which the pair understands nothing: prefilling their schemas takes most of
    the time.
    """
    prompts = [engine.text.encode(each) if isinstance(each, str) else each for each in prompts]
    return alike(engine, prompts, params, **options)


def fits(name: str, arguments: dict) -> bool:
    """A brute-force check of what the schemas above allow."""
    if name == "weather":
        return {"city"} <= arguments.keys() <= {"city", "unit"} and arguments.get("unit", "C") in ("C", "F")
    if name == "read":
        lines = arguments.get("lines", [])
        bools = len(lines) <= 3 and all(isinstance(line, bool) for line in lines)
        return {"path"} <= arguments.keys() <= {"path", "lines"} and bools
    known = name == "move" and {"to"} <= arguments.keys() <= {"to", "note", "sure"}
    return known and arguments["to"].keys() == {"x"} and arguments["to"]["x"] in range(100)


def check(result) -> None:
    """The reply ended of itself, and it is calls that fit their schemas and nothing else."""
    assert result.finish_reason == "tool_calls" and result.text == "" and result.tool_calls
    for call in result.tool_calls:
        assert call.repaired == call.faults == () and fits(call.name, call.arguments), call


@pytest.mark.parametrize(
    "choice, temperature",
    [("required", 0.0), ("required", 1.0), ({"type": "function", "function": {"name": "move"}}, 1.0)],
)
def test_forced_calls_fit_and_drafts_change_nothing(engine, choice, temperature):
    params = [SamplingParams(max_tokens=300, temperature=temperature, seed=seed) for seed in range(2)]
    results = alike_as_ids(
        engine, ASKED[:2], params, tools=TOOLS if choice == "required" else [MOVE], tool_choice=choice
    )
    for result in results:
        check(result)
    if choice != "required":
        assert {call.name for result in results for call in result.tool_calls} == {"move"}


def test_drafts_are_kept_within_calls(engine):
    params = SamplingParams(max_tokens=200, temperature=0.0)
    results = engine.generate(ASKED, params, tools=TOOLS, tool_choice="required")
    assert sum(result.stats.accepted for result in results) > 0


def test_drafts_that_rejection_accepts_follow_the_grammar_too():
    params = [SamplingParams(max_tokens=200, temperature=1.0, seed=seed) for seed in range(3)]
    engine = load(**OF_MOE, num_draft_tokens=3, accept="rejection")
    for result in engine.generate(ASKED, params, tools=TOOLS, tool_choice="required"):
        check(result)


def test_a_call_that_other_settings_forbid_ends_its_row_alone(engine, ids):
    forbidden = SamplingParams(max_tokens=60, temperature=0.0, logit_bias={ids["<|tool_call>"]: -np.inf})
    results = engine.generate(ASKED[:2], [forbidden, SamplingParams(max_tokens=60)], tools=[MOVE], tool_choice="move")
    assert results[0].finish_reason == "error" and "leave none in common" in results[0].error
    check(results[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_calls_or_one(engine, ids, temperature):
    """A bias keeps the reply from ending: then call follows upon call, unless one alone is wanted."""
    params = SamplingParams(max_tokens=110, temperature=temperature, seed=5, logit_bias={ids["<|tool_call>"]: 1e6})
    (result,) = alike_as_ids(engine, ASKED[:1], params, tools=[MOVE], tool_choice="required")
    assert result.finish_reason == "length" and len(result.tool_calls) > 1
    assert all(fits(call.name, call.arguments) for call in result.tool_calls)
    (result,) = alike_as_ids(engine, ASKED[:1], params, tools=[MOVE], tool_choice="required", parallel_tool_calls=False)
    check(result)
    assert len(result.tool_calls) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strict_tools_bind_the_calls_that_come(engine, ids, temperature):
    """Free text, until a bias, which is low enough to leave some, brings a call; then free text once more."""
    bias = {ids["<|tool_call>"]: 14.0}
    params = [SamplingParams(max_tokens=40, temperature=temperature, seed=seed, logit_bias=bias) for seed in range(3)]
    results = alike_as_ids(engine, ASKED, params, tools=TOOLS)
    calls = [call for result in results for call in result.tool_calls]
    assert calls and all(fits(call.name, call.arguments) for call in calls)
    assert any(result.text for result in results)


def test_without_strict_tools_calls_are_free(engine, ids):
    params = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={ids["<|tool_call>"]: 1e6})
    assert engine.generate(ASKED[0], params, tools=[WEATHER]).tokens == [ids["<|tool_call>"]] * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_calls_come_in_the_place_of_a_bound_text(engine, ids, temperature):
    """The bias of one row opens a call; the others follow their expression."""
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=6, regex="[ab]{4}")
    calling = replace(params, logit_bias={ids["<|tool_call>"]: 1e6})
    results = alike_as_ids(
        engine, ASKED, [params, calling, replace(params, seed=7)], tools=[WEATHER, MOVE], parallel_tool_calls=False
    )
    check(results[1])
    for result in (results[0], results[2]):
        assert re.fullmatch("[ab]{4}", result.text) and result.finish_reason == "stop" and not result.tool_calls


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thought_comes_before_a_forced_call(engine, ids, temperature):
    """One that the reply opens, one that the prompt opened, and none; all within one batch."""
    opening, closing = ids["<|channel>"], ids["<channel|>"]
    open_thought = engine.text.fast_tokenizer.encode("<|channel>thought\n", add_special_tokens=False)
    prompts = [
        engine.text.encode(ASKED[0], thinking=True),
        [*engine.text.encode(ASKED[1], thinking=True), *open_thought],
        engine.text.encode(ASKED[2]),
    ]
    params = SamplingParams(
        max_tokens=150, temperature=temperature, seed=8, thinking=True, thinking_budget=6, logit_bias={closing: -1e6}
    )
    every = [
        replace(params, logit_bias={opening: 1e6, closing: -1e6}),
        params,
        replace(params, thinking=False, thinking_budget=None),
    ]
    results = alike_as_ids(engine, prompts, every, tools=[MOVE], tool_choice="move")
    for result in results:
        check(result)
    assert results[0].tokens[0] == opening and results[0].tokens[7] == closing
    assert results[1].tokens[6] == closing and closing not in results[2].tokens
    assert results[1].reasoning and not results[2].reasoning


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_binds_what_follows_a_thought_that_the_prompt_opened(engine, ids, temperature):
    """With a budget, and without one, where the thought ends by itself; `thinking` may be off, as with ids of one's
    own. A thought that the prompt has closed is none.
    """
    closing, tokenizer = ids["<channel|>"], engine.text.fast_tokenizer
    start = engine.text.encode(ASKED[0], thinking=True)
    opened = [*start, *tokenizer.encode("<|channel>thought\n", add_special_tokens=False)]
    closed = [*start, *tokenizer.encode("<|channel>thought\n<channel|>", add_special_tokens=False)]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    params = SamplingParams(max_tokens=200, temperature=temperature, seed=9, json_schema=schema)
    budget = replace(params, thinking=True, thinking_budget=5, logit_bias={closing: -1e6})
    own_end = replace(params, logit_bias={closing: 1e6})
    results = alike_as_ids(engine, [opened, opened, closed], [budget, own_end, params])
    for result in results:
        assert result.finish_reason == "stop" and set(json.loads(result.text)) == {"a"}
    assert results[0].tokens[5] == results[1].tokens[0] == closing and closing not in results[2].tokens


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_many_forced_calls(engine, temperature):
    rng = np.random.default_rng(0)
    for _ in range(12):
        some = [[WEATHER, READ, MOVE][i] for i in rng.permutation(3)[: rng.integers(1, 4)]]
        seeds = [int(seed) for seed in rng.integers(0, 1000, 8)]
        params = [SamplingParams(max_tokens=400, temperature=temperature, seed=seed) for seed in seeds]
        for result in alike_as_ids(engine, (ASKED * 3)[:8], params, tools=some, tool_choice="required"):
            check(result)


@pytest.mark.parametrize(
    "strict, schema, message",
    [
        (True, {"not": {"type": "null"}}, "the tool 'f': parameters.a has 'not'"),
        (False, {"type": "wat"}, "'wat'"),
    ],
)
def test_schemas_that_bind_nothing_are_named(engine, strict, schema, message):
    with pytest.raises(UserError) as raised:
        engine.stream(ASKED[0], SamplingParams(), tools=[tool("f", strict, a=schema)], tool_choice="required")
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("bound", ["json_schema", "regex", "grammar"])
def test_a_forced_call_and_a_bound_text_exclude_each_other(engine, bound):
    source = {"json_schema": "{}", "regex": "a", "grammar": 'start: "a"'}[bound]
    with pytest.raises(UserError, match=f"{bound} is given and tool_choice forces a call"):
        engine.stream(ASKED[0], SamplingParams(**{bound: source}), tools=[READ], tool_choice="read")
