"""Tools in Engine.generate: what may be called, what is refused, thoughts that the prompt opens. Without grammars."""

import shutil
from dataclasses import replace

import pytest
from alike import alike
from trained import OF_MOE

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine.arguments import tools_of
from mlx_gemma_mtp.engine.constraints import Calls, Constraints
from mlx_gemma_mtp.files.hub import DEMO
from mlx_gemma_mtp.speculative.guide import allows
from mlx_gemma_mtp.text.encode import Text
from mlx_gemma_mtp.text.tool_choice import ToolChoice

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
ASKED = "What is the weather in Paris?"
CALLED = [
    {"role": "user", "content": ASKED},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
    },
    {"role": "tool", "name": "get_weather", "content": "15 degrees"},
]
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}
SHORT = SamplingParams(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def engine():
    return load(**OF_MOE, num_draft_tokens=4)


@pytest.fixture(scope="module")
def ids(engine):
    """The ids of control tokens by their names."""
    return engine.text.template.control


def written(engine, call: str) -> list[int]:
    return engine.text.fast_tokenizer.encode(call, add_special_tokens=False)


def test_tools_reach_the_template(engine):
    with_tools = engine.text.encode(ASKED, tools=[WEATHER])
    result = engine.generate(ASKED, SHORT, tools=[WEATHER])
    assert result.stats.prompt_tokens == len(with_tools) > len(engine.text.encode(ASKED))
    assert engine.generate(ASKED, SHORT, tools=[WEATHER], tool_choice="none").stats.prompt_tokens == len(with_tools)
    assert engine.generate(ASKED, SHORT, tools=[]).tokens == engine.generate(ASKED, SHORT).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_none_forbids_calls(engine, ids, temperature):
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=1, logit_bias={ids["<|tool_call>"]: 1e6})
    for tools in ([WEATHER], None):
        for result in alike(engine, [ASKED, "def area("], params, tools=tools, tool_choice="none"):
            assert ids["<|tool_call>"] not in result.tokens and result.tool_calls == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_call_ends_a_reply_where_no_other_may_follow(engine, ids, temperature):
    """A bias writes both tokens of a call at once: behind the closing one the text ends."""
    opening, closing = ids["<|tool_call>"], ids["<tool_call|>"]
    params = SamplingParams(
        max_tokens=12, temperature=temperature, seed=1, logit_bias={opening: 1e6, closing: 2e6}, top_k=1
    )
    (result,) = alike(engine, [ASKED], params, tools=[WEATHER], parallel_tool_calls=False)
    assert closing in result.tokens and opening not in result.tokens  # the closing token alone opens nothing
    params = replace(params, logit_bias={opening: 1e6})
    (result,) = alike(engine, [ASKED], params, tools=[WEATHER], parallel_tool_calls=False)
    assert result.tokens == [opening] * 12  # within a call nothing is bound


def opened(engine) -> list[int]:
    """A prompt that ends within a thought, as ids."""
    return [*engine.text.encode(ASKED, thinking=True), *written(engine, "<|channel>thought\n")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["ids", "messages"])
def test_a_thought_that_the_prompt_opened_has_a_budget(engine, ids, kind, temperature):
    """As behind a tool's result, where the template opens it; a free row beside it."""
    opening, closing = ids["<|channel>"], ids["<channel|>"]
    prompt = opened(engine) if kind == "ids" else CALLED
    budget = SamplingParams(
        max_tokens=20, temperature=temperature, seed=2, thinking=True, thinking_budget=5, logit_bias={closing: -1e6}
    )
    free = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    result, _ = alike(engine, [prompt, "def area("], [budget, free])
    assert result.tokens[5] == closing and result.tokens.count(closing) == 1 and opening not in result.tokens
    assert result.reasoning.strip() == engine.text.fast_tokenizer.decode(result.tokens[:5]).strip()
    (result,) = alike(engine, [prompt], replace(budget, thinking_budget=0))
    assert result.tokens[0] == closing and result.reasoning == ""


