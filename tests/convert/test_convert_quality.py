"""quality: the figures are those of the whole models, a damaged layer is named, and cards tell them."""

import json
import re
import shutil
import weakref

import mlx.core as mx
import numpy as np
import pytest
from reference import draft_steps, forward
from test_convert import V, make_drafter, make_e2b, make_moe, make_text, make_unified, run, watched_blocks
from test_convert_check import SHARD, rewrite
from test_convert_pair import sources  # noqa: F401
from test_convert_upload import online  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from trained import E2B

from convert import divergence, quality
from convert.checkpoint import Checkpoint
from convert.cli import main
from convert.layerwise import Layered
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading

MAKERS = {"e2b": make_e2b, "unified": make_unified, "moe": make_moe, "text": make_text}
TOKENS = mx.array(np.random.default_rng(0).integers(3, V, (2, 20)), mx.int32)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """The bundled target in 4 bits."""
    out = tmp_path_factory.mktemp("bundled") / "out"
    assert main(["--hf-path", str(hub.DEMO / "target"), "--mlx-path", str(out), "-q"]) == 0
    return out


def measured(source, out, tokens=TOKENS, drafters=None) -> divergence.Quality:
    return divergence.measure(Checkpoint.open(out), Checkpoint.open(source), drafters, tokens)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_floats_lose_nothing(tmp_path, make):
    checkpoint = make(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out") == 0
    found = measured(checkpoint.folder, tmp_path / "out")
    assert (found.mean, found.p99, found.flips, found.findings, found.tokens) == (0, 0, 0, (), 40)
    assert set(found.layers) == {0.0}


@pytest.mark.parametrize("flags", [("-q", "--q-bits", "2"), ("-q", "--q-mode", "mxfp4")], ids=["2 bit", "mxfp4"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_figures_are_those_of_the_whole_models(tmp_path, make, flags, monkeypatch):
    """The loader's models, all logits at once."""
    monkeypatch.setattr("convert.blocks.BLOCK_BYTES", 4000)  # several blocks of the vocabulary
    checkpoint = make(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", *flags) == 0
    found = measured(checkpoint.folder, tmp_path / "out")
    logs = []
    for folder in (checkpoint.folder, tmp_path / "out"):
        model = loading.load_target(folder, mx.float32)
        logits = np.concatenate([forward(model, row)[0] for row in TOKENS.tolist()]).astype(np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    divergences = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    assert found.mean == pytest.approx(divergences.mean(), rel=1e-3, abs=1e-6) and found.mean > 1e-4
    assert found.p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-3)
    assert found.flips == (logs[0].argmax(-1) != logs[1].argmax(-1)).mean()


@pytest.mark.parametrize("pair", [hub.DEMO, E2B], ids=["moe", "e2b"])
def test_first_drafts_are_those_of_drafting(pair):
    """A dense head, and one of centroids. The target says what it says, whatever the drafter is."""
    drafter = Checkpoint.open(pair / "drafter")
    tokens = quality.tokens_of(hub.DEMO / "target", None, 40)
    found = measured(pair / "target", pair / "target", tokens, (drafter, drafter))
    target = loading.load_target(pair / "target", mx.float32)
    own = loading.load_drafter(pair / "drafter", target.config, mx.float32)
    (row,) = tokens.tolist()
    wanted = forward(target, row)[0].argmax(-1)
    agree = [draft_steps(target, own, row[: t + 1], 1)[0][0] == wanted[t] for t in range(1, len(row))]
    assert found.drafts == (np.mean(agree), np.mean(agree)) and 0 < np.mean(agree) < 1


def test_layers_are_dropped(four_bits, monkeypatch):
    """Of 6 layers' weights one is held at a time, of either model."""
    filled, most = [], []
    fill = Layered._fill

    def watched(self, part, prefix):
        fill(self, part, prefix)
        if prefix.startswith("layers."):
            filled.append(weakref.ref(part))
            most.append(sum(ref() is not None for ref in filled))

    monkeypatch.setattr(Layered, "_fill", watched)
    measured(hub.DEMO / "target", four_bits, quality.tokens_of(four_bits, None, 40))
    assert most == [1] * 12


@pytest.mark.parametrize("flags", [(), ("-q", "--q-group-size", "32")], ids=["floats", "4 bit"])
def test_tables_stay_in_their_files(tmp_path, monkeypatch, flags):
    """Of two tables, 8 and 16 MiB in float32, blocks and rows are read: MLX holds a quarter of one at most."""
    rows = 2**15
    sizes = {"vocab_size": rows, "vocab_size_per_layer_input": rows}
    checkpoint = make_e2b(tmp_path / "hf")
    checkpoint.config["text_config"] = checkpoint.config["text_config"] | sizes
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        path = f"model.language_model.{name}.weight"
        checkpoint.weights[path] = mx.random.normal((rows, checkpoint.weights[path].shape[1])).astype(mx.bfloat16)
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", *flags) == 0
    checkpoint.weights.clear()
    sizes = watched_blocks(monkeypatch, 2**17)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = measured(checkpoint.folder, tmp_path / "out")
    assert 2**13 < max(sizes) <= 2**17
    assert 2**17 < mx.get_peak_memory() - before < rows * 64 * 4 / 4 and (found.mean > 0) == bool(flags)


def doubled(layer):
    def edit(tensors):
        for name in tensors:
            if f"layers.{layer}." in name and name.endswith(".scales"):
                tensors[name] = tensors[name] * 2

    return edit


def exchanged(tensors):
    """The up projections of two layers: their sizes tell nothing."""
    for part in ("weight", "scales", "biases"):
        one, other = (f"language_model.model.layers.{i}.mlp.up_proj.{part}" for i in (0, 4))
        tensors[one], tensors[other] = tensors[other], tensors[one]


@pytest.mark.parametrize(
    ("edit", "words"),
    [(doubled(3), r"layers.3.mlp.gate_proj.weight is [\d.]+ times as large"), (doubled(5), "layer 5 differs by"),
     (exchanged, "layer [04] differs by")],
    ids=["scales", "scales of a full layer", "exchanged"],
)  # fmt: skip
def test_a_broken_conversion_is_noticed(four_bits, tmp_path, capsys, edit, words):
    assert main(["quality", str(four_bits), "--against", str(hub.DEMO / "target"), "--tokens", "200"]) == 0
    sound = capsys.readouterr().out
    assert "finding" not in sound
    shutil.copytree(four_bits, tmp_path / "out")
    rewrite(tmp_path / "out", edit)
    assert main(["quality", str(tmp_path / "out"), "--against", str(hub.DEMO / "target"), "--tokens", "200"]) == 1
    assert re.search(f"^finding: {words}", capsys.readouterr().out, re.M)


def test_all_that_is_told(four_bits, capsys):
    """The drafter's figures on both sides; fewer bits lose more."""
    demo = hub.DEMO
    assert main(["quality", str(four_bits), "--against", str(demo / "target"), "--draft-model", f"{demo}/drafter"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = quality.tokens_of(four_bits, None, quality.TOKENS).size
    assert lines[0] == f"{four_bits} against {demo / 'target'}, {tokens} tokens"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "KL divergence, mean", "KL divergence, 99th percentile", "first choice is another",
        "first draft is the first choice", "layer that differs most by itself",
    ]  # fmt: skip
    assert re.fullmatch(r".*: \d+\.\d% of tokens, \d+\.\d% before the conversion", lines[4])


def test_a_card_tells_the_figures_once(four_bits, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(four_bits, out)
    (out / "README.md").write_text("# Mine\n\n## Quality\n\nOld.\n\n## Run\n\n    python\n")
    for _ in range(2):
        assert main(["quality", str(out), "--against", str(hub.DEMO / "target"), "--tokens", "60"]) == 0
    assert capsys.readouterr().out.endswith(f"{out / 'README.md'}: figures written\n")
    card = (out / "README.md").read_text()
    assert card.count("## Quality") == 1 and "Old." not in card and card.startswith("# Mine\n\n## Run\n\n    python\n")
    assert re.search(r"\| KL divergence, mean \| 0\.[12]\d+ nats \|\n", card)


def test_convert_measures_and_tells(sources, online, tmp_path, capsys):  # noqa: F811
    """--quality: the lines of `quality`, the drafter before and after, and the card that is uploaded."""
    target, _ = sources
    vocabulary(target.folder, target.folder / "tokenizer.json")
    out = tmp_path / "out"
    assert run(target, out, "-q", "--pair", "--quality", "--upload-repo", "me/x") == 0
    told = capsys.readouterr().out
    assert "KL divergence, mean: " in told and " before the conversion" in told
    assert "| first draft is the first choice | " in online.card("me/x").text
    assert "## Quality" not in online.card("me/x-assistant").text


def vocabulary(folder, file) -> None:
    """A tokenizer of bytes that fits the small vocabulary: every character is a token."""
    size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    letters = sorted(set(quality.TEXT.read_text()))[: size - 4]
    words = {"<unk>": 3} | {letter: 4 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(file))


def test_bad_input_is_one_line(four_bits, tmp_path, capsys):
    demo, bare, foreign = hub.DEMO, tmp_path / "bare", tmp_path / "foreign"
    shutil.copytree(four_bits, bare, ignore=shutil.ignore_patterns("tokenizer.json"))
    make_moe(foreign).save()
    make_drafter(tmp_path / "drafter").save()
    large = tmp_path / "large"
    shutil.copytree(four_bits, large)
    tokenizer = Tokenizer.from_file(str(large / "tokenizer.json"))
    tokenizer.add_tokens(["carbon dioxide"])
    tokenizer.save(str(large / "tokenizer.json"))
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    damaged = tmp_path / "damaged"
    shutil.copytree(four_bits, damaged)
    rewrite(damaged, lambda tensors: tensors.pop("language_model.model.norm.weight"))
    source = ["--against", str(demo / "target")]
    cases = [
        ([str(bare), *source], "tokenizer.json is missing"),
        ([str(four_bits), *source, "--tokens", "1"], "--tokens is 1; expected 2 or more"),
        ([str(four_bits), *source, "--text", str(tmp_path / "short.txt")], "has 1 tokens; expected 2 or more"),
        ([str(four_bits), *source, "--text", str(tmp_path / "bytes.txt")], "cannot be read"),
        ([str(four_bits), *source, "--text", str(tmp_path / "none.txt")], "cannot be read"),
        ([str(four_bits), "--against", str(foreign)], "is another model than"),
        ([str(four_bits), *source, "--draft-model", str(demo / "target")], "expected an MTP drafter"),
        ([str(foreign), *source], "has Hugging Face tensor names"),
        ([str(tmp_path / "nothing"), *source], "not a folder"),
        ([str(large), *source], "has token 4096; expected ids below 4096"),
        ([str(demo / "drafter"), "--against", str(demo / "drafter")], "tokenizer.json is missing"),
        ([str(damaged), *source], "language_model.model.norm.weight"),
    ]
    for argv, words in cases:
        assert main(["quality", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error


def test_a_drafter_has_no_choices_to_compare(tmp_path):
    make_drafter(tmp_path / "hf").save()
    folder = Checkpoint.open(tmp_path / "hf")
    with pytest.raises(Exception, match="is a drafter; expected a target"):
        divergence.measure(folder, folder, None, TOKENS)


def test_the_shipped_text_is_long_enough():
    assert quality.tokens_of(hub.DEMO / "target", None, quality.TOKENS).shape[1] > 300
    assert (hub.DEMO / "target" / SHARD).is_file()
