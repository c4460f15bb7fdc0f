"""The judge of prompt following: it takes what follows, and nothing that only looks so."""

import json

import pytest

from benchmarks.prompt_following import PROMPTS, follows, measure, table

CODE = "def ping(host):\n    return connect(host).ok"


def test_the_prompts_are_sixty_of_five_kinds_with_one_property_each():
    entries = json.loads(PROMPTS.read_text())
    kinds = [entry["kind"] for entry in entries]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("write", "continue", "question", "edit", "chat"), 12
    )
    assert all(len({"defines", "code", "says", "any"} & set(entry)) == 1 for entry in entries)
    assert len({entry["prompt"] for entry in entries}) == 60


def test_the_bundled_pair_follows_what_a_newcomer_says_first():
    asked = [
        {"prompt": "def fibonacci(n):", "defines": "fibonacci"},
        {"prompt": "Hello! Who are you?", "any": ["model", "assistant"]},
        {"prompt": "What is a list?", "says": ["list"]},
        {"prompt": "Rename `a` to `left` in this code.\n```python\ndef add(a, b):\n    return a + b\n```",
         "code": "def add(left, b):\n    return left + b"},
    ]  # fmt: skip
    assert [entry["reply"] for entry in measure(asked, None, None) if not entry["good"]] == []


@pytest.mark.slow
def test_the_bundled_pair_follows_seven_prompts_of_ten():
    judged = measure(json.loads(PROMPTS.read_text()), None, None)
    assert sum(entry["good"] for entry in judged) >= 42, table(judged)


@pytest.mark.parametrize(
    ("check", "reply", "good"),
    [
        ({"defines": "ping"}, f"```python\n{CODE}\n```", True),
        ({"defines": "ping"}, CODE, True),
        ({"defines": "pong"}, CODE, False),
        ({"defines": "ping"}, f"{CODE}(", False),
        ({"code": CODE}, f"```python\n{CODE}\n```", True),
        ({"code": CODE}, f"```python\n{CODE}\nping()\n```", False),
        ({"code": CODE}, CODE.replace("host", "home"), False),
        ({"says": ["ping"]}, "`ping` returns whether a host answers.", True),
        ({"says": ["ping", "host"]}, "`ping` returns True.", False),
        ({"says": ["ping"]}, f"```python\n{CODE}\n```", False),
        ({"says": ["ping"]}, "the ping of " * 9, False),
        ({"any": ["model"]}, "I am a small model.", True),
        ({"any": ["model"]}, "Hello!", False),
    ],
)
def test_the_judge(check, reply, good):
    assert follows(check, reply, ended=True) is good
    assert not follows(check, reply, ended=False)


def test_the_table_counts_by_kind():
    judged = [{"kind": "chat", "good": True}, {"kind": "chat", "good": False}]
    assert table(judged).splitlines()[0].split() == ["chat", "1", "of", "2", "50%"]
