"""Grammars are made from the tokenizer's text, without a copy, and see the tokens that llguidance's own way sees."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llguidance")

from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks import full_vocabulary
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text import tokenizer
from mlx_gemma_mtp.text.grammar import Grammars

TARGET = hub.DEMO / "target"
VOCAB, ENDS = 4096, [1, 6]
SOURCES = {
    "json_schema": json.dumps({"type": "object", "properties": {"é n": {"type": "string"}, "n": {"type": "integer"}},
                               "required": ["é n", "n"], "additionalProperties": False}),
    "regex": r"(def |漢)[a-z_]{1,9}\(😀? {0,3}\t?\)\n",
    "grammar": 'start: "<" /[a-z]+/ ">" | <|channel> "\u2581 a" <channel|>',
}  # fmt: skip
TEXTS = {
    "json_schema": '{"é n":"a 漢\\n😀","n":-12}',
    "regex": "漢some_name(😀  \t)\n",
    "grammar": "<abc>",
}


def masks(grammars: Grammars, kind: str, tokens: list[int]) -> list[np.ndarray]:
    """The tokens that may come at each position of a text."""
    state, found = grammars.compile(kind, SOURCES[kind]), []
    for token in tokens:
        found.append(state.mask().copy())
        state.advance(token)
    return [*found, state.mask().copy()]


def check_equal(text, vocab: int, ends: list[int]) -> None:
    ours = Grammars(text, vocab, ends)
    theirs = Grammars(text, vocab, ends)
    theirs.tokenizer = from_tokenizer(text, n_vocab=vocab, eos_token=ends)
    for name in ("vocab_size", "eos_token", "eos_tokens", "is_canonical"):
        assert getattr(ours.tokenizer, name) == getattr(theirs.tokenizer, name), name
    for kind, words in TEXTS.items():
        tokens = text.encode(words, add_special_tokens=False)
        assert ours.tokenizer.tokenize_str(words) == theirs.tokenizer.tokenize_str(words)
        pairs = list(zip(masks(ours, kind, tokens), masks(theirs, kind, tokens), strict=True))
        assert len(pairs) == len(tokens) + 1 and all((a == b).all() for a, b in pairs)
        assert any(0 < np.unpackbits(a.view(np.uint8)).sum() < vocab for a, _ in pairs)


@pytest.mark.parametrize("extra", [{}, {"extra_special_tokens": ["<|new|>"]}], ids=["as it is", "a new token"])
def test_the_masks_are_llguidances_own(tmp_path, extra):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TARGET / name, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | extra))
    loaded = tokenizer.load(tmp_path)
    check_equal(loaded._tokenizer, VOCAB + 64, ENDS)


@pytest.mark.slow
def test_the_masks_of_a_whole_vocabulary_are_llguidances_own(tmp_path):
    full_vocabulary.write(tmp_path)
    check_equal(tokenizer.load(tmp_path)._tokenizer, full_vocabulary.SIZE, [1, 50, 106])


def test_a_grammar_needs_no_copy_of_the_tokenizer(monkeypatch):
    """llguidance reads the file, when it still is what was loaded."""
    loaded = tokenizer.load(TARGET)._tokenizer
    assert tokenizer.source(loaded) == str(TARGET / "tokenizer.json")
    monkeypatch.setattr(type(loaded), "backend_tokenizer", property(lambda _: pytest.fail("copied or written anew")))
    grammars = Grammars(loaded, VOCAB, ENDS)
    assert grammars.compile("regex", "[ab]{2}").mask().size == VOCAB // 32


def test_any_tokenizer_of_transformers_will_do():
    plain = PreTrainedTokenizerFast(tokenizer_file=str(TARGET / "tokenizer.json"))
    assert json.loads(tokenizer.source(plain)) == json.loads(plain.backend_tokenizer.to_str())
    assert Grammars(plain, VOCAB, ENDS).tokenizer.tokenize_str("a b") == plain.encode("a b", add_special_tokens=False)


def replaced(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))


@pytest.mark.parametrize("change", [replaced, Path.unlink], ids=["replaced", "gone"])
def test_a_file_that_changed_meanwhile_does_not_matter(tmp_path, change):
    shutil.copy(TARGET / "tokenizer.json", tmp_path)
    loaded = tokenizer.load(tmp_path)._tokenizer
    change(tmp_path / "tokenizer.json")
    assert json.loads(tokenizer.source(loaded)) == json.loads(loaded.backend_tokenizer.to_str())
    grammars = Grammars(loaded, VOCAB, ENDS)
    assert grammars.tokenizer.tokenize_str("a b") == loaded.encode("a b", add_special_tokens=False)


def test_tokens_that_are_added_later_count(tmp_path):
    loaded = tokenizer.load(TARGET)._tokenizer
    loaded.add_tokens(["zyzzyva"])
    grammars = Grammars(loaded, VOCAB + 32, ENDS)
    assert grammars.tokenizer.tokenize_str("zyzzyva") == [VOCAB]


@pytest.mark.parametrize("key", ["truncation", "padding"])
def test_what_a_file_says_of_length_changes_no_mask(tmp_path, key):
    values = {
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<pad>"},
    }  # fmt: skip
    raw = json.loads((TARGET / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {key: values[key]}))
    loaded = tokenizer.load(tmp_path)._tokenizer
    assert loaded.backend_tokenizer.truncation is None and loaded.backend_tokenizer.padding is None
    grammars = Grammars(loaded, VOCAB, ENDS)
    assert grammars.tokenizer.tokenize_str("def f(a)") == loaded.encode("def f(a)", add_special_tokens=False)
