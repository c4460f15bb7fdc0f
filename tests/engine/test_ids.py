"""No id from a file, a request or a tokenizer reaches an array unchecked: beyond its rows lies other memory."""

import json
import shutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text.encode import Text

TARGET, DRAFTER = hub.DEMO / "target", hub.DEMO / "drafter"
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
VOCAB = 4096


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(num_draft_tokens=2)


def altered(folder: Path, source: Path, name: str, change) -> Path:
    """A bundled folder with links to its files, and another JSON object in one of them."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    raw = json.loads((source / name).read_text())
    (folder / name).write_text(json.dumps(change(raw)))
    return folder


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("key", ["suppress_tokens", "eos_token_id"])
@pytest.mark.parametrize("ids", [[VOCAB], [5, 5000], [100_000_000], [-1], [True], [2.5], ["5"]], ids=str)
def test_ids_of_the_generation_config(tmp_path, key, ids):
    folder = altered(tmp_path / "target", TARGET, "generation_config.json", lambda raw: raw | {key: ids})
    refused(lambda: load(folder, "none"), f"generation_config.json: {key}", "expected")


@pytest.mark.parametrize("ids", [VOCAB, [1, 10**9], [-1], [False], ["1"]], ids=str)
def test_end_tokens_of_the_config(tmp_path, ids):
    folder = altered(tmp_path / "target", TARGET, "config.json", lambda raw: raw | {"eos_token_id": ids})
    refused(lambda: load(folder, "none"), "config.json: eos_token_id has", "expected")


PROMPTS = [
    [2, VOCAB, 5],
    [2, 5000],
    [-1],
    [2, 2**31],
    [2, 2**40],
    [2, 2**70],
    [2, True],
    [True, False],
    [2, 5.0],
    [2.5],
    [2, None],
    [2, "a"],
    [2, [3]],
    [2, {"role": "user", "content": "x"}],
    [np.int64(2), np.int64(VOCAB)],
    np.array([2, VOCAB]),
    np.array([2, -5]),
    np.array([2.0, 3.0]),
    np.array([True, False]),
    np.array(5),
    mx.array([2, VOCAB]),
    mx.array([2.0]),
    [[2, 3], [2, VOCAB]],
    [np.array([2]), np.array([2, 10**12])],
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: str(prompt)[:30])
def test_ids_of_a_prompt(engine, prompt):
    refused(lambda: engine.generate(prompt, SHORT), "expected")


def test_biased_tokens(engine):
    for token in (VOCAB, 5000, 10**9, 2**31 - 1):
        refused(lambda token=token: engine.generate("x", SamplingParams(logit_bias={token: 1.0})), f"id {token}")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    """One that a prompt does not use does no harm; one that it uses is named, and so is one that a setting needs."""
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def added(raw: dict) -> dict:
        tokens = [common | {"id": VOCAB + i, "content": f"<extra{i}>"} for i in range(2)]
        return raw | {"added_tokens": raw["added_tokens"] + tokens}

    folder = altered(tmp_path / "target", TARGET, "tokenizer.json", added)
    engine = load(folder, DRAFTER, num_draft_tokens=2)
    usual = engine.generate("hello", SHORT).tokens
    assert len(usual) == 4
    for prompt in ("a<extra0>b", [2, VOCAB], ["hello", "<extra1>"]):
        raw = partial(engine.generate, prompt, SHORT, chat_template=False)
        refused(raw, "<extra", f"expected 0 to {VOCAB - 1}")
    message = [{"role": "user", "content": "<extra0>"}]
    refused(lambda: engine.text.encode(message, allow_special=True), "'<extra0>', token 4096")
    assert len(engine.generate(message, SHORT).tokens) == 4  # in a message it is text
    constrained = SamplingParams(max_tokens=4, regex="[ab]{3}", temperature=0.0)
    refused(lambda: engine.generate("x", constrained), "the tokenizer has 4098 tokens and the model 4096")


def test_a_tokenizer_with_gaps_is_refused(tmp_path):
    def gap(raw: dict) -> dict:
        vocab = raw["model"]["vocab"]
        last = max(vocab, key=vocab.__getitem__)
        return raw | {"model": raw["model"] | {"vocab": vocab | {last: 6000}}}

    folder = altered(tmp_path / "target", TARGET, "tokenizer.json", gap)
    refused(lambda: load(folder, "none"), str(folder), "tokenizer", "download")


def test_tokens_that_the_tokenizer_lacks_are_no_text():
    """A model's table may have more rows than its tokenizer has tokens."""
    stream = Text(TARGET, VOCAB + 64).stream(())
    a, b = Text(TARGET, VOCAB).tokenizer.encode("ab cd", add_special_tokens=False)[:2]
    pieces = [stream.push(token).text for token in (a, VOCAB, VOCAB + 63, b)]
    plain = Text(TARGET, VOCAB).stream(())
    whole = [plain.push(a), plain.push(b), plain.finish()]
    assert "".join(pieces) + stream.finish().text == "".join(piece.text for piece in whole)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_the_order_of_a_centroid_head(tmp_path, token):
    """The pair of E2B's kind: an entry that is no token of the vocabulary is found when the drafter is loaded."""
    source = Path(__file__).parents[1] / "data" / "e2b" / "drafter"
    folder = tmp_path / "drafter"
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors, metadata = mx.load(str(file), return_metadata=True)
    name = next(name for name in tensors if name.endswith("token_ordering"))
    ordering = np.array(tensors[name])
    ordering[3] = token
    mx.save_safetensors(str(file), tensors | {name: mx.array(ordering)}, metadata)
    refused(
        lambda: load(source.with_name("target"), folder), f"token_ordering has {token}", "expected token ids from 0"
    )
