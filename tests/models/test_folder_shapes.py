"""Loading, converting and inspecting judge a folder alike, whoever wrote it, and write what mlx-lm writes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import folder_shapes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from checkpoints import KINDS, V
from checkpoints import drafter as drafter_of
from checkpoints import target as target_of
from folder_shapes import FOUR, GOOGLE, OPENS, REFUSED, Shape, draft, head, inv_freq, per_layer_config

from convert.cli import main as convert
from mlx_gemma_mtp import load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.folder import read_config
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.models.config import TargetConfig

TEXT = [2, *np.random.default_rng(0).integers(20, V, 30).tolist()]  # past the window of 16


def numbers(folder: Path) -> np.ndarray:
    """The logits of a text, in float32."""
    return reference.forward(loading.load_target(folder, mx.float32), TEXT)[0]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        loading.open_target(folder)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def command(capsys, *argv: object) -> tuple[int, str]:
    """Exit code and what was said on standard error, without `error: `."""
    capsys.readouterr()
    code = convert([str(argument) for argument in argv])
    return code, capsys.readouterr().err.removeprefix("error: ").strip()


@pytest.fixture(autouse=True)
def float32_embeddings(monkeypatch):
    """mlx-lm looks up rows of FP4 and FP8 tables as bfloat16; it is compared in float32."""
    rows = nn.QuantizedEmbedding.__call__
    monkeypatch.setattr(nn.QuantizedEmbedding, "__call__", lambda self, x: rows(self, x).astype(mx.float32))


@pytest.mark.parametrize("name", OPENS)
def test_folders_that_open(tmp_path, capsys, name):
    shape = OPENS[name]
    folder = shape.write(tmp_path / "model")
    logits = numbers(folder)
    assert np.isfinite(logits).all() and logits.std() > 0.1
    code, error = command(capsys, "inspect", folder, "--json")
    assert code == 0, error
    code, error = command(capsys, "--hf-path", folder, "--mlx-path", tmp_path / "out", "--dtype", "float32")
    if shape.table is not None:
        assert code == 2 and "quantised already" in error
    else:
        assert code == 0, error
        np.testing.assert_array_equal(numbers(tmp_path / "out"), logits)
    if shape.mlx_lm:
        np.testing.assert_allclose(mlx_lm_logits(folder), logits, atol=1e-3)


def mlx_lm_logits(folder: Path) -> np.ndarray:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    soft = np.array(model(mx.array([TEXT]))[0])
    return soft if soft.dtype == np.float32 else soft.astype(np.float32)


# What mlx-lm cannot read at this size or in this spelling computes what its usual form computes.
TWINS = {
    "an override of the default's size without its mode": Shape(
        "26B-A4B", folder_shapes.MXFP4, {"mlp.down_proj": folder_shapes.MXFP4}
    ),
    **{
        f"overrides of {prefix}layers": Shape("12B", FOUR, dict.fromkeys(folder_shapes.MLP, folder_shapes.EIGHT))
        for prefix in (GOOGLE, "model.", "language_model.", "")
    },
    "quantization_config alone": Shape("12B", FOUR, dict.fromkeys(folder_shapes.MLP, folder_shapes.EIGHT)),
    "per_layer_config, E4B": Shape("E4B"),
    "per_layer_config, 26B": Shape("26B-A4B"),
    "per_layer_config, quantised": Shape("26B-A4B", FOUR),
    "per_layer_config, the text model alone": Shape("26B-A4B", FOUR),
    "the text model without a prefix": Shape("E2B"),
    "the text model of a wrapper": Shape("E2B"),
    "a module of wrappers": Shape("12B", FOUR, dict.fromkeys(folder_shapes.MLP, folder_shapes.EIGHT)),
    "per_layer_config beside the two keys": Shape("26B-A4B"),
    "per_layer_config of the width, the two keys' heads": Shape("26B-A4B"),
    "per_layer_config that is empty": Shape("26B-A4B"),
    "per_layer_config as a list": Shape("26B-A4B"),
    "per_layer_config that repeats": Shape("31B"),
    "the text model alone, text_config null": Shape("12B"),
    "the older name of the experts' width": Shape("26B-A4B"),
    "MLX's floats beside a table of AWQ": Shape("12B"),
    "a table of MLX with quant_method mxfp4": Shape("12B", folder_shapes.MXFP4),
    "keys with defaults left out": Shape("12B"),
    "the head once more": Shape("26B-A4B"),
    "the head once more, quantised": Shape("12B", FOUR),
    "norms of ones, biases of zeros": Shape("26B-A4B"),
    "K as V once more": Shape("31B"),
    "Google's names, quantised": Shape("26B-A4B", FOUR, {"router.proj": folder_shapes.EIGHT}),
    "Google's names": Shape("26B-A4B"),
    "MLX names, fused experts": Shape("26B-A4B"),
}


@pytest.mark.parametrize("name", TWINS)
def test_folders_that_say_the_same_in_other_words(tmp_path, name):
    usual = numbers(TWINS[name].write(tmp_path / "usual"))
    np.testing.assert_array_equal(numbers(OPENS[name].write(tmp_path / "model")), usual)


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_are_refused(tmp_path, capsys, name):
    """In the same words by all three."""
    shape = REFUSED[name]
    folder = shape.write(tmp_path / "model")
    said = refusal(folder)
    for part in shape.says:
        assert part in said
    code, error = command(capsys, "inspect", folder)
    assert code == 2 and agrees(error, said), error
    code, error = command(capsys, "--hf-path", folder, "--mlx-path", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    assert agrees(error, said), error


def agrees(error: str, said: str) -> bool:
    """One reason. What is no model of ours is named by each with the kinds that it takes."""
    kind = re.match(r"model_type '\w+'", said)
    return error.startswith(kind[0]) if kind else error == said


def test_comparing_a_head_reads_it_block_by_block(tmp_path, monkeypatch):
    """The table is the largest tensor: two of them in memory would double what a load takes."""
    from mlx_gemma_mtp.models import extras

    folder = Shape("12B", edit=head()).write(tmp_path / "model")
    other = REFUSED["another head by one value"].write(tmp_path / "other")
    float32 = OPENS["the head once more, in float32"].write(tmp_path / "float32")
    sizes, blocks = [], extras._blocks

    def counted(*arguments):
        for block in blocks(*arguments):
            sizes.append(len(block))
            yield block

    monkeypatch.setattr(extras, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(extras, "_blocks", counted)
    for each in (folder, float32):
        loading.open_target(each)
    assert max(sizes) <= 1000 and sum(sizes) == V * 128 * (2 + 2 + 2 + 4)
    assert "lm_head.weight differs" in refusal(other)


# ---- drafters ------------------------------------------------------------------------------------------------------

DRAFTERS = {
    "as published": draft,
    "per_layer_config": lambda kind: draft(kind, per_layer_config("{}")),
    "the head once more": lambda kind: draft(kind, head(name="lm_head")),
    "inverse frequencies": lambda kind: draft(kind, inv_freq()),
    "quantised": lambda kind: draft(kind, table=FOUR),
    "overrides of layers": lambda kind: draft(kind, table=FOUR, spelled=""),
    "quantization_config alone": lambda kind: draft(
        kind, lambda config, _: config.update(quantization_config=config.pop("quantization")), FOUR
    ),
    "the head once more, quantised": lambda kind: draft(kind, head(name="lm_head"), FOUR),
}


def config_of(kind: str) -> TargetConfig:
    return TargetConfig.from_dict(target_of(kind).config)


def weights(folder: Path, kind: str) -> dict[str, mx.array]:
    return dict(nn.utils.tree_flatten(loading.load_drafter(folder, config_of(kind)).parameters()))


@pytest.mark.parametrize("kind", ["E2B", "31B"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_that_open(tmp_path, capsys, kind, name):
    folder = DRAFTERS[name](kind).save(tmp_path / "model")
    usual = draft(kind, table=FOUR if "quanti" in name or "overrides" in name else None).save(tmp_path / "usual")
    found, meant = weights(folder, kind), weights(usual, kind)
    assert found.keys() == meant.keys()
    assert all(mx.array_equal(found[path], meant[path]).item() for path in meant)
    code, error = command(capsys, "inspect", folder)
    assert code == 0, error
    code, error = command(capsys, "--hf-path", folder, "--mlx-path", tmp_path / "out")
    quantised = loading.is_quantized(loading.open_drafter(folder, config_of(kind)))
    assert (code, "quantised already" in error) == ((2, True) if quantised else (0, False)), error


@pytest.mark.parametrize("kind", ["E2B", "31B"])
@pytest.mark.parametrize(
    "edit, says",
    [(head(lambda table: -table, "lm_head"), "lm_head.weight differs from model.embed_tokens.weight"),
     (inv_freq(2.0), "inv_freq differs"),
     (folder_shapes.without("centroids|post_projection"), "lacks tensor 'post_projection.weight'"),
     (folder_shapes.text(hidden_size=...), "has no 'hidden_size'")],
    ids=["head", "frequencies", "missing", "size"],
)  # fmt: skip
def test_drafters_that_are_refused(tmp_path, capsys, kind, edit, says):
    folder = draft(kind, edit).save(tmp_path / "model")
    with pytest.raises(UserError) as error:
        loading.open_drafter(folder, config_of(kind))
    assert says in str(error.value)
    for argv in (["inspect", folder], ["--hf-path", folder, "--mlx-path", tmp_path / "out"]):
        assert command(capsys, *argv) == (2, str(error.value))


# ---- advice --------------------------------------------------------------------------------------------------------


def by_name(name: str):
    """A case; slow unless names are what is odd about it."""
    plain = "names" in name or "second scale" in name or name == "no table"
    return pytest.param(name, marks=() if plain else pytest.mark.slow)


@pytest.mark.parametrize("name", [by_name(name) for name in (*OPENS, *REFUSED)])
def test_no_advice_leads_back(tmp_path, capsys, name):
    """What a refusal advises is done with the folder, and helps, unless something else is wrong with it."""
    folder, out = (OPENS | REFUSED)[name].write(tmp_path / "model"), tmp_path / "out"
    conversion = ["--hf-path", folder, "--mlx-path", out]
    said = [command(capsys, *argv)[1] for argv in (["check", folder], conversion) if not shutil.rmtree(out, True)]
    try:
        loading.open_target(folder)
    except UserError as error:
        said.append(str(error))
    for error in said:
        if "convert it first" in error and name in OPENS:
            shutil.rmtree(out, ignore_errors=True)
            assert command(capsys, *conversion)[0] == 0 and command(capsys, "check", out)[0] == 0
        if "use it as it is" in error:
            loading.open_target(folder)
        if "inspect it instead" in error and name in OPENS:
            assert command(capsys, "inspect", folder)[0] == 0
        assert "python -m convert" not in error


@pytest.mark.parametrize("kind", KINDS)
def test_published_folders_open_without_being_converted(tmp_path, kind):
    """Their tensors are those of a conversion under other names."""
    folder = target_of(kind).save(tmp_path / "hf")
    assert convert(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(numbers(folder), numbers(tmp_path / "out"))
    drafter_of(kind).save(tmp_path / "hf-assistant")
    loading.check_pair(folder, tmp_path / "hf-assistant")


def test_what_mlx_wrote_in_bf16_is_quantised(tmp_path):
    """A conversion is a source, too: its names are no hindrance."""
    folder = Shape("26B-A4B").write(tmp_path / "bf16")
    assert convert(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out"), "-q"]) == 0
    assert convert(["check", str(tmp_path / "out"), "--against", str(folder)]) == 0
    source = target_of("26B-A4B").save(tmp_path / "hf")
    assert convert(["--hf-path", str(source), "--mlx-path", str(tmp_path / "direct"), "-q"]) == 0
    np.testing.assert_array_equal(numbers(tmp_path / "out"), numbers(tmp_path / "direct"))


def test_a_12b_loads_without_a_word_of_transformers(tmp_path, capfd):
    """Where its tokenizers find a config.json, they say that the model_type is not the one that they make."""
    load(str(target_of("12B").save(tmp_path / "model")), "none", num_draft_tokens=0)
    out, err = capfd.readouterr()
    assert "model of type" not in out + err and err == ""


# ---- types ---------------------------------------------------------------------------------------------------------


def test_the_type_of_most_values_is_computed_in(tmp_path):
    for name, dtype in (("float16", mx.float16), ("one bf16 tensor in float16", mx.float16), ("towers", mx.bfloat16)):
        model = loading.load_target(OPENS[name].write(tmp_path / name))
        found = {v.dtype for _, v in nn.utils.tree_flatten(model.parameters()) if mx.issubdtype(v.dtype, mx.floating)}
        assert found == {dtype} and model.dtype == dtype


def test_values_beyond_the_type_of_most_are_refused(tmp_path):
    large = folder_shapes.add(lambda *_: {"language_model.model.norm.weight": mx.full((128,), 1e5, mx.bfloat16)})
    shape = Shape("12B", edit=folder_shapes.both(folder_shapes.cast(".", mx.float16), large))
    folder = shape.write(tmp_path / "model")
    assert "norm.weight has values beyond float16" in refusal(folder) and "dtype='bfloat16'" in refusal(folder)
    assert loading.open_target(folder, mx.bfloat16).dtype == mx.bfloat16


def test_a_config_of_a_written_folder_is_whole(tmp_path):
    """What was left out is written out: other readers have other defaults."""
    folder = OPENS["per_layer_config, E4B"].write(tmp_path / "model")
    assert convert(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")]) == 0
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["global_head_dim"] == 64 and "per_layer_config" not in text
    assert TargetConfig.from_dict(read_config(tmp_path / "out")) == TargetConfig.from_dict(read_config(folder))


@pytest.mark.parametrize("prefix", [GOOGLE, folder_shapes.MLX])
def test_experts_one_by_one_are_sent_to_convert(tmp_path, capsys, monkeypatch, prefix):
    """What the refusal advises makes a folder that computes the same."""

    def apart(_: dict, tensors: dict) -> None:
        for name in [name for name in tensors if ".switch_glu." in name]:
            base, _, last = name.partition("switch_glu.")
            tensors |= {f"{base}{e}.{last}": mx.contiguous(one) for e, one in enumerate(tensors.pop(name))}

    folder = Shape("26B-A4B", prefix=prefix, edit=apart).write(tmp_path / "my model")
    said = refusal(folder)
    monkeypatch.chdir(tmp_path)
    program, verb, *argv = shlex.split(said[said.index("mlx-gemma-mtp convert") :])
    assert (program, verb) == ("mlx-gemma-mtp", "convert")
    code, error = command(capsys, *argv)
    assert code == 0, error
    usual = numbers(Shape("26B-A4B").write(tmp_path / "usual"))
    np.testing.assert_array_equal(numbers(tmp_path / "my model-mlx"), usual)


@pytest.mark.parametrize("kind", ["E2B", "26B-A4B"])
@pytest.mark.parametrize(
    "said", [{"enable_moe_block": True}, {"hidden_size_per_layer_input": 256}, {"num_experts": ...}], ids=str
)
def test_what_no_drafter_reads_refuses_none(tmp_path, capsys, kind, said):
    """Loading, converting and inspecting agree."""
    folder = draft(kind, folder_shapes.text(**said)).save(tmp_path / "drafter")
    loading.load_drafter(folder, TargetConfig.from_dict(target_of(kind).config | {"vocab_size": V}))
    code, error = command(capsys, "inspect", folder)
    assert code == 0, error
    code, error = command(capsys, "--hf-path", folder, "--mlx-path", tmp_path / "out")
    assert code == 0, error


def test_a_table_beside_tensors_of_another_program_is_still_refused(tmp_path):
    """Names of Google, although the weights are floats: who wrote them cannot be told."""
    edit = folder_shapes.top(quantization_config=folder_shapes.AWQ)
    folder = Shape("12B", prefix=GOOGLE, edit=edit).write(tmp_path / "model")
    with pytest.raises(UserError, match="AWQ"):
        read_config(folder)


def test_a_conversion_leaves_the_table_of_the_original_out(tmp_path, capsys):
    edit = folder_shapes.top(quantization_config=folder_shapes.AWQ)
    folder = Shape("12B", edit=edit).write(tmp_path / "model")
    assert "quantization_config" not in read_config(folder)
    assert command(capsys, "--hf-path", folder, "--mlx-path", tmp_path / "out")[0] == 0
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("table", [folder_shapes.FP8, folder_shapes.PACKED], ids=["FP8", "compressed-tensors"])
def test_a_table_of_another_format_than_the_tensors(tmp_path, capsys, table):
    """convert goes by the tensors, and does not say to download or convert again."""
    awq = {"model.language_model.layers.0.self_attn.q_proj.qweight": mx.zeros((128, 16), mx.int32)}
    edits = folder_shapes.without(r"0\.self_attn\.q_proj"), folder_shapes.add(lambda *_: awq)
    edit = folder_shapes.both(*edits, folder_shapes.top(quantization_config=table))
    folder = Shape("12B", prefix=GOOGLE, edit=edit).write(tmp_path / "model")
    refusal(folder)
    for argv in (("inspect", folder), ("--hf-path", folder, "--mlx-path", tmp_path / "out")):
        code, error = command(capsys, *argv)
        assert code == 2 and "holds AWQ weights" in error and "unquantised original" in error, error


def test_opening_reads_each_header_once(tmp_path, monkeypatch):
    from mlx_gemma_mtp.files import headers

    read, read_header = [], headers.read_header
    monkeypatch.setattr(headers, "read_header", lambda path: (read.append(path.name), read_header(path))[1])
    loading.open_target(Shape("26B-A4B", FOUR).write(tmp_path / "model"))
    assert sorted(read) == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
