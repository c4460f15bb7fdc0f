"""Conversations: their history, turn by turn; what of it the template renders; turns that end early or never begin."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from contextlib import aclosing
from typing import Any

import chats
import pytest
from chats import LARGE, SMALL, assistant, function, tool, user
from schedules import CALLED, TOOL, engine_of
from watchdog import within

from mlx_gemma_mtp import Conversation, Result, SamplingParams, ToolCall, UserError, load
from mlx_gemma_mtp.engine.stats import Stats

SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)


def reply(text: str = "", *calls: ToolCall, reason: str = "stop", reasoning: str = "") -> Result:
    return Result(text, [1], reason, Stats(7), reasoning=reasoning, tool_calls=list(calls))


class Script:
    """A speaker with replies of its own. asked: the prompts, as they came, and their options."""

    def __init__(self, *replies: Result | BaseException):
        self.replies, self.asked = list(replies), []

    def generate(self, prompt: Any, params: SamplingParams | None, **options: Any) -> Result:
        self.asked.append((json.loads(json.dumps(prompt)), options))
        answer = self.replies.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture(scope="module")
def engine():
    return engine_of("bundled")


def texts_of(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and "expected" in message
    for part in parts:
        assert part in message, message


# Turns of an engine.


def spoken(engine, messages: list[dict], **options) -> Result:
    """What the engine says to these messages as a prompt by itself."""
    return engine.generate(messages, SHORT, **options)


def test_each_turn_is_the_reply_to_the_whole_history(engine):
    talk = engine.conversation("You are short.", params=SHORT)
    history = []
    for said in ("def f(x):", user("And g?"), [user([{"type": "text", "text": "class A:"}])]):
        result = talk.say(said)
        history += [user(said)] if isinstance(said, str) else said if isinstance(said, list) else [said]
        assert result.tokens == spoken(engine, history, system_prompt="You are short.").tokens
        assert talk.tokens == result.stats.prompt_tokens
        history.append(result.message())
        assert talk.messages == history
    assert json.loads(json.dumps(talk.messages)) == talk.messages


def test_all_ways_to_say_a_thing_are_one(engine):
    async def both(talk: Conversation) -> list[str]:
        first = await talk.asay("def f(x):")
        return [first.text, "".join([chunk.text async for chunk in talk.astream("And g?")])]

    talks = [engine.conversation(params=SHORT) for _ in range(3)]
    said = [[talks[0].say("def f(x):").text, talks[0].say("And g?").text]]
    said.append(["".join(chunk.text for chunk in talks[1].stream(text)) for text in ("def f(x):", "And g?")])
    said.append(asyncio.run(both(talks[2])))
    assert said[0] == said[1] == said[2]
    assert talks[0].messages == talks[1].messages == talks[2].messages and len(talks[0].messages) == 4
    assert talks[0].tokens == talks[1].tokens == talks[2].tokens > 0


def test_settings_of_a_turn_are_for_that_turn(engine):
    talk = engine.conversation("You are short.", params=SHORT, num_draft_tokens=0)
    assert len(talk.say("x", SamplingParams(max_tokens=3, ignore_eos=True)).tokens) == 3
    assert talk.say("y", num_draft_tokens=2).stats.mtp and not talk.say("z").stats.mtp
    before = talk.say("a", system_prompt="You are rather long, and you are polite, too.").stats.prompt_tokens
    talk.undo()
    assert talk.say("a").stats.prompt_tokens < before
    talk.undo()
    talk.system_prompt, talk.tools = None, [TOOL]
    prompt = [*talk.messages, user("a")]
    assert talk.say("a").stats.prompt_tokens == spoken(engine, prompt, tools=[TOOL]).stats.prompt_tokens


def test_a_tool_is_called_and_answers(engine):
    pytest.importorskip("llguidance")
    talk = engine.conversation(tools=[TOOL], params=SamplingParams(temperature=0.0, max_tokens=64))
    result = talk.say("Read it.", tool_choice=CALLED["tool_choice"])
    (call,) = result.tool_calls
    refused(talk.say, call.id, "read", "result")
    refused(lambda: talk.say("Well?"), call.id)
    talk.result(call, {"text": ["x", 1]})
    answered = talk.say()
    by_hand = [
        user("Read it."),
        result.message(),
        {"role": "tool", "tool_call_id": call.id, "content": '{"text": ["x", 1]}'},
    ]
    assert answered.tokens == engine.generate(by_hand, talk.params, tools=[TOOL]).tokens
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_call_that_a_stream_made_is_answered(engine):
    pytest.importorskip("llguidance")
    talk = engine.conversation(params=SamplingParams(temperature=0.0, max_tokens=64), **CALLED)
    calls = [call for chunk in talk.stream("Read it.") for call in chunk.tool_calls]
    talk.result(calls[0].id, "x")
    assert talk.say(tool_choice="auto").finish_reason in ("stop", "length")


# Turns that end early.


def test_a_stream_that_is_closed_leaves_what_was_read(engine):
    talk = engine.conversation(params=LONG)
    stream = talk.stream("def f(x):")
    read = [next(stream) for _ in range(4)]
    stream.close()
    said = "".join(chunk.text for chunk in read)
    assert said and texts_of(talk) == [("user", "def f(x):"), ("assistant", said)]
    assert talk.say("Go on.", SHORT).tokens == spoken(engine, talk.messages[:3]).tokens


def test_a_stream_that_is_forgotten_ends_its_turn(engine):
    talk = engine.conversation(params=LONG)
    for chunk in talk.stream("def f(x):"):
        if chunk.text:
            break
    gc.collect()
    assert texts_of(talk) == [("user", "def f(x):"), ("assistant", chunk.text)]
    with within(120):
        talk.say("Go on.", SHORT)


def test_a_stream_that_nobody_reads_is_no_turn(engine):
    talk = engine.conversation(params=SHORT)
    stream = talk.stream("def f(x):")
    talk.say("And g?")
    assert len(talk.messages) == 2
    stream.close()
    assert len(talk.messages) == 2


def test_the_turn_is_over_with_its_last_chunk(engine):
    """Also for a reader that never asks for more."""
    talk = engine.conversation(params=SHORT)
    stream = talk.stream("def f(x):")
    while next(stream).result is None:
        pass
    assert len(talk.messages) == 2 and talk.tokens
    talk.say("And g?")


def test_asynchronous_turns_end_early_too(engine):
    async def closed() -> tuple[Conversation, str]:
        talk, said = engine.conversation(params=LONG), ""
        async with aclosing(talk.astream("def f(x):")) as stream:
            async for chunk in stream:
                said += chunk.text
                if len(said) > 4:
                    break
        return talk, said

    async def cancelled() -> tuple[Conversation, list[str]]:
        talk, said = engine.conversation(params=LONG), []

        async def read():
            async for chunk in talk.astream("def f(x):"):
                said.append(chunk.text)

        task = asyncio.create_task(read())
        while not any(said):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return talk, "".join(said)

    async def given_up() -> Conversation:
        talk = engine.conversation(params=LONG)
        task = asyncio.create_task(talk.asay("def f(x):"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return talk

    with within(120):
        for talk, said in (asyncio.run(closed()), asyncio.run(cancelled())):
            assert texts_of(talk) == [("user", "def f(x):"), ("assistant", said)]
        talk = asyncio.run(given_up())
        assert talk.messages == [] and talk.say("def f(x):", SHORT).text


def test_an_event_and_a_timeout_keep_what_came(engine):
    talk, cancel = engine.conversation(params=LONG), threading.Event()
    for chunk in talk.stream("def f(x):", cancel=cancel):
        if chunk.text:
            cancel.set()
    assert chunk.result.finish_reason == "cancelled"
    assert texts_of(talk) == [("user", "def f(x):"), ("assistant", chunk.result.text)]
    talk.reset()
    result = talk.say("def f(x):", timeout=1e-6)
    assert result.finish_reason == "timeout" and talk.messages == (
        [user("def f(x):"), result.message()] * bool(result.text)
    )


@pytest.mark.parametrize("reason", ["error", "timeout", "cancelled"])
@pytest.mark.parametrize(
    "came, kept",
    [
        ({}, False),
        ({"reasoning": "Hm"}, False),
        ({"text": "Yes"}, True),
        ({"reasoning": "Hm", "text": "Yes"}, True),
    ],
)
def test_a_turn_that_was_cut_stays_if_it_says_something(reason, came, kept):
    """A thought alone would leave an empty turn of the model: the template drops it."""
    cut = reply(reason=reason, **came)
    talk = Conversation(Script(reply("a"), cut, reply("c")))
    talk.say("1")
    assert talk.say("2") is cut
    assert talk.messages == [user("1"), assistant("a"), *([user("2"), cut.message()] if kept else [])]
    talk.say("3")
    assert talk.messages[-1] == assistant("c")


def test_a_call_that_came_before_the_cut_is_kept():
    talk = Conversation(Script(reply("", ToolCall("f", {}, id="c1"), reason="timeout")))
    talk.say("1")
    assert talk.messages[1]["tool_calls"][0]["id"] == "c1"
    assert talk.undo() and talk.messages == []


@pytest.mark.parametrize("reason", ["stop", "length", "repetition", "tool_calls"])
def test_an_end_of_its_own_counts_even_where_it_says_nothing(reason):
    talk = Conversation(Script(reply(reason=reason)))
    talk.say("1")
    assert talk.messages == [user("1"), assistant("")]


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), RuntimeError()])
def test_a_turn_that_raises_leaves_the_history_as_before(error):
    talk = Conversation(Script(reply("a"), reply("b")))
    talk.say("1")
    talk._engine.replies.insert(0, error)
    with pytest.raises(type(error)):
        talk.say("2")
    assert talk.messages == [user("1"), assistant("a")] and talk.say("2").text == "b"


def test_what_the_engine_refuses_is_no_turn(engine):
    talk = engine.conversation(params=SHORT)
    for bad in (
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "king", "content": "x"},
        {"content": "x"},
        "",
    ):
        refused(lambda bad=bad: talk.say(bad))
        refused(lambda bad=bad: list(talk.stream(bad)))
    refused(lambda: talk.say("x", priority=1000), "priority")
    with pytest.raises(TypeError):
        talk.say("x", no_such_option=1)
    assert talk.messages == [] and len(talk.say("x").tokens) == 8


def test_an_engine_that_is_closed_ends_the_turn():
    with within(300):
        engine = load(num_draft_tokens=0)
        talk = engine.conversation(params=LONG)
        stream = talk.stream("def f(x):")
        said = next(stream).text
        engine.close()
        last = list(stream)[-1]
    assert last.result.finish_reason == "cancelled" and last.result.text.startswith(said)
    assert talk.messages == [user("def f(x):"), last.result.message()]
    with pytest.raises(UserError, match="closed"):
        talk.say("x")
    assert len(talk.messages) == 2 and talk.undo()


# One turn at a time.


def test_a_second_turn_is_refused_while_one_runs(engine):
    talk = engine.conversation(params=LONG)
    stream = talk.stream("def f(x):")
    next(stream)
    for other in (
        lambda: talk.say("x"),
        lambda: next(talk.stream("x")),
        lambda: asyncio.run(talk.asay("x")),
        lambda: asyncio.run(anext(talk.astream("x"))),
        talk.undo,
        talk.reset,
        lambda: talk.result("f", "x"),
    ):
        refused(other, "turn", "one")
    aside = talk.fork()  # without the turn that runs
    assert aside.say("And g?", SHORT).text and len(aside.messages) == 2
    stream.close()
    assert talk.messages[0] == user("def f(x):") and talk.say("And g?", SHORT).text


def test_of_threads_at_once_one_has_the_turn(engine):
    talk, said, barrier = engine.conversation(params=SHORT), [], threading.Barrier(4)

    def speak(text: str) -> None:
        barrier.wait(60)
        try:
            said.append(talk.say(text))
        except UserError as error:
            assert "one at a time" in str(error)

    threads = [threading.Thread(target=speak, args=(str(place),)) for place in range(4)]
    with within(120):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert said and len(talk.messages) == 2 * len(said)


# The history.


def test_undo_drops_the_last_message_of_the_user_and_all_behind_it():
    calls = [ToolCall("f", {}, id="c1"), ToolCall("g", {}, id="c2")]
    talk = Conversation(
        Script(reply("a"), reply("", *calls), reply("b")), messages=[{"role": "system", "content": "s"}]
    )
    assert not talk.undo() and len(talk.messages) == 1
    talk.say("1")
    before = talk.messages
    talk.say("2")
    talk.result("c2", "x")
    talk.result("f", "y")
    talk.say()
    assert talk.undo() and talk.messages == before
    assert talk.undo() and talk.messages == [{"role": "system", "content": "s"}] and not talk.undo()


def test_reset_forgets_the_history_alone():
    talk = Conversation(Script(reply("a"), reply("b")), "You are short.", messages=[user("0"), assistant("z")])
    talk.say("1")
    talk.reset()
    assert (talk.messages, talk.tokens) == ([], 0)
    talk.say("2")
    assert talk._engine.asked[-1][0] == [user("2")]
    assert talk._engine.asked[-1][1]["system_prompt"] == "You are short."


def test_forks_go_their_own_ways(engine):
    talk = engine.conversation("You are short.", params=SHORT, num_draft_tokens=0)
    talk.say("def f(x):")
    forks = [talk.fork() for _ in range(3)]
    assert all(each.messages == talk.messages and each.tokens == talk.tokens for each in forks)
    texts = [each.say(f"And {name}?").text for each, name in zip(forks, "ghi", strict=True)]
    alone = [
        spoken(engine, [*talk.messages, user(f"And {name}?")], system_prompt="You are short.").text for name in "ghi"
    ]
    assert texts == alone and len(talk.messages) == 2 and [len(each.messages) for each in forks] == [4] * 3
    assert forks[0].options == talk.options and forks[0].options is not talk.options


def test_what_is_handed_in_or_out_is_a_copy():
    given = [user([{"type": "text", "text": "a"}])]
    talk = Conversation(Script(reply("b")))
    talk.say(given)
    given[0]["content"][0]["text"] = "changed"
    talk.messages[0]["content"][0]["text"] = "changed"
    talk.messages.clear()
    assert talk.messages == [user([{"type": "text", "text": "a"}]), assistant("b")]


def test_a_conversation_goes_on_from_messages(engine):
    first = engine.conversation(params=SHORT)
    first.say("def f(x):")
    again = engine.conversation(params=SHORT, messages=json.loads(json.dumps(first.messages)))
    assert again.say("And g?").tokens == first.say("And g?").tokens


# What is refused.


@pytest.mark.parametrize(
    "said, part",
    [([2, 5, 6], "2"), (b"x", "b'x'"), (7, "7"), (["x"], "'x'"), ([user("x"), "y"], "'y'")],
)
def test_only_text_and_messages_are_said(engine, said, part):
    """Token ids are no history: nothing would tell where their turns end."""
    talk = engine.conversation(params=SHORT)
    refused(lambda: talk.say(said), part)
    refused(lambda: engine.conversation(messages=said), part)
    assert talk.messages == []


def test_there_must_be_something_to_reply_to(engine):
    talk = engine.conversation(params=SHORT)
    refused(talk.say, "nothing")
    refused(lambda: talk.say([]), "nothing")
    talk.say("def f(x):")
    refused(talk.say, "nothing")
    refused(lambda: talk.say(assistant("x")), "nothing")
    assert engine.conversation(params=SHORT, messages=[user("def f(x):")]).say().text


@pytest.mark.parametrize("option, value", [("n", 2), ("chat_template", False), ("continue_final_message", True)])
def test_options_that_a_conversation_has_no_use_for(engine, option, value):
    refused(lambda: engine.conversation(**{option: value}), option)
    talk = engine.conversation(params=SHORT)
    refused(lambda: talk.say("x", **{option: value}), option)
    refused(lambda: next(talk.stream("x", **{option: value})), option)
    assert talk.messages == [] and talk.say("x").text


def test_results_are_for_open_calls():
    calls = [ToolCall("f", {}, id="c1"), ToolCall("f", {"x": 1}, id="c2"), ToolCall("g", {}, id="c3")]
    talk = Conversation(Script(reply("", *calls), reply("b")))
    refused(lambda: talk.result("f", "x"), "'f'", "none is open")
    talk.say("1")
    refused(lambda: talk.result("h", "x"), "'h'", "c1 (f)", "c3 (g)")
    refused(lambda: talk.result("f", "x"), "c1 (f)", "c2 (f)")  # which of the two?
    refused(lambda: talk.result(calls[0], object()), "result")
    refused(lambda: talk.result(calls[0], "\ud800"), "result")
    talk.result(calls[1], "second")
    refused(lambda: talk.result(calls[1], "again"), "c2")
    talk.result("f", None)
    refused(talk.say, "c3")
    talk.result("g", [1, "é"])
    talk.say()
    answers = [message for message in talk.messages if message["role"] == "tool"]
    assert [(each["tool_call_id"], each["content"]) for each in answers] == [
        ("c2", "second"),
        ("c1", "null"),
        ("c3", '[1, "é"]'),
    ]


def test_results_may_be_said_as_messages():
    calls = [ToolCall("f", {}, id="c1"), ToolCall("g", {}, id="c2")]
    talk = Conversation(Script(reply("", *calls), reply("b")))
    talk.say("1")
    refused(lambda: talk.say(tool("x", "c1")), "c2")
    talk.result("c1", "x")
    talk.say(tool("y", "c2"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "tool", "assistant"]


# What the template makes of a history.


@pytest.fixture(scope="module")
def google(tmp_path_factory) -> dict:
    base = tmp_path_factory.mktemp("google")
    return {size: chats.google_text(base / size, size) for size in (SMALL, LARGE)}


def as_reply(message: dict) -> Result:
    """The reply that an assistant's message was."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append(ToolCall(call["function"]["name"], arguments, **({"id": call["id"]} if call.get("id") else {})))
    reasoning = message.get("reasoning") or message.get("reasoning_content") or message.get("thinking") or ""
    return reply(message.get("content") or "", *calls, reasoning=reasoning)


