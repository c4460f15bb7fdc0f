"""Folders in both directions: what `convert` writes opens in mlx-lm and mlx-vlm, what they write opens in `load`.

Each time the greedy tokens are the same in float32: ours with and without drafts, mlx-lm's, mlx-vlm's with and without
a drafter. The peers are those installed (extra `bench`); the sources are those of tests/checkpoints.py.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from checkpoints import FORMATS, KINDS, V, pair

from convert.cli import main as convert_main
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.engine.engine import Engine

pytest.importorskip("mlx_vlm", reason="the peers are not installed (extra `bench`)")

PROMPT = [2, *np.random.default_rng(0).integers(20, 4000, 26).tolist()]  # past the window of 16
COUNT, DRAFTS = 12, 3
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
CENTROIDS = ("E2B", "E4B")
OURS = {
    name: FORMATS[name]
    for name in ("bf16", "8 bit", "4 bit", "3 bit", "mxfp4", "mxfp8", "nvfp4", "qat-q4_0", "uniform")
}
THEIRS = {
    "bf16": {},
    "8 bit": {"quantize": True, "q_bits": 8, "q_group_size": 64},
    "4 bit": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "mixed": {"quantize": True, "q_bits": 4, "q_group_size": 64, "quant_predicate": "mixed_4_6"},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8", "q_bits": 8, "q_group_size": 32},
}


def cells(forms: dict, odd: str, even: str):
    """Every kind in every format; slow but for the odd kinds in one format and the even ones in another."""
    plain = {(kind, (even, odd)[i % 2]) for i, kind in enumerate(KINDS)}
    mark = lambda cell: () if cell in plain else pytest.mark.slow  # noqa: E731
    return [pytest.param(k, form, id=f"{k}, {form}", marks=mark((k, form))) for form in forms for k in KINDS]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def float32_embeddings(monkeypatch):
    """Embeddings in the FP modes come out of MLX as bfloat16, whatever `set_dtype` said: the peers are compared in
    float32 too. The stored values are exact in either.
    """
    rows = nn.QuantizedEmbedding.__call__
    monkeypatch.setattr(nn.QuantizedEmbedding, "__call__", lambda self, x: rows(self, x).astype(mx.float32))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Callable[[str], Path]:
    """kind -> the published target's folder, its drafter beside it; written once.

    mlx-lm reads the vocabulary at the top level of config.json, 262,144 where it is not named: a small one must be.
    """
    folders: dict[str, Path] = {}

    def written(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = pair(tmp_path_factory.mktemp("hf"), kind)
            config = json.loads((folders[kind] / "config.json").read_text())
            (folders[kind] / "config.json").write_text(json.dumps(config | {"vocab_size": V}))
        return folders[kind]

    return written


@dataclass(frozen=True)
class Written:
    """A folder that we converted, and the tokens that our engine makes from it."""

    folder: Path
    engine: Engine
    tokens: list[int]

    @property
    def drafter(self) -> Path:
        return Path(f"{self.folder}-assistant")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> Callable[[str, str], Written]:
    """(kind, format) -> what we write; made once."""
    made: dict[tuple[str, str], Written] = {}

    def convert(kind: str, form: str) -> Written:
        if (kind, form) not in made:
            out = tmp_path_factory.mktemp("mlx") / "out"
            flags = ["--hf-path", str(source(kind)), "--mlx-path", str(out), "--pair", *OURS[form]]
            assert convert_main(flags) == 0
            made[kind, form] = Written(out, *opened(out))
        return made[kind, form]

    return convert


def opened(folder: Path, drafter: Path | str = "auto") -> tuple[Engine, list[int]]:
    """Our engine on a folder, and its greedy tokens, the same with and without drafts."""
    engine = load(str(folder), str(drafter), num_draft_tokens=4, dtype="float32")
    plain, drafted = (engine.generate(PROMPT, GREEDY, num_draft_tokens=drafts) for drafts in (0, DRAFTS))
    assert plain.tokens == drafted.tokens and len(plain.tokens) == COUNT
    assert drafted.stats.mtp == (drafter != "none")
    return engine, plain.tokens


def mlx_lm_agrees(folder: Path, engine: Engine, tokens: list[int]) -> None:
    """mlx-lm's greedy tokens on a folder are `tokens`, and its logits of the whole text are ours."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    assert [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=COUNT)] == tokens
    text = PROMPT + tokens
    ours, _, _ = reference.forward(engine.target, text)
    assert np.abs(np.array(model(mx.array([text]))[0]) - ours).max() < 1e-3


def mlx_vlm_tokens(folder: Path, drafter: Path | None = None) -> list[int]:
    """mlx-vlm's greedy tokens on a folder, drafted if a drafter is given."""
    from mlx_vlm import load as load_vlm
    from mlx_vlm.generate import stream_generate
    from mlx_vlm.speculative.drafters import load_drafter

    model, processor = load_vlm(str(folder))
    model.set_dtype(mx.float32)
    processor.tokenizer.stopping_criteria.eos_token_ids = []
    options = {}
    if drafter:
        draft_model, kind = load_drafter(str(drafter))
        draft_model.set_dtype(mx.float32)
        options = {"draft_model": draft_model, "draft_kind": kind, "draft_block_size": DRAFTS + 1}
    settings = {"input_ids": mx.array([PROMPT]), "max_tokens": COUNT, "temperature": 0.0} | options
    *_, last = stream_generate(model, processor, "", **settings)
    assert not drafter or len(draft_model.accept_lens) > 0  # it did draft
    return [int(token) for token in last.token_ids]


# ---- what we write opens in the peers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "form"), cells(OURS, "4 bit", "bf16"))
def test_mlx_lm_opens_what_we_write(written, kind, form):
    ours = written(kind, form)
    mlx_lm_agrees(ours.folder, ours.engine, ours.tokens)


