"""Ids that are kept: those of the encoder, asked for once, and no more than there is room for."""

import random

import pytest

from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text.encode import Text
from mlx_gemma_mtp.text.spelt import Spelt


class Encoder:
    """Ids of text are its characters; it keeps what it was asked."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        assert texts
        self.asked += texts
        return [list(map(ord, text)) for text in texts]


def test_random_texts_have_their_ids_and_the_bound_holds():
    rng, known, encode = random.Random(0), Spelt(most=40), Encoder()
    for _ in range(300):
        texts = ["ab"[i % 2] * rng.randrange(30) for i in range(rng.randrange(5))]
        assert known.of(texts, encode) == [list(map(ord, text)) for text in texts]
        assert known.characters == sum(map(len, known._ids)) <= 40
    assert known.of([], encode) == []


def test_what_was_asked_last_stays():
    known, encode = Spelt(most=10), Encoder()
    for text in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        known.of([text, text], encode)
    assert encode.asked == ["aaaa", "bbbb", "cccc", "bbbb"]


def test_what_is_given_is_the_callers_own():
    known, encode = Spelt(), Encoder()
    known.of(["ab"], encode)[0].append(7)
    assert known.of(["ab"], encode) == [[97, 98]]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(hub.DEMO / "target", 4096)


def test_the_next_turn_encodes_what_is_new(text, monkeypatch):
    talk = [{"role": "system", "content": "Be <|brief|>."}, {"role": "user", "content": "def f(n):"}]
    first, encoded = text.encode(talk), []
    whole = text.template._encoded
    monkeypatch.setattr(text.template, "_encoded", lambda texts: encoded.extend(texts) or whole(texts))
    assert text.encode(talk) == first and not encoded
    talk += [{"role": "assistant", "content": "return 1"}, {"role": "user", "content": "And now?"}]
    found = text.encode(talk)
    assert encoded and not any("brief" in each or "def f" in each for each in encoded)
    assert found == Text(hub.DEMO / "target", 4096).encode(talk)
    spelled = text.spelled("<|turn>user")  # the tokenizer is as it was
    assert spelled == Text(hub.DEMO / "target", 4096).spelled("<|turn>user")
