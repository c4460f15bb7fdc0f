"""Loading a tokenizer: what mlx_lm's own loading gives, with one reading of a file that may have 32 MB."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlx_lm.tokenizer_utils import load as load_as_mlx_lm
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.files import folder as folders
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text import tokenizer, tokenizer_files
from mlx_gemma_mtp.text.encode import Text

TARGET = hub.DEMO / "target"
VOCAB = 4096
WORDS = 'def f(a):\n    return "é漢😀"\t<|turn>user\n<bos> <0x41> \u2581\u2581  <mask><|new|><|turn>'
NAMES = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}

_opened: list[str] = []  # of Python; the tokenizers library opens files by itself


def _listen(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TARGET / name, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys) if path.exists() else json.dumps(keys))


SPLIT = {
    "pre_tokenizer": {  # Google's, from which transformers' GemmaTokenizer does not depart
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FOLDERS = {
    "as it is": {},
    "Google's class": {"tokenizer.json": SPLIT, "tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer"}},
    "no post-processor, Google's class": {
        "tokenizer.json": SPLIT | {"post_processor": None}, "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer"}},
    "names of Google's": {"tokenizer_config.json": {"eot_token": "<turn|>", "extra_special_tokens": ["<|think|>"]}},
    "a new token": {"tokenizer_config.json": {"extra_special_tokens": ["<|new|>"]}},
    "a new token in a file": {"added_tokens.json": {"<|new|>": VOCAB}},
    "a map": {"special_tokens_map.json": {"pad_token": {"content": "<|turn>", "lstrip": True}, "eos_token": "<turn|>"}},
    "no post-processor": {"tokenizer.json": {"post_processor": None}},
    "another decoder": {"tokenizer.json": {"decoder": BYTE_LEVEL}},
    "no decoder": {"tokenizer.json": {"decoder": None}},
    "truncation": {"tokenizer.json": {"truncation": {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}}},
    "padding": {"tokenizer.json": {"padding": {
        "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>"}}},
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_tokenizer_is_what_mlx_lm_itself_loads(folder, case):
    for name, keys in FOLDERS[case].items():
        change(folder / name, **keys)
    ours = tokenizer.load(folder)
    theirs = load_as_mlx_lm(folder, {"config": PreTrainedConfig(), **tokenizer.UNUSED})
    assert ours.encode(WORDS) == theirs.encode(WORDS)
    for special in (False, True):
        ids = ours.encode(WORDS, add_special_tokens=special)
        assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    for name in ("all_special_tokens", "special_tokens_map", "chat_template", "think_end_tokens", "eos_token_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert dict(ours.get_vocab()) == theirs.get_vocab() and len(ours.get_vocab()) == len(ours) == len(theirs)
    assert type(ours.detokenizer) is type(theirs.detokenizer)
    ids = list(range(0, len(ours), 7))
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(ids[0]) == theirs.convert_ids_to_tokens(ids[0])


@pytest.mark.parametrize("settings", [None, {}, {"tokenizer_class": "LlamaTokenizer"}], ids=str)
def test_special_tokens_without_a_name_have_gemmas(folder, settings):
    """transformers would make LlamaTokenizer's pieces of the vocabulary, with special tokens that Gemma has not."""
    (folder / "tokenizer_config.json").unlink()
    if settings is not None:
        change(folder / "tokenizer_config.json", **settings)
    ours = tokenizer.load(folder)
    assert {name: getattr(ours, name) for name in NAMES} == NAMES
    assert ours.encode(WORDS) == tokenizer.load(TARGET).encode(WORDS) and len(ours) == VOCAB


