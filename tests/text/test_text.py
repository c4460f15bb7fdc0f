"""Text streams: whole characters, no half stop strings, and nothing lost."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text.encode import Text

MEDIA = 40  # a token of the bundled vocabulary that plays the image token


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(hub.DEMO / "target", 4096, [MEDIA])


def pieces(text: Text, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream, out = text.stream(stop), []
    for token in tokens:
        out.append(stream.push(token).text)
        if stream.stopped:
            break
    return [*out, stream.finish().text], stream.stopped


WORDS = st.text(alphabet=st.sampled_from("ab \n_()é漢😀\t"), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(words=WORDS)
def test_pieces_are_whole_characters_and_add_up(text, words):
    tokens = text.tokenizer.encode(words, add_special_tokens=False)
    out, _ = pieces(text, tokens)
    assert "".join(out) == words
    assert all("\ufffd" not in piece for piece in out)


@settings(max_examples=150, deadline=None)
@given(words=WORDS, stops=st.lists(st.text(alphabet="ab \n_é😀", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_never_show(text, words, stops):
    """What is given is the text before the first stop string; every piece given on the way is a prefix of it."""
    out, stopped = pieces(text, text.tokenizer.encode(words, add_special_tokens=False), tuple(stops))
    ends = [words.find(stop) for stop in stops if stop in words]
    assert stopped == bool(ends)
    given_text = "".join(out)
    if not ends:
        assert given_text == words
    else:
        assert words.startswith(given_text) and not any(stop in given_text for stop in stops)
        assert any(words.startswith(stop, len(given_text)) for stop in stops)


def test_broken_bytes_become_a_replacement_only_at_the_end(text):
    first = text.tokenizer.encode("😀", add_special_tokens=False)
    assert len(first) > 1  # byte fallback
    out, _ = pieces(text, first[:-1])
    assert out[:-1] == [""] * len(first[:-1]) and set(out[-1]) == {"\ufffd"}


def test_chat_template_and_raw_text(text):
    plain = text.encode("hello", chat_template=False)
    chat = text.encode("hello")
    assert plain == text.tokenizer.encode("hello") and plain[0] == 2
    assert text.tokenizer.decode(chat) == "<bos><|turn>user\nhello<turn|>\n<|turn>model\n"
    with_system = text.tokenizer.decode(text.encode("hello", system_prompt="be brief"))
    assert with_system.startswith("<bos><|turn>system\nbe brief<turn|>\n<|turn>user")
    assert text.encode([{"role": "user", "content": [{"type": "text", "text": "hello"}]}]) == chat
    assert text.encode([2, 7, 9]) == [2, 7, 9]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "empty"),
        ([], "empty"),
        ([{"role": "user", "content": ""}], "empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'image'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio'"),
        ([2, MEDIA, 9], "image, audio or video token"),
        ([2, 5000], "5000"),
        ([-1], "-1"),
        ("ab\udcff", "no character"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udcff"}]}], "no character"),
    ],
)
def test_bad_prompts_are_named(text, prompt, message):
    with pytest.raises(UserError, match=message):
        text.encode(prompt)


def test_a_system_prompt_without_a_template_is_refused(text):
    with pytest.raises(UserError, match="system prompt"):
        text.encode("hello", system_prompt="x", chat_template=False)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_ids_are_taken_as_they_are_and_never_the_callers_own_list(text, kind):
    given = kind([5, 6, 7])
    found = text.encode(given)
    assert found == [5, 6, 7] and found is not given and {type(each) for each in found} == {int}


@pytest.mark.parametrize("strange", [True, 6.0, "6", None, -1, 10**6])
def test_one_strange_id_among_many_is_named(text, strange):
    with pytest.raises(UserError, match=re.escape(repr(strange))):
        text.encode([*range(4, 900), strange])