@pytest.mark.parametrize(("kind", "form"), cells(OURS, "4 bit", "bf16"))
def test_mlx_vlm_opens_what_we_write(written, kind, form):
    """Plain, and with the drafter, whose centroid head `--pair` leaves in float: mlx-vlm 0.7.10 gathers rows of a
    packed table as if they were floats.
    """
    ours = written(kind, form)
    assert mlx_vlm_tokens(ours.folder) == ours.tokens
    assert mlx_vlm_tokens(ours.folder, ours.drafter) == ours.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_we_write_what_mlx_lm_writes(source, tmp_path, kind):
    """The same names, and the same bits: in bfloat16, and in 4 bits by the recipe that is mlx-lm's own."""
    from mlx_lm.convert import convert

    for form, flags in (("bf16", ()), ("4 bit", OURS["uniform"])):
        ours, theirs = tmp_path / f"ours {form}", tmp_path / f"theirs {form}"
        assert convert_main(["--hf-path", str(source(kind)), "--mlx-path", str(ours), *flags]) == 0
        convert(str(source(kind)), str(theirs), **THEIRS[form])
        ours, theirs = tensors(ours), tensors(theirs)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and mx.array_equal(value, theirs[name]), name


# ---- what the peers write opens here -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "form"), cells(THEIRS, "bf16", "4 bit"))
def test_we_open_what_mlx_lm_writes(source, tmp_path, kind, form):
    """The text model alone; Google's drafter as it is."""
    from mlx_lm.convert import convert

    convert(str(source(kind)), str(tmp_path / "out"), **THEIRS[form])
    engine, tokens = opened(tmp_path / "out", f"{source(kind)}-assistant")
    mlx_lm_agrees(tmp_path / "out", engine, tokens)


@pytest.mark.parametrize(("kind", "form"), cells(THEIRS, "bf16", "4 bit"))
def test_we_open_what_mlx_vlm_writes(source, tmp_path, kind, form):
    """With the vision and audio tensors in the file, the 12B as gemma4_unified; the drafter converted likewise."""
    from mlx_vlm.convert import convert

    target, drafter = tmp_path / "gemma", tmp_path / "gemma-assistant"
    convert(str(source(kind)), target, **THEIRS[form])
    # mlx-vlm's mixed recipes look for model.layers, which its drafter does not have.
    convert(f"{source(kind)}-assistant", drafter, **THEIRS["4 bit" if form == "mixed" else form])
    assert any(name.startswith(("vision_", "embed_vision.")) for name in tensors(target))
    engine, tokens = opened(target)
    assert engine.drafter is not None and mlx_vlm_tokens(target) == tokens
    if kind not in CENTROIDS or form == "bf16":
        assert mlx_vlm_tokens(target, drafter) == tokens
    mlx_lm_agrees(target, engine, tokens)


def tensors(folder: Path) -> dict[str, mx.array]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in mx.load(str(file)).items()}


def eight_bits(*ends: str) -> Callable:
    """A predicate of the peers: modules that end so get 8 bits, all others the default."""
    return lambda path, _: {"group_size": 64, "bits": 8} if path.endswith(ends) else True


# Overrides in the published config.json of two packs of mlx-community.
PACKS = {
    "gemma-4-26b-a4b-it-4bit": ("26B-A4B", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "router.proj")),
    "gemma-4-12B-it-qat-4bit": ("12B", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
}


@pytest.mark.parametrize("pack", PACKS)
def test_overrides_of_published_packs(source, tmp_path, pack):
    """Made by mlx-lm with the recipe of the pack, in a folder of its name; Google's drafter under mlx-community's."""
    from mlx_lm.convert import convert

    kind, eight = PACKS[pack]
    folder = tmp_path / pack
    convert(str(source(kind)), str(folder), **THEIRS["4 bit"], quant_predicate=eight_bits(*eight))
    config = json.loads((folder / "config.json").read_text())
    overrides = {path for path, value in config["quantization"].items() if isinstance(value, dict)}
    assert len(overrides) == len(eight) * config["text_config"]["num_hidden_layers"]
    config["eos_token_id"] = [1, 106, 50]
    (folder / "config.json").write_text(json.dumps(config))
    beside = tmp_path / f"{pack.removesuffix('-4bit')}-assistant-bf16"
    beside.symlink_to(f"{source(kind)}-assistant")
    engine, tokens = opened(folder)
    assert engine.drafter is not None and engine.target.config.eos_token_ids == (1, 106, 50)
    mlx_lm_agrees(folder, engine, tokens)


@pytest.mark.parametrize("kind", ["E2B", pytest.param("26B-A4B", marks=pytest.mark.slow)])
def test_we_open_the_text_model_alone(source, tmp_path, kind):
    """model_type gemma4_text, tensors named model.X: a text-only Hugging Face folder, converted by mlx-lm to 4 bits."""
    from mlx_lm.convert import convert

    config = json.loads((source(kind) / "config.json").read_text())["text_config"]
    shutil.copytree(source(kind), tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma4ForCausalLM"]}))
    held = tensors(source(kind))
    text = {name.replace("language_model.", ""): held[name] for name in held if "language_model." in name}
    mx.save_safetensors(str(tmp_path / "hf" / "model.safetensors"), text)
    convert(str(tmp_path / "hf"), str(tmp_path / "out"), **THEIRS["4 bit"])
    assert "model.embed_tokens.scales" in tensors(tmp_path / "out")
    engine, tokens = opened(tmp_path / "out", f"{source(kind)}-assistant")
    mlx_lm_agrees(tmp_path / "out", engine, tokens)