def replayed(messages: list[dict]) -> list[dict]:
    """The last prompt of a conversation in which the same things are said and replied. Raises UserError for messages
    that do not come in turns.
    """
    script, said, waiting = Script(), [], []
    talk = Conversation(script)
    for message in messages:
        if message["role"] == "assistant":
            script.replies.append(as_reply(message))
            waiting = talk.say(said or None).tool_calls
            said = []
        elif message["role"] == "tool":
            call = message.get("tool_call_id") or waiting[0]
            waiting = [each for each in waiting if call not in (each, each.id)]
            talk.result(call, message["content"])
        else:
            said.append(message)
    script.replies.append(reply("the end"))
    talk.say(said or None)
    return script.asked[-1][0]


# Two replies in a row, calls without a result, a reply as the last message.
NO_TURNS = {
    *("tool_call_pending_response", "multiple_tool_calls_with_thinking_ids_and_continuation", "null_tool_arguments"),
    *("adjacent_assistants_continue_same_model_turn", "adjacent_assistants_continue_same_model_turn_2"),
    *("thinking_in_last_assistant", "thinking_enabled_with_pending_tool_call", "pending_call_then_an_assistant"),
    *("reasoning_without_calls_after_the_last_user", "reasoning_without_calls_after_the_last_user_thinking"),
    *("reasoning_alone_is_the_last_message", "reasoning_before_a_later_user", "arguments_of_every_kind"),
    *("one_of_two_calls_answered", "one_of_two_calls_answered_thinking"),
}
CASES = [case for case in chats.cases() if case["id"] not in NO_TURNS]


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_turns_are_rendered_as_googles_template_renders_them(google, size, case):
    """Thoughts before the user's last message are dropped by it, those of the calls behind it stay."""
    text = google[size]
    ids = text.encode(replayed(case["messages"]), thinking=case["thinking"], tools=case["tools"])
    assert ids == text.tokenizer.encode(chats.prompt_of(case, size), add_special_tokens=False)


def test_messages_that_come_in_no_turns_are_told():
    for case in chats.cases():
        if case["id"] in NO_TURNS:
            refused(lambda case=case: replayed(case["messages"]))


def test_thoughts_are_in_the_history_and_not_in_the_next_prompt(google):
    """Until the user speaks again, a reply's thought stays before its call."""
    call = ToolCall("f", {}, id="c1")
    script = Script(reply("", call, reasoning="A deep thought."), reply("b", reasoning="Another."), reply("c"))
    talk, text = Conversation(script, tools=[function("f")]), google[SMALL]
    rendered = lambda: text.tokenizer.decode(text.encode(script.asked[-1][0], tools=talk.tools))  # noqa: E731
    talk.say("1")
    talk.result(call, "x")
    talk.say()
    assert "A deep thought." in rendered() and "response:f" in rendered()
    talk.say("2")
    assert "thought" not in rendered() and "Another" not in rendered() and "call:f" in rendered()
    assert [message.get("reasoning") for message in talk.messages if message["role"] == "assistant"] == [
        "A deep thought.",
        "Another.",
        None,
    ]