def test_the_class_that_a_folder_names_does_not_change_the_tokens(folder):
    """transformers' GemmaTokenizer would split text by rules of its own in place of the file's."""
    before = tokenizer.load(folder).encode(WORDS)
    for name in ("GemmaTokenizer", "GemmaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "x"):
        change(folder / "tokenizer_config.json", tokenizer_class=name)
        assert tokenizer.load(folder).encode(WORDS) == before, name


def test_a_name_that_the_vocabulary_has_not_is_not_made_up(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<mask>"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "x"}))
    ours = tokenizer.load(folder)
    assert ours.mask_token is None and ours.bos_token == "<bos>" and len(ours) == VOCAB


@pytest.fixture
def large(folder, monkeypatch) -> Path:
    """A folder whose tokenizer counts as one that takes long to parse."""
    monkeypatch.setattr(tokenizer_files, "LARGE", 10)
    monkeypatch.setattr(folders, "LARGE", 10)
    return folder


@pytest.fixture
def parsed(monkeypatch) -> list[int]:
    """The sizes of what the tokenizers library parses."""
    found = []

    def from_buffer(data: bytes) -> Tokenizer:
        found.append(len(data))
        return Tokenizer.from_buffer(data)

    monkeypatch.setattr(tokenizer, "Tokenizer", SimpleNamespace(from_buffer=from_buffer))
    return found


def reads(path: Path) -> int:
    return sum(os.path.realpath(name) == str(path.resolve()) for name in _opened)


def test_a_large_file_is_parsed_once_and_never_in_python(large, parsed, monkeypatch):
    path = large / "tokenizer.json"
    for module in (tokenizer, tokenizer_files, folders):
        real = module.read_object
        monkeypatch.setattr(
            module, "read_object", lambda file, real=real: pytest.fail("parsed") if file == path else real(file)
        )
    _opened.clear()
    Text(large, VOCAB)
    assert parsed == [path.stat().st_size]
    assert reads(path) == 2  # first its two ends are looked at


def test_a_vocabulary_is_not_walked_through_for_a_token(large, monkeypatch):
    monkeypatch.setattr(tokenizer._Vocabulary, "__iter__", lambda _: pytest.fail("the whole vocabulary"))
    text = Text(large, VOCAB)
    known = text.tokenizer.get_vocab()
    assert known["<|channel>"] == known.get("<|channel>") == 7 and "<pad>" in known
    assert known.get("<channel>") is None and "<channel>" not in known
    maps = [text.tokenizer.detokenizer.tokenmap for _ in range(2)]
    assert maps[0] is maps[1]  # made once, not for each request


def test_ids_with_a_gap_are_refused_whatever_the_decoder(large):
    raw = json.loads((large / "tokenizer.json").read_text())
    raw["model"]["vocab"]["++"] = 5000
    for decoder in (raw["decoder"], BYTE_LEVEL, None):
        (large / "tokenizer.json").write_text(json.dumps(raw | {"decoder": decoder}))
        with pytest.raises(UserError, match="none with the id 4095"):
            Text(large, 6000)


ADDED = {
    "a gap": ({"content": "<|new|>", "id": 5000}, "none with the id 4096"),
    "another token's id": ({"content": "<|new|>", "id": 700}, "'<|new|>' has the id 700 among added_tokens"),
    "a token of another id": ({"content": "<|turn>", "id": 700}, "'<|turn>' has the id 700 among added_tokens"),
}


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("case", ADDED)
def test_an_added_token_has_the_id_that_the_file_says(request, folder, case, size):
    """The tokenizers library would give it another one and say nothing."""
    if size == "large":
        request.getfixturevalue("large")
    keys, message = ADDED[case]
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][-1] | keys)
    (folder / "tokenizer.json").write_text(json.dumps(raw, indent=2))
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        Text(folder, VOCAB)
    assert "tokenizer.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("count", [0, 1, 400, 4000])
def test_added_tokens_are_found_in_a_file_that_is_not_parsed(count):
    tokens = [{"id": 3 * id, "content": f'é漢😀 ]}}"added_tokens": [ {id}'} for id in range(count)]
    expected = [(each["content"], each["id"]) for each in tokens]
    for before in ({}, {"model": {"vocab": {"added_tokens": 5, '"added_tokens": [7]': 6}}}):
        for indent in (None, 2):
            raw = before | {"added_tokens": tokens, "model": 5}
            for ascii in (True, False):
                data = json.dumps(raw, indent=indent, ensure_ascii=ascii).encode()
                assert tokenizer_files.listed_tokens(data) == expected
    assert tokenizer_files.listed_tokens(b'{"model": {"vocab": {"added_tokens": 1}}}') == []


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified", "gemma_of_tomorrow"])
@pytest.mark.parametrize("name", ["GemmaTokenizer", "LlamaTokenizer", "Gemma4Tokenizer", None])
def test_loading_says_nothing(folder, capfd, name, kind):
    """transformers warns of a model_type that it does not know, which is not asked for: config.json is not read."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    change(folder / "tokenizer_config.json", tokenizer_class=name)
    Text(folder, VOCAB)
    assert capfd.readouterr() == ("", "")
