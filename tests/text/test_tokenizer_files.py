"""A tokenizer that cannot be loaded is refused in a line that names the file; what nobody reads refuses nothing."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_gemma_mtp import UserError, load
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.text import tokenizer_files
from mlx_gemma_mtp.text.encode import Text

TARGET = hub.DEMO / "target"
VOCAB = 4096


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(TARGET, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **keys) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | keys))


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and "attribute" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("value", [True, [], [5000], 1.0, "x", 10**30], ids=str)
def test_what_the_config_says_of_unused_ids_refuses_nothing(folder, value):
    change(folder / "config.json", boi_token_id=value, eoa_token_index=value, transformers_version=value)
    assert Text(folder, VOCAB).encode("hello") == Text(TARGET, VOCAB).encode("hello")


@pytest.mark.parametrize("value", [[], [5000], 1.0, None], ids=str)
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_media_ids_that_mean_something_are_taken(folder, kind, value):
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= {"eos_token_id": 1.0, "pad_token_id": "x"}
    (folder / "config.json").write_text(json.dumps(raw | {f"{kind}_token_id": value}))
    assert load(folder, "none").text.encode("hello") == Text(TARGET, VOCAB).encode("hello")


@pytest.mark.parametrize("value", [True, "x", -1, [None, [1]], {}, 10**30], ids=str)
def test_media_ids_without_a_meaning_name_the_config(folder, value):
    change(folder / "config.json", image_token_id=value)
    refused(lambda: load(folder, "none"), "config.json: image_token_id has", "expected a token id")


SETTINGS = {
    "eos_token": [5, [], True, {"a": 1}, {"content": 5}],
    "bos_token": [5, ["<bos>"]],
    "extra_special_tokens": [5, [5], "x"],
    "additional_special_tokens": [5, {"a": 5}],
    "padding_side": ["up", 5],
}
CONFIG = SETTINGS | {
    "tokenizer_class": [5, []],
    "added_tokens_decoder": [5, [1], {"x": "a"}, {"1": 5}],
    "chat_template": [5, ["x"], [{"name": "default"}], {"default": 5}],
    "truncation_side": [[]],
    "model_specific_special_tokens": [5, "x"],
}


@pytest.mark.parametrize(
    "name, key, value",
    [("tokenizer_config.json", key, value) for key, values in CONFIG.items() for value in values]
    + [("special_tokens_map.json", key, value) for key, values in SETTINGS.items() for value in values],
    ids=str,
)
def test_settings_are_named_before_any_weight_is_read(folder, monkeypatch, name, key, value):
    change(folder / name, **{key: value})
    monkeypatch.setattr(loading, "prepare", lambda *_: pytest.fail("weights are read"))
    refused(lambda: load(folder, "none"), f"{name}: {key} is", "expected")


@pytest.mark.parametrize("id", ["x", -1, 1.5, True, None])
def test_added_ids_are_named(folder, id):
    change(folder / "added_tokens.json", **{"<new>": id})
    refused(lambda: load(folder, "none"), f"added_tokens.json: '<new>' has the id {id!r}", "expected")


VOCABULARIES = {
    "gap": (lambda vocab: vocab | {"++": 5000}, "5000"),
    "no first": (lambda vocab: {k: v + 1 for k, v in vocab.items()}, "none with the id 0"),
    "twice": (lambda vocab: vocab | {"++": 7}, "both have the id 7"),
    "negative": (lambda vocab: vocab | {"++": -7}, "the id -7"),
    "text": (lambda vocab: vocab | {"++": "7"}, "the id '7'"),
    "huge": (lambda vocab: vocab | {"++": 10**400}, "1000"),
}


@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_vocabulary_with_strange_ids_is_named(folder, monkeypatch, case, large):
    """A small one before any weight is read, a large one when it is loaded."""
    alter, part = VOCABULARIES[case]
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] = alter(raw["model"]["vocab"])
    raw["added_tokens"] = []
    path.write_text(json.dumps(raw))
    if large:
        monkeypatch.setattr(tokenizer_files, "LARGE", 10)
    else:
        monkeypatch.setattr(loading, "prepare", lambda *_: pytest.fail("weights are read"))
    refused(lambda: load(folder, "none"), f"{path}", part, "download it again")


@pytest.mark.parametrize(
    "name, keys",
    [
        ("tokenizer_config.json", {"chat_template_type": "x"}),
        ("tokenizer_config.json", {"model_input_names": 7}),
        ("tokenizer.json", {"decoder": 5}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "x"}}),
    ],
    ids=str,
)
def test_whatever_the_libraries_refuse_names_the_file(folder, name, keys):
    change(folder / name, **keys)
    refused(lambda: Text(folder, VOCAB), f"{folder / name} cannot be used", "download it again")


def test_what_is_not_used_refuses_nothing(folder):
    change(folder / "tokenizer_config.json", tool_parser_type="x", backend=5, model_max_length="long")
    change(folder / "special_tokens_map.json", x=[1])
    assert Text(folder, VOCAB).encode("hello") == Text(TARGET, VOCAB).encode("hello")


def test_a_generation_config_written_by_hand_is_read(folder):
    path = folder / "generation_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"do_sample": True, "top_k": 5, "x": float("nan")}).encode())
    assert loading.read_generation_defaults(folder).top_k == 5
    for text in ("[]", "5", "null", "[" * 100_000, '{"top_k": NaN, "do_sample": true}', '{"a":'):
        path.write_text(text)
        refused(lambda: loading.read_generation_defaults(folder), "generation_config.json", "expected")
