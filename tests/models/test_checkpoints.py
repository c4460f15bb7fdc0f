"""Every kind of checkpoint in every format, end to end: convert --pair, check, load, generate, with and without MTP.

The sources (tests/checkpoints.py) have the published names and files at small sizes. The plain suite runs every kind
in 4 bits and every other format on one kind; `-m slow` runs the rest of the matrix.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import FORMATS, KINDS, ORDERING, drafter_shapes, media_shapes, pair, published, text_shapes

from convert.cli import main as convert_main
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.generate import main as generate_main

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in FORMATS if name != "4 bit"]
PROMPTS = ["def f(x): return x + 1", "What is a list?", "Sort these numbers: 3, 1, 2"]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)  # as generation_config.json says


def cell(kind: str, form: str):
    """A case of the matrix; slow where the plain suite leaves it out."""
    plain = form == "4 bit" or OTHERS.index(form) % len(KINDS) == KINDS.index(kind)
    return pytest.param(kind, form, id=f"{kind}, {form}", marks=() if plain else pytest.mark.slow)


def kinds(*plain: str):
    """All kinds, of which the plain suite runs those that are named."""
    return [pytest.param(kind, marks=() if kind in plain else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """kind -> the folder of its target, its drafter beside it; written once."""
    folders: dict[str, Path] = {}

    def written(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = pair(tmp_path_factory.mktemp("hf"), kind)
        return folders[kind]

    return written


def converted(source: Path, out: Path, *flags: str) -> Path:
    """`out` and `out`-assistant, converted and found sound beside their sources."""
    assert convert_main(["--hf-path", str(source), "--mlx-path", str(out), "--pair", *flags]) == 0
    for end in ("", "-assistant"):
        assert convert_main(["check", f"{out}{end}", "--against", f"{source}{end}"]) == 0
    return out


@pytest.mark.parametrize(("kind", "form"), [cell(kind, form) for kind in KINDS for form in FORMATS])
def test_convert_check_load_generate(source, tmp_path, kind, form):
    engine = load(str(converted(source(kind), tmp_path / "out", *FORMATS[form])), num_draft_tokens=4, dtype="float32")
    assert engine.drafter is not None
    params = [GREEDY, SAMPLED, GREEDY]
    plain, drafted = (engine.generate(PROMPTS, params, num_draft_tokens=drafts) for drafts in (0, 3))
    assert [result.tokens for result in plain] == [result.tokens for result in drafted]
    assert [len(result.tokens) for result in plain] == [16, 12, 16]
    assert len({token for result in plain for token in result.tokens}) > 10
    kept, made = (sum(getattr(result.stats, what) for result in drafted) for what in ("accepted", "drafted"))
    assert 0 < kept < made


@pytest.mark.parametrize("kind", kinds("E2B", "26B-A4B"))
def test_a_good_drafter_is_accepted(kind, tmp_path):
    """Layers that add almost nothing: the drafter's tensors say what the target's say, and most drafts are kept."""
    out = converted(pair(tmp_path / "hf", kind, depth=0.001), tmp_path / "out", "--dtype", "float32")
    engine = load(str(out), num_draft_tokens=4, dtype="float32")
    plain, drafted = (engine.generate(PROMPTS, GREEDY, num_draft_tokens=drafts) for drafts in (0, 5))
    assert [result.tokens for result in plain] == [result.tokens for result in drafted]
    assert all(result.stats.tokens_per_round > 3 for result in drafted)


@pytest.mark.parametrize("kind", kinds("E4B", "12B"))
def test_the_command_line_writes_the_same(source, tmp_path, capsys, kind):
    """generate on a converted folder, whose drafter it finds by itself, against plain decoding, and the facade."""
    out = converted(source(kind), tmp_path / "out", "-q", "--q-bits", "8", "--dtype", "float32")
    flags = ["--model", str(out), "--prompt", PROMPTS[0], "--temp", "0", "--max-tokens", "12", "--ignore-eos", "--json"]
    records = []
    for drafts in ("0", "3"):
        capsys.readouterr()
        assert generate_main([*flags, "--num-draft-tokens", drafts]) == 0
        records.append(json.loads(capsys.readouterr().out))
    plain, drafted = records
    assert plain["tokens"] == drafted["tokens"] and len(plain["tokens"]) == 12
    assert drafted["stats"]["mtp"] and not plain["stats"]["mtp"] and plain["text"] == drafted["text"]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    assert load(str(out), num_draft_tokens=4).generate(PROMPTS[0], params).tokens == plain["tokens"]


def test_processes_of_their_own(source, tmp_path):
    """The commands of the checkout as a user starts them: the 26B, two shards with an index, to 4 bits."""

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    hf, out = str(source("26B-A4B")), str(tmp_path / "out")
    assert len(list(Path(hf).glob("model-0000?-of-00002.safetensors"))) == 2
    assert "gemma4_assistant" in run(
        "convert", "--hf-path", hf, "--mlx-path", out, "--pair", "-q", "--dtype", "float32"
    )
    assert run("convert", "check", out, "--against", hf).endswith("sound\n")
    flags = ("--model", out, "--prompt", PROMPTS[0], "--temp", "0", "--max-tokens", "16", "--ignore-eos", "--json")
    flags += ("--num-draft-tokens", "2")
    record = json.loads(run("mlx_gemma_mtp.generate", *flags))
    assert record["stats"]["mtp"] and record["stats"]["drafted"] > 0
    assert record["tokens"] == load(out, "none", dtype="float32").generate(PROMPTS[0], GREEDY).tokens


# What was published (research: tensor counts and file sizes read by third parties): values of targets without the 0-d
# clip bounds; of drafters with layer scalars and token ids.
PUBLISHED = {
    "E2B": (2011, 5_123_178_051, 50, 77_731_328 + 4 + 262_144),
    "E4B": (2130, 7_996_156_490, 50, 78_517_760 + 4 + 262_144),
    "12B": (677, 11_959_730_176 + 48, 48, 422_856_960 + 4),
    "26B-A4B": (1013, 51_611_872_412 // 2, 48, 419_711_232 + 4),
    "31B": (1188, 62_546_177_752 // 2, 48, 469_518_592 + 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sources_have_the_published_tensors(kind):
    """The makers' names and shapes, at the published sizes, count to what was published."""
    tensors, values, draft_tensors, draft_values = PUBLISHED[kind]
    config = published(f"gemma-4-{kind}-it")
    shapes = [*text_shapes(config["text_config"]).values(), *media_shapes(config).values()]
    assert len(shapes) == tensors
    bounds = 0 if kind in ("E2B", "E4B") else 1  # there the published count leaves them out; elsewhere it is of bytes
    assert sum(math.prod(shape) for shape in shapes if shape or bounds) == values
    shapes = drafter_shapes(published(f"gemma-4-{kind}-it-assistant")).values()
    assert (len(shapes), sum(map(math.prod, shapes))) == (draft_tensors, draft_values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folders_are_laid_out_as_published(source, kind):
    for folder, draft in ((source(kind), False), (Path(f"{source(kind)}-assistant"), True)):
        sharded = kind in ("26B-A4B", "31B") and not draft
        files = {path.name for path in folder.iterdir()}
        assert ("model.safetensors.index.json" in files) == sharded == ("model.safetensors" not in files)
        assert ("chat_template.jinja" in files) != draft and "tokenizer.json" in files
        tensors = {name: t for file in folder.glob("*.safetensors") for name, t in mx.load(str(file)).items()}
        assert all(t.dtype == (mx.int64 if name == ORDERING else mx.bfloat16) for name, t in tensors.items())
        assert draft or any("vision" in name for name in tensors)
