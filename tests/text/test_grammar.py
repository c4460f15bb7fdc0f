"""JSON schemas, expressions and grammars with MTP: valid, and the same text as without. Needs extra `grammar`."""

import json
import re

import pytest

pytest.importorskip("llguidance")

from benchmarks.schemas import schema_of
from mlx_gemma_mtp import SamplingParams, UserError, generate, load

PROMPTS = ["Describe the function open().", "def area(width, height):"]
GREEDY = {"max_tokens": 120, "temperature": 0.0}


@pytest.fixture(scope="module")
def engine():
    return load(num_draft_tokens=4)


def valid(value, schema: dict) -> bool:
    """A brute-force validator of what `schema_of` writes."""
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    if "const" in schema:
        return value == schema["const"]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if value is None or isinstance(value, bool):
        return ("null" if value is None else "boolean") in kinds
    if isinstance(value, int):
        return "integer" in kinds and schema["minimum"] <= value <= schema["maximum"]
    if isinstance(value, str):
        return "string" in kinds and len(value) <= schema["maxLength"]
    if isinstance(value, list):
        small = "array" in kinds and schema["minItems"] <= len(value) <= schema["maxItems"]
        return small and all(valid(each, schema["items"]) for each in value)
    known = "object" in kinds and set(schema["required"]) <= value.keys() <= schema["properties"].keys()
    return known and all(valid(each, schema["properties"][name]) for name, each in value.items())


def test_the_validator_refuses():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 3}}, "required": ["a"]}
    assert valid({"a": 3}, schema)
    assert not any(
        valid(value, schema) for value in ({"a": 4}, {}, {"a": "3"}, {"a": 1, "b": 1}, [1], None, {"a": True})
    )


def check_schemas(engine, seeds, temperature: float) -> tuple[float, float]:
    """All valid and equal to the text without drafts; tokens a round with and without."""
    rounds = {0: [0, 0], 4: [0, 0]}
    for start in range(0, len(seeds), 8):
        some = seeds[start : start + 8]
        params = [
            SamplingParams(max_tokens=400, temperature=temperature, seed=seed, json_schema=schema_of(seed))
            for seed in some
        ]
        texts = {}
        for drafts in (0, 4):
            results = engine.generate([PROMPTS[seed % 2] for seed in some], params, num_draft_tokens=drafts)
            texts[drafts] = [(r.text, r.finish_reason) for r in results]
            rounds[drafts][0] += sum(r.stats.accepted + r.stats.rounds for r in results)
            rounds[drafts][1] += sum(r.stats.rounds for r in results)
        assert texts[0] == texts[4]
        for seed, (text, reason) in zip(some, texts[4], strict=True):
            assert reason == "stop" and valid(json.loads(text), schema_of(seed)), (seed, text)
    return tuple(tokens / count for tokens, count in (rounds[0], rounds[4]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_schemas_hold_and_drafts_change_nothing(engine, temperature):
    plain, drafted = check_schemas(engine, list(range(12)), temperature)
    assert plain == 1 and drafted > 1


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hundred_schemas(engine, temperature, capsys):
    plain, drafted = check_schemas(engine, list(range(100)), temperature)
    with capsys.disabled():
        print(f"\ntemperature {temperature}: tokens a round {plain:.2f} without drafts, {drafted:.2f} with 4")


@pytest.mark.parametrize(
    "constraint, pattern",
    [
        ({"regex": r"[a-c]{3}-\d{4}"}, r"[a-c]{3}-\d{4}"),
        ({"grammar": 'start: "yes" | "no" | "maybe " /[0-9]+/'}, r"yes|no|maybe \d+"),
        ({"json_schema": '{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}'}, r"\[.*\]"),
    ],
)
def test_other_grammars(engine, constraint, pattern):
    params = SamplingParams(**GREEDY, **constraint)
    plain, drafted = (engine.generate(PROMPTS[0], params, num_draft_tokens=k) for k in (0, 3))
    assert plain.tokens == drafted.tokens and re.fullmatch(pattern, plain.text), plain.text


MARKED = 'a <turn|> b<|channel>thought <|"|>'


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": json.dumps({"type": "object", "properties": {"note": {"const": MARKED}}, "required": ["note"],
                                    "additionalProperties": False})},
        {"json_schema": '{"enum": ["x \\u003c|channel>y"]}'},
        {"regex": r"ab <\|channel>[c]<[t]urn\|>"},
        {"grammar": 'start: "x<turn|>" "y"'},
    ],
    ids=lambda each: next(iter(each)),
)  # fmt: skip
def test_names_of_control_tokens_are_text_in_a_grammar(engine, constraint):
    """What a grammar forces is spelled out; a control token is none of its text, and does not stand for its name."""
    result = engine.generate("x", SamplingParams(max_tokens=96, temperature=0.0, **constraint))
    assert result.finish_reason == "stop", result.error
    if "json_schema" in constraint:
        expected = {"note": MARKED} if "note" in constraint["json_schema"] else "x <|channel>y"
        assert json.loads(result.text) == expected
    else:
        assert result.text == ("ab <|channel>c<turn|>" if "regex" in constraint else "x<turn|>y")
    assert not set(result.tokens) & set(engine.text.template.control.values())


