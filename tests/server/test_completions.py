"""Text completions through the real openai client."""

from __future__ import annotations

import pytest
from serving import NAME, Scripted, events, ids_of, post, serving

from mlx_gemma_mtp import SamplingParams

GIVEN = {"model": NAME, "max_tokens": 10, "temperature": 0}


@pytest.mark.parametrize("prompt", ["def f(", ["def f(", "class A"], "ids", "lists of ids"])
def test_texts_are_the_engine_s(client, engine, prompt):
    if "ids" in prompt:
        lists = [engine.text.encode(each, chat_template=False) for each in ("def f(", "class A")]
        prompt = lists[0] if prompt == "ids" else lists
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    each = [prompt] if single else prompt
    params = SamplingParams(max_tokens=10, temperature=0.0)
    expected = [engine.generate(one, params, chat_template=False).text for one in each]
    whole = client.completions.create(**GIVEN, prompt=prompt)
    assert whole.object == "text_completion" and [choice.text for choice in whole.choices] == expected
    assert whole.usage.completion_tokens == 10 * len(expected)
    texts = [""] * len(expected)
    chunks = list(
        client.completions.create(**GIVEN, prompt=prompt, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected and chunks[-1].usage == whole.usage.model_copy()
    assert {chunk.object for chunk in chunks} == {"text_completion"}


def test_samples_of_each_prompt_come_in_a_row(client, engine):
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=4)
    expected = engine.generate(["def f(", "class A"], params, chat_template=False, n=2)
    whole = client.completions.create(
        model=NAME, max_tokens=10, temperature=1, seed=4, n=2, prompt=["def f(", "class A"]
    )
    assert [choice.text for choice in whole.choices] == [each.text for some in expected for each in some]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]


def test_logprobs_in_arrays(client, engine):
    whole = client.completions.create(**GIVEN, prompt="def f(", logprobs=3).choices[0]
    logprobs = whole.logprobs
    assert "".join(logprobs.tokens) == whole.text and logprobs.text_offset[0] == 0
    for token, offset, top in zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True):
        assert whole.text[offset:].startswith(token) and len(top) == 3
    pieces = [
        chunk.choices[0] for chunk in client.completions.create(**GIVEN, prompt="def f(", logprobs=3, stream=True)
    ]
    told = [piece.logprobs for piece in pieces if piece.logprobs]
    assert [offset for each in told for offset in each.text_offset] == logprobs.text_offset
    assert [token for each in told for token in each.tokens] == logprobs.tokens


def test_thoughts_of_a_raw_prompt_are_not_lost(engine):
    text = "<|channel>thought\nHm.\n<channel|>Yes.<turn|>"
    with serving(Scripted(engine, lambda number: [ids_of(engine, text)])) as url:
        choice = post(url, "/v1/completions", {"prompt": "x"}).json()["choices"][0]
        assert (choice["text"], choice["reasoning_content"]) == ("Yes.", "Hm.")
        found = events(url, "/v1/completions", {"prompt": "x"})[:-1]
    assert "".join(each["choices"][0]["text"] for each in found) == "Yes."
    assert "".join(each["choices"][0].get("reasoning_content", "") for each in found) == "Hm."
