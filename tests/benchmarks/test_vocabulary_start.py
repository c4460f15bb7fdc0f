"""The made-up vocabulary is of Gemma 4's size and make; what its start costs is measured on any folder."""

import json

import pytest
from tokenizers import Tokenizer

from benchmarks import full_vocabulary
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


def test_the_start_is_measured(capsys):
    pytest.importorskip("llguidance")
    pytest.importorskip("rich")
    from benchmarks import vocabulary_start

    assert vocabulary_start.main(["--model", str(hub.DEMO / "target"), "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "4,096 tokens" in out and "the first constrained request" in out
    found = vocabulary_start.measure(hub.DEMO / "target", 1)
    assert found["ratios"].keys() == {"tokenizer", "grammar"} and all(
        len(runs) == 1 for runs in found["seconds"].values()
    )


def test_bad_input_is_named(tmp_path, capsys):
    from benchmarks import vocabulary_start

    assert vocabulary_start.main(["--repeats", "0"]) == 2
    assert vocabulary_start.main(["--model", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert "--repeats is 0" in err and "no tokenizer.json" in err and "Traceback" not in err