def test_constrained_and_free_rows_share_a_batch(engine):
    """Each row is as alone; the constrained one leaves first."""
    every = [SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), SamplingParams(**GREEDY, regex="[ab]{5}")]
    together = engine.generate([PROMPTS[1], PROMPTS[0]], every)
    alone = [engine.generate(p, s).tokens for p, s in zip((PROMPTS[1], PROMPTS[0]), every, strict=True)]
    assert [r.tokens for r in together] == alone and re.fullmatch("[ab]{5}", together[1].text)
    assert len(together[0].tokens) == 40


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_thought_may_come_before_the_reply(engine, drafts):
    """The opening token is forced by its bias; after five tokens the thought is closed and the schema begins."""
    opening, closing = (engine.text.token_id(name, "a thought") for name in ("<|channel>", "<channel|>"))
    params = SamplingParams(
        max_tokens=80, temperature=0.0, thinking=True, thinking_budget=5, regex="[ab]{4}", logit_bias={opening: 1e6}
    )
    tokens = engine.generate(PROMPTS[0], params, num_draft_tokens=drafts).tokens
    assert tokens[0] == opening and tokens[6] == closing and closing not in tokens[1:6]
    assert re.fullmatch("[ab]{4}", engine.text.fast_tokenizer.decode(tokens[7:]))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"json_schema": '{"type": "integer", "minimum": 5, "maximum": 3}'}, "Unsatisfiable schema"),
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": '{"$ref":"#"}'}, "no text satisfies it"),
        ({"regex": r"[^\s\S]"}, "no text satisfies it"),
        ({"grammar": "start: start"}, "no text satisfies it"),
        ({"grammar": "start: a\na: b\nb: a"}, "no text satisfies it"),
        ({"grammar": ""}, "cannot be used"),
        ({"grammar": "start: " + "(" * 5000}, "cannot be used"),
        ({"json_schema": '{"a":' * 500 + "1" + "}" * 500}, "cannot be used"),
        ({"regex": "[a-"}, "unclosed character class"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ],
)
def test_grammars_that_cannot_be_used(engine, bad, message):
    with pytest.raises(UserError) as raised:
        engine.generate(PROMPTS[0], SamplingParams(**GREEDY, **bad))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("drafts", ["auto", "2"])
def test_the_command_line_takes_schemas_from_files(tmp_path, capsys, drafts):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema_of(3)))
    options = ["--max-tokens", "300", "--temp", "0", "--json-schema", str(path), "--num-draft-tokens", drafts]
    assert generate.main(["--prompt", PROMPTS[0], *options]) == 0
    out, err = capsys.readouterr()
    assert valid(json.loads(out), schema_of(3))
    assert drafts == "auto" or "the same text" in err  # the speed-up that the bundled model shows
    assert "ANOTHER TEXT" not in err


def test_the_command_line_refuses_an_impossible_schema(capsys):
    assert generate.main(["--prompt", PROMPTS[0], "--json-schema", '{"type": "wat"}']) == 2
    assert "Invalid type: wat" in capsys.readouterr().err
