"""Responses that are kept: under a bound, in order of use, each for its owner."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
from mlx_gemma_mtp.server.responses_kept import Kept


def answer(id: str, text: str = "") -> dict[str, Any]:
    return {"id": id, "output": [{"said": text or id}]}


def given(id: str) -> list[dict[str, str]]:
    return [{"asked": id}]


def put(kept: Kept, id: str, previous: str | None = None, owner: str = "", text: str = "") -> None:
    kept.put(owner, answer(id, text), given(id), previous)


def known(kept: Kept, *ids: str) -> list[bool]:
    return [kept.get("", id) is not None for id in ids]


def test_a_conversation_is_all_that_was_said():
    kept = Kept()
    put(kept, "a")
    put(kept, "b", "a")
    put(kept, "c", "a")
    assert kept.conversation("", "b") == [{"asked": "a"}, {"said": "a"}, {"asked": "b"}, {"said": "b"}]
    assert kept.conversation("", "c") == [{"asked": "a"}, {"said": "a"}, {"asked": "c"}, {"said": "c"}]
    assert kept.conversation("", "d") is None and kept.conversation("other", "a") is None
    assert kept.drop("", "a") and not kept.drop("", "a") and kept.conversation("", "b") is None


def test_those_that_were_used_last_stay():
    kept = Kept(count=3)
    for id in "abc":
        put(kept, id)
    kept.conversation("", "a")
    put(kept, "d")
    assert known(kept, *"abcd") == [True, False, True, True] and len(kept) == 3


def test_the_beginning_of_a_conversation_outlives_its_end():
    kept = Kept(count=3)
    for id, previous in (("a", None), ("b", "a"), ("c", "b")):
        put(kept, id, previous)
    kept.conversation("", "c")
    put(kept, "x")
    assert known(kept, *"abc") == [True, True, False] and kept.conversation("", "b") is not None


def test_bytes_are_bounded_and_counted():
    size = len(json.dumps([answer("a", "é" * 50), given("a")], ensure_ascii=False).encode())
    kept = Kept(bytes=2 * size)
    for id in "abcdef":
        put(kept, id, text="é" * 50)
        assert kept.bytes <= 2 * size
    assert len(kept) == 2 and kept.bytes == 2 * size and known(kept, *"ef") == [True, True]
    put(kept, "g", text="x" * 1000)  # larger than all: the others stay
    assert known(kept, *"efg") == [True, True, False]
    assert kept.drop("", "e") and kept.drop("", "f") and kept.bytes == 0


def test_a_lone_surrogate_is_kept():
    kept = Kept()
    put(kept, "a", text="\ud800")
    assert known(kept, "a") == [True]
