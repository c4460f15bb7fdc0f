"""Cases that other servers got wrong, where no other file here has them: counts of rows, stops amid a round, beginnings
that are shared, storms of clients that leave, many clients of Anthropic's package.
"""

from __future__ import annotations

import asyncio
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import anthropic
import openai
import pytest
from serving import ASKED, NAME, Scripted, ids_of, post, serving
from test_clients import ask, figure, until

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.server.limits import Limits

CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": ASKED, "max_tokens": 24, "temperature": 0}
END = "<turn|>"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_every_choice_s_counts_add_up(url, engine):
    """A token of the prefill, one of each round, and the drafts that were kept; also where a row ends amid a round."""
    body = BODY | {"temperature": 1.0, "seed": 5, "n": 4, "max_tokens": 23}
    answer = post(url, CHAT, body).json()
    results = engine.generate(ASKED, SamplingParams(max_tokens=23, temperature=1.0, seed=5), n=4)
    made = 0
    for choice, result in zip(answer["choices"], results, strict=True):
        timings = choice["timings"]
        ended = result.end_token is not None  # an end token is made, and not counted
        assert len(result.tokens) + ended == 1 + timings["rounds"] + timings["draft_n_accepted"]
        made += len(result.tokens)
    details = answer["usage"]["completion_tokens_details"]
    assert answer["usage"]["completion_tokens"] == made
    assert details["accepted_prediction_tokens"] == sum(
        each["timings"]["draft_n_accepted"] for each in answer["choices"]
    )


def test_what_a_round_has_behind_a_stop_is_not_counted(engine):
    """Neither sent, nor a completion token, nor an accepted draft."""
    ids = [ids_of(engine, text) for text in ("Hello", " there", " stop", " and", " more")]
    rounds = [ids[0], [token for each in ids[1:] for token in each]]
    with serving(Scripted(engine, lambda number: rounds)) as url:
        answer = post(url, CHAT, BODY | {"stop": " stop"}).json()
    used = len(ids[0]) + len(ids[1]) + len(ids[2])
    assert answer["choices"][0]["message"]["content"] == "Hello there"
    assert answer["usage"]["completion_tokens"] == used
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == used - len(ids[0]) - 1


def test_an_empty_text_uses_no_tokens(engine):
    with serving(Scripted(engine, lambda number: [ids_of(engine, END)])) as url:
        answer = post(url, CHAT, BODY).json()
    assert answer["usage"]["completion_tokens"] == 0 and answer["choices"][0]["finish_reason"] == "stop"


def test_clients_pass_over_comments(engine):
    """Silence longer than the beat, at both packages."""
    words = [ids_of(engine, text) for text in ("Hello", " there", END)]
    slow = Scripted(engine, lambda number: words, lambda: asyncio.sleep(0.7))
    with serving(slow, limits=Limits(beat=0.2)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            chunks = client.chat.completions.create(**BODY, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there"
        with (
            anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as claude,
            claude.messages.stream(model=NAME, max_tokens=24, messages=ASKED) as stream,
        ):
            assert stream.get_final_text() == "Hello there"


@pytest.mark.parametrize("budget", [0, 6])
def test_thoughts_are_the_engine_s(url, engine, budget):
    """Also their budget, at both routes; a thought is never in the text."""
    control = engine.text.template.control
    bias = {control["<|channel>"]: 20.0}
    params = SamplingParams(
        max_tokens=24, temperature=1.0, seed=3, thinking=True, thinking_budget=budget, logit_bias=bias
    )
    expected = engine.generate(ASKED, params)
    body = BODY | {"temperature": 1.0, "seed": 3, "logit_bias": {str(token): each for token, each in bias.items()}}
    message = post(url, CHAT, body | {"thinking_budget": budget}).json()["choices"][0]["message"]
    assert message["content"] == expected.text and message.get("reasoning_content", "") == expected.reasoning


@pytest.mark.slow
def test_anthropic_s_clients_at_once(url, engine):
    """32 requests of the asynchronous client, streamed by its helper and not, each with its lone text."""
    prompts = [f"def f{i}(x):" + " y" * (5 * i) for i in range(32)]
    params = [SamplingParams(max_tokens=8 + i % 5, temperature=i % 2 * 1.0, seed=i) for i in range(32)]
    expected = [engine.generate(prompt, each).text for prompt, each in zip(prompts, params, strict=True)]

    async def text(claude, i: int) -> str:
        given = {"model": NAME, "max_tokens": params[i].max_tokens, "messages": user(prompts[i])}
        given["extra_body"] = {"seed": i, "temperature": params[i].temperature}
        if i % 2:
            message = await claude.messages.create(**given)
            return "".join(block.text for block in message.content)
        async with claude.messages.stream(**given) as stream:
            return "".join([piece async for piece in stream.text_stream])

    async def every() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as claude:
            return await asyncio.gather(*(text(claude, i) for i in range(32)))

    assert asyncio.run(every()) == expected


@pytest.mark.slow
def test_shared_beginnings_give_nobody_another_s_answer(engine):
    """8 prompts that differ in one number, again and again, with clients that leave amid a prefill: own texts, and the
    cached tokens are told.
    """
    beginning = "".join(f"def g{i}(a):\n    return a * {i}\n" for i in range(24))
    bodies = [BODY | {"messages": user(f"{beginning}# secret {1000 + 37 * i}\n"), "max_tokens": 12} for i in range(8)]
    expected = [
        engine.generate(body["messages"], SamplingParams(max_tokens=12, temperature=0.0), cache_salt=f"alone {i}").text
        for i, body in enumerate(bodies)
    ]
    with serving(engine) as url, ThreadPoolExecutor(8) as threads:
        for turn in range(3):
            gone = [ask(url, BODY | {"messages": user(f"{beginning}# {turn} {i}" + " z" * 300)}) for i in range(3)]
            asked = [threads.submit(post, url, CHAT, body) for body in bodies]
            for each in gone:
                each.close()
            answers = [each.result().json() for each in asked]
            assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
        details = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert min(details) > 0
        assert all(
            answer["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            for answer in answers
        )


@pytest.mark.slow
def test_a_storm_of_clients_that_leave(engine):
    """60 rounds of resets, amid streams and prefills: nobody is left, drafts are made, and the text is the same."""
    expected = engine.generate(ASKED, SamplingParams(max_tokens=24, temperature=0.0))
    r, long = random.Random(0), user("x y " * 800)
    with serving(engine) as url:
        for _ in range(60):
            some = [BODY | {"max_tokens": 400, "stream": r.random() < 0.7} for _ in range(4)] + [
                BODY | {"messages": long}
            ]
            connections = [ask(url, body) for body in some]
            for connection in connections:
                if r.random() < 0.5:
                    connection.settimeout(0.2)
                    with suppress(TimeoutError):
                        connection.recv(1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.close()
        until(lambda: figure(url, "num_requests_") == 0)
        answer = post(url, CHAT, BODY).json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["choices"][0]["timings"]["draft_n"] > 0
