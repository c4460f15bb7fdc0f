"""A reply ends on any token that a folder's files say ends it: both configs, the tokenizer's own, the turn closers."""

import json
from pathlib import Path

import pytest

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.files import hub

GREEDY = SamplingParams(max_tokens=200, temperature=0.0)


def folder_of(path: Path, ends: object, generation: object = None, without: tuple[str, ...] = ()) -> Path:
    """The bundled target by links, with other end tokens. generation: those of generation_config.json, if there is one.

    without: names of files that are left out.
    """
    path.mkdir()
    for file in (hub.DEMO / "target").iterdir():
        if file.name not in ("config.json", "generation_config.json", *without):
            (path / file.name).symlink_to(file)
    config = json.loads((hub.DEMO / "target" / "config.json").read_text())
    text = {"text_config": config["text_config"] | {"eos_token_id": ends}} if "text_config" in config else {}
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": ends} | text))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "do_sample": False}))
    return path


@pytest.mark.parametrize("ends, generation", [(1, None), ([1, 6], None), (1, 1), ([1, 9], 8)])
def test_end_tokens_are_the_union_of_what_a_folder_says(tmp_path, ends, generation):
    engine = load(folder_of(tmp_path / "target", ends, generation), "none")
    said = {*(ends if isinstance(ends, list) else [ends]), *([] if generation is None else [generation])}
    assert engine.end_tokens == {1, 6, 14} | said


def test_a_reply_ends_with_its_turn_whatever_the_configs_leave_out(tmp_path):
    prompt = "Write the Python method `__len__(self)` for the class `uname_result`."
    usual = load(draft_model="none").generate(prompt, GREEDY)
    assert usual.finish_reason == "stop"
    altered = load(folder_of(tmp_path / "target", 1, 1), hub.DEMO / "drafter", num_draft_tokens=3)
    assert altered.generate(prompt, GREEDY).tokens == usual.tokens


def test_a_folder_without_a_template_says_so_once_an_engine(tmp_path):
    folder, told = folder_of(tmp_path / "target", 1, without=("chat_template.jinja",)), []
    engine = load(folder, "none", notice=told.append)
    short = SamplingParams(max_tokens=2, temperature=0.0)
    before = len(told)
    first = engine.generate("def f(", short)
    assert engine.generate(["def f(", "x"], short)[0].tokens == first.tokens
    assert engine.generate("def f(", short, chat_template=False).tokens == first.tokens
    assert [note for note in told[before:] if "no chat template" in note] == told[before:] != []
    assert len(told) == before + 1
    with pytest.raises(UserError, match="has no chat template"):
        engine.generate([{"role": "user", "content": "Hi"}], short)
