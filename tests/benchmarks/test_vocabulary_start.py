"""The made-up vocabulary is of Gemma 4's size and make; what its start costs is measured on any folder."""

import json

import pytest
from tokenizers import Tokenizer

from benchmarks import full_vocabulary
from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.files import hub


@pytest.fixture(scope="module")
def made() -> dict:
    return full_vocabulary.tokenizer()


def test_the_ids_are_gemmas(made):
    vocabulary = made["model"]["vocab"]
    assert list(vocabulary.values()) == list(range(262_144))
    assert vocabulary["<|turn>"] == 105 and vocabulary["<|video|>"] == 258_884 and vocabulary["\n"] == 107
    assert vocabulary["user"] == 2364 and vocabulary["model"] == 4368 and vocabulary["system"] == 9731
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(238, 494))
    assert [(each["content"], each["id"]) for each in made["added_tokens"]] == [
        (token, vocabulary[token]) for token in full_vocabulary.CONTROL.values()
    ]


def test_a_merge_joins_two_tokens_into_a_third(made):
    vocabulary, merges = made["model"]["vocab"], made["model"]["merges"]
    assert len(merges) == len(set(merges)) > 450_000  # Google's has 514,906
    assert all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in merges)
    results = {vocabulary[a + b] for a, b in merges}
    assert len(results) > 236_000, "a piece that no merge makes is never used"


def test_the_tokenizers_library_takes_it_and_gives_texts_back(made):
    tokenizer = Tokenizer.from_str(json.dumps(made))
    for text in ("<|turn>user\nabc  déf 漢字 😀\n\n<turn|>\n", " leading", "\x00\t"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text and 2 not in ids
    assert tokenizer.encode("<|turn>\n").ids == [105, 107]


def test_it_is_the_same_each_time(made):
    assert full_vocabulary.tokens() == list(made["model"]["vocab"])


def test_the_start_is_measured(tmp_path):
    pytest.importorskip("llguidance")
    from benchmarks.vocabulary_start import LLGUIDANCE, READ, start

    found = {record["path"]: record for record in start(hub.DEMO / "target", 2)}
    assert found["Text(folder)"]["over"] == READ and found["Text(folder)"]["limit"] == 1.3
    assert (
        found["first constrained request"]["over"] == LLGUIDANCE and found["first constrained request"]["limit"] == 1.2
    )
    for name in (READ, LLGUIDANCE):
        assert found[name]["cpu_ratio"] == (1, 1, 1) and found[name]["limit"] is None
    assert all(record["wall_ms"] > 0 and record["repeats"] == 2 for record in found.values())
    with pytest.raises(UserError, match="has no tokenizer"):
        start(tmp_path, 1)