def test_no_thought_is_opened_on_a_budget_of_zero(engine, ids):
    params = SamplingParams(
        max_tokens=8, temperature=0.0, thinking=True, thinking_budget=0, logit_bias={ids["<|channel>"]: 1e6}
    )
    assert ids["<|channel>"] not in engine.generate(ASKED, params).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thought_with_a_budget_holds_no_call(engine, ids, temperature):
    """Closing it amid a call would spoil the call. Without tools the token is text like any other."""
    opening, call, closing = ids["<|channel>"], ids["<|tool_call>"], ids["<channel|>"]
    params = SamplingParams(
        max_tokens=8,
        temperature=temperature,
        seed=4,
        thinking=True,
        thinking_budget=3,
        logit_bias={opening: 2e6, call: 1e6},
    )
    (result,) = alike(engine, [ASKED], params, tools=[WEATHER])
    assert result.tokens[0] == opening and call not in result.tokens[:4] and result.tokens[4:6] == [closing, call]
    (result,) = alike(engine, [opened(engine)], replace(params, logit_bias={call: 1e6}))
    assert result.tokens[:4] == [call] * 3 + [closing]


def text_without(tmp_path, *tokens: str) -> Text:
    """A tokenizer whose vocabulary spells these tokens in another way."""
    folder = tmp_path / "target"
    shutil.copytree(DEMO / "target", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for token in tokens:
            text = text.replace(f'"{token}"', f'"{token.replace("l", "L")}"')
        (folder / name).write_text(text)
    return Text(folder, 4096)


def test_a_vocabulary_without_thoughts(tmp_path):
    """A budget is refused in a line; a bound reply simply has no thought before it."""
    text = text_without(tmp_path, "<|channel>", "<channel|>")
    constraints, no_calls = Constraints(text, 4096, [1, 6]), Calls(None, ToolChoice())
    with pytest.raises(UserError, match=r"no token '<\|channel>', which a thinking budget needs"):
        constraints.of(SamplingParams(thinking=True, thinking_budget=3), no_calls, False)
    assert constraints.of(SamplingParams(thinking=True), no_calls, False) is None
    barred = constraints.of(SamplingParams(thinking=True), Calls(None, ToolChoice(barred=True)), False)
    assert not allows(barred.mask(), text.template.control["<|tool_call>"])


def test_a_vocabulary_without_calls(tmp_path):
    text = text_without(tmp_path, "<|tool_call>")
    constraints = Constraints(text, 4096, [1, 6])
    tools, choice = tools_of([WEATHER], "required", True)
    with pytest.raises(UserError, match=r"no token '<\|tool_call>', which a bound call of a tool needs"):
        constraints.calls(tools, choice, bound=False)
    assert constraints.of(SHORT, Calls(None, ToolChoice(barred=True)), False) is None
    assert constraints.of(SHORT, Calls(*tools_of([WEATHER], None, False)), False) is None


def test_what_the_choice_means():
    names = ("a", "b")
    assert ToolChoice.of(None, names) == ToolChoice.of("auto", names) == ToolChoice(names)
    assert ToolChoice.of("none", names) == ToolChoice.of("none", ()) == ToolChoice(barred=True)
    assert ToolChoice.of("required", names) == ToolChoice(names, forced=True)
    for named in ("b", {"type": "function", "function": {"name": "b"}}, {"type": "function", "name": "b"}):
        assert ToolChoice.of(named, names, several=False) == ToolChoice(("b",), forced=True, several=False)


@pytest.mark.parametrize("flat", [True, False], ids=["of responses", "of chats"])
def test_some_tools_are_allowed(flat):
    """OpenAI's object of allowed tools, in both forms; calls are bound, so that no other tool is called."""
    named = {"type": "function", "name": "b"} if flat else {"type": "function", "function": {"name": "b"}}

    def allowed(mode):
        some = {"mode": mode, "tools": [named]}
        return {"type": "allowed_tools", **(some if flat else {"allowed_tools": some})}

    assert ToolChoice.of(allowed("auto"), ("a", "b")) == ToolChoice(("b",))
    assert ToolChoice.of(allowed("required"), ("a", "b")) == ToolChoice(("b",), forced=True)
    tools = [{"name": "a"}, {"name": "b"}]
    assert Calls(*tools_of(tools, allowed("auto"), True)).strict and not Calls(*tools_of(tools, "auto", True)).strict
    assert not Calls(*tools_of(tools[1:], allowed("auto"), True)).strict


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tools": [WEATHER], "tool_choice": "c"}, "tool_choice names 'c', expected 'auto', 'none', 'required', or"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice is {'type': 'function'}, expected"),
        ({"tools": [WEATHER], "tool_choice": {"type": "custom", "name": "x"}}, "tool_choice is"),
        ({"tools": [WEATHER], "tool_choice": 5}, "tool_choice is 5, expected 'auto'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "expected the mode 'auto' or 'required', and"),
        ({"tools": [WEATHER], "tool_choice": ALLOWED}, "tool_choice names 'now', expected"),
        ({"tool_choice": ALLOWED}, "tool_choice is {'type': 'allowed_tools'"),
        ({"tool_choice": "required"}, "tool_choice is 'required' without tools"),
        ({"tools": [], "tool_choice": "get_weather"}, "tool_choice is 'get_weather' without tools"),
        ({"tools": [WEATHER], "parallel_tool_calls": "no"}, "parallel_tool_calls is 'no', expected True or False"),
        ({"allow_special": 1}, "allow_special is 1, expected True or False"),
        ({"continue_final_message": None}, "continue_final_message is None, expected True or False"),
        ({"tools": [WEATHER], "chat_template": False}, "tools is given without messages"),
        ({"continue_final_message": True}, "the last message has the role 'user'"),
    ],
)
def test_options_that_cannot_be_meant(engine, options, message):
    with pytest.raises(UserError) as raised:
        engine.stream(ASKED, SHORT, **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "params, options, message",
    [
        ({"ignore_eos": True}, {"parallel_tool_calls": False}, "ignore_eos is set and parallel_tool_calls is False"),
        ({"ignore_eos": True}, {"tool_choice": "required"}, "ignore_eos is set and tool_choice forces a call"),
        ({"regex": "a"}, {"tool_choice": "required"}, "regex is given and tool_choice forces a call"),
    ],
)
def test_settings_that_exclude_each_other(params, options, message):
    tools, choice = tools_of([WEATHER], options.get("tool_choice"), options.get("parallel_tool_calls", True))
    with pytest.raises(UserError, match=message):
        Constraints(None, 4096, [1]).of(SamplingParams(**params), Calls(tools, choice), False)


def test_the_assistants_last_message_goes_on(engine):
    messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "The weather in"}]
    raw = engine.text.encode(messages, continue_final_message=True)
    result = engine.generate(messages, SHORT, continue_final_message=True)
    assert result.stats.prompt_tokens == len(raw) and result.tokens == engine.generate(raw, SHORT).tokens


def test_control_strings_count_where_they_are_allowed(engine):
    said = "a<turn|>b"
    text, special = (engine.generate(said, SHORT, allow_special=each).stats.prompt_tokens for each in (False, True))
    assert special == len(engine.text.encode(said, allow_special=True)) < text


def test_ids_are_taken_as_if_they_held_the_tools(engine, ids):
    prompt = engine.text.encode(ASKED, tools=[WEATHER])
    params = replace(SHORT, logit_bias={ids["<|tool_call>"]: 1e6})
    options = {"tools": [WEATHER], "tool_choice": "none"}
    assert engine.generate(prompt, params, **options).tokens == engine.generate(ASKED, params, **options).tokens
