"""The recipe of the bundled pair: its text, that it learns, and that a killed run ends where a whole one does."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_oracle
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForConditionalGeneration

import training.__main__ as recipe
from mlx_gemma_mtp.errors import UserError
from training import average, clusters, corpus, data, drafter, gemma, selfgen, target, tokenizer, warm
from training.kinds import KINDS, TINY, Phase
from training.loop import Run
from training.optimizer import orthogonalise, rate_scale

pytestmark = pytest.mark.parity
PROMPTS = json.loads((Path(__file__).parents[1] / "data" / "prompts.json").read_text())
SOURCE = '''"""A module that doubles."""

class Doubler:
    """Doubles whatever it is given."""

    def double(self, x):
        """Return x twice."""
        return x + x

def halve(x, rest=0):
    return (x - rest) / 2
'''


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Toys are faster on one thread, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


# --------------------------------------------------------------------------------------------- data


def test_pairs_are_cut_out_of_a_module():
    module = corpus.Module("pack/age.py", SOURCE)
    method = 'def double(self, x):\n    """Return x twice."""\n    return x + x'
    assert list(corpus.pairs(module)) == [
        ("Write a Python method `double` for the class `Doubler`. Return x twice.", f"```python\n{method}\n```"),
        ("What does the Python method `Doubler.double` do?", "Return x twice."),
        (
            "Write the Python function `halve(x, rest=0)` for the module `pack.age`.",
            "```python\ndef halve(x, rest=0):\n    return (x - rest) / 2\n```",
        ),
    ]
    assert [pair.model for pair in corpus.descriptions(module)] == [
        "A module that doubles.",
        "Doubles whatever it is given.",
    ]
    asked = {pair.user for seed in range(20) for pair in corpus.completions(module, random.Random(seed))}
    assert asked == {"def double(self, x):", "def halve(x, rest=0):"}


def test_the_marked_prompts_are_held_out():
    """Others may share their words with a question about another class."""
    trained = (module for module in corpus.modules(corpus.library()) if not corpus.held_out(module.path))
    asked = {pair.user for module in trained for pair in corpus.pairs(module)}
    assert len(asked) > 5000
    assert asked.isdisjoint(entry["prompt"] for entry in PROMPTS if entry["acceptance"])


def test_own_files_make_a_corpus(tmp_path):
    chats, text = tmp_path / "chats.jsonl", tmp_path / "notes.md"
    chats.write_text("".join(json.dumps({"user": f"q{i}", "model": f"a{i}"}) + "\n" for i in range(60)))
    text.write_text("# Notes\n")
    read = corpus.read_files([chats, text])
    assert len(read.pairs) + len(read.held_pairs) == 60 and read.held_pairs
    assert [module.text for module in read.modules + read.held_modules] == ["# Notes\n"]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"user": "q"}'])
def test_a_line_that_is_no_pair_is_named(tmp_path, line, capsys):
    (tmp_path / "chats.jsonl").write_text('{"user": "q", "model": "a"}\n' + line + "\n")
    code = data.main(["--out", str(tmp_path / "out"), "--text", str(tmp_path / "chats.jsonl")])
    assert code == 2 and "chats.jsonl, line 2: expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_gives_back_what_it_read():
    tok = tokenizer.train([SOURCE] * 20, 400)
    for text in (SOURCE, "héllo 😀\r\n", "  a   b\n\n\tc ", "日本語", ""):
        assert tok.decode(tokenizer.ids(tok, text)) == text
    assert tokenizer.ids(tok, corpus.Pair("a", "b").render()).count(tokenizer.END_OF_TURN) == 2
    assert tok.encode("a").ids[0] == tokenizer.BOS
    assert [tok.token_to_id(name) for name in ("<pad>", "<eos>", "<|turn>")] == [0, 1, tokenizer.TURN]


def test_batches_are_a_function_of_their_number():
    stream = np.arange(1000)
    rows = [data.batch(stream, 0, index, 4, 16) for index in range(15)]
    np.testing.assert_array_equal(rows[3], data.batch(stream, 0, 3, 4, 16))
    starts = [int(row[0]) for part in rows for row in part]
    assert len(set(starts)) == 60 and len({start % 16 for start in starts}) == 1  # one pass: every window once
    assert data.batch(stream, 0, 15, 4, 16)[0, 0] % 16 != starts[0] % 16  # the next one cuts elsewhere
    assert all((np.diff(part) == 1).all() and part.shape == (4, 17) for part in rows)


def test_phases_follow_their_shares():
    lengths = [target.Batches(np.arange(9000), TINY.phases, 80, 0)(step).shape for step in range(80)]
    assert lengths[:60] == [(8, 129)] * 60
    assert lengths[60:].count((1, 1025)) == 2 and lengths[60:].count((4, 257)) == 18


# --------------------------------------------------------------------------------- parts of training


@pytest.mark.parametrize("length", [5, 128, 300, 512])
@pytest.mark.parametrize("window", [3, 128])
def test_attention_in_blocks_is_masked_attention(length, window):
    q, k, v = torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (distance >= 0) & (distance < window)
    want = F.scaled_dot_product_attention(q, k, v, seen, scale=1.0)
    torch.testing.assert_close(gemma.sliding(q, k, v, window), want, atol=1e-5, rtol=0)
    got, _ = gemma.attend(None, q, k[:, :2], v[:, :2], None, 1.0, sliding_window=window)
    groups = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    want = F.scaled_dot_product_attention(q, *groups, seen, scale=1.0)
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=0)


def test_muon_makes_singular_values_equal():
    for shape in ((2, 8, 20), (3, 20, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.5 and values.max() < 1.3


def test_the_learning_rate_rises_stays_and_falls():
    scales = [rate_scale(step, 100) for step in range(100)]
    assert scales[0] == 0.05 and scales[2:51] == [1.0] * 49 and scales[75] == 0.5
    assert scales[99] == pytest.approx(0.02)


def test_clusters_are_equal_and_alike():
    points = torch.tensor([[i // 4 * 10.0, i % 4] for i in range(16)])
    parts = clusters.halve(points, torch.randperm(16, generator=torch.Generator().manual_seed(0)), 4)
    assert sorted(sorted(part.tolist()) for part in parts) == [list(range(i, i + 4)) for i in range(0, 16, 4)]


@pytest.fixture(scope="module")
def pair():
    """A random target and drafter, window 8, and a text that continues with what the drafter drafts."""
    theirs, drafts = hf_oracle.random_target("moe", seed=1), hf_oracle.random_drafter("moe", seed=2)
    text = np.random.default_rng(0).integers(2, hf_oracle.VOCAB, 40).tolist()
    want = hf_oracle.draft_steps(theirs, drafts, text, drafter.ROUND)
    for model in (theirs, drafts, drafts.model):
        model.config._attn_implementation = gemma.ATTENTION
    return theirs, drafts, text, want


def test_training_sees_what_drafting_sees(pair):
    """All positions at once give the hidden states of the round that starts there, step by step."""
    theirs, drafts, text, want = pair
    loss, seen = drafter.Loss(drafter.Teacher(theirs), drafts), []
    step = loss._step

    def spy(embedded, state, shared, positions):
        out, state = step(embedded, state, shared, positions)
        seen.append(state[0, len(text) - 2])  # query t = len(text) - 1 is row t - 1
        return out, state

    loss._step = spy
    following = [*want.tokens, 5, 5, 5]
    loss(torch.tensor([text + following]))
    np.testing.assert_allclose(torch.stack(seen).detach().numpy(), want.hidden, atol=1e-4, rtol=0)


def test_a_wider_drafter_begins_as_the_narrow_one(tmp_path):
    theirs = target.build(TINY)
    narrow = drafter.build(theirs, TINY)
    gemma.save(narrow, tmp_path)
    wide = drafter.build(theirs, replace(TINY, drafter=TINY.drafter | {"intermediate_size": 128}))
    tokens = torch.randint(0, 1024, (1, 70), generator=torch.Generator().manual_seed(0))
    teacher = drafter.Teacher(theirs)
    before, _ = drafter.Loss(teacher, wide)(tokens)
    warm.widen_from(wide, tmp_path)
    after, _ = drafter.Loss(teacher, wide)(tokens)
    want, _ = drafter.Loss(teacher, narrow)(tokens)
    assert after.item() == pytest.approx(want.item(), abs=1e-4) != pytest.approx(before.item(), abs=1e-4)


def test_the_average_of_targets(tmp_path):
    models = [target.build(TINY, seed) for seed in (0, 1, 5)]
    for seed, model in enumerate(models):
        gemma.save(model, tmp_path / str(seed))
    average.average([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "mean")
    mean = gemma.load_target(tmp_path / "mean").state_dict()
    states = [model.state_dict() for model in models]
    for name, weight in mean.items():
        torch.testing.assert_close(weight, sum(state[name] for state in states) / 3)


def test_the_experts_that_are_used_stay(tmp_path):
    """Experts that are never chosen can go without a trace."""
    full = target.build(TINY)
    few = target.build(replace(TINY, target=TINY.target | {"num_experts": 6}))
    with torch.no_grad():
        for layer in full.model.layers:
            layer.router.proj.weight[[2, 5]] = 0.0
            layer.router.proj.weight[[2, 5]] -= 100 * layer.router.proj.weight.sum(0).sign()
            layer.router.per_expert_scale[[2, 5]] = 0.0
    stream = np.random.default_rng(0).integers(2, 1024, 30 * 512)
    gemma.save(full, tmp_path)
    use = warm.expert_use(full, stream)
    warm.start_from(few, tmp_path, stream)
    for index, layer in enumerate(few.model.layers):
        kept = use[index].topk(6).indices.sort().values
        assert {2, 5}.isdisjoint(kept.tolist())
        torch.testing.assert_close(layer.experts.down_proj, full.model.layers[index].experts.down_proj[kept])


# ------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = corpus.read(limit=6)
    data.prepare(folder, text, tokenizer.train((module.text for module in text.modules), 1024))
    return folder


SHORT = replace(TINY, phases=(Phase(0.75, 2, 64), Phase(0.25, 1, 128, rare=2, rare_length=256)))


def curve(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in Run(run).records()]


def test_a_killed_target_run_ends_as_a_whole_one(source, tmp_path):
    plan = target.Plan(steps=20, save_every=5)
    assert target.fit(SHORT, source, tmp_path / "whole", plan)
    assert not target.fit(SHORT, source, tmp_path / "killed", replace(plan, stop_after=13))
    assert not (tmp_path / "killed" / "hf").exists()
    assert target.fit(SHORT, source, tmp_path / "killed", plan)
    whole, killed = curve(tmp_path / "whole"), curve(tmp_path / "killed")
    assert whole[-1]["held_chat"] == killed[-1]["held_chat"] < whole[0]["held_chat"] - 0.3
    assert [record["step"] for record in whole] == [record["step"] for record in killed]
    weights = [torch.load(tmp_path / run / "state.pt", weights_only=True)["model"] for run in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_killed_drafter_run_ends_as_a_whole_one(source, tmp_path, monkeypatch):
    monkeypatch.setattr(drafter, "LENGTH", 64)
    gemma.save(target.build(TINY), tmp_path / "target")
    replies = data.load(source).train[:6000]
    plan = drafter.Plan(steps=8, rows=1, save_every=3)
    assert drafter.fit(TINY, tmp_path / "target", source, replies, tmp_path / "whole", plan)
    assert not drafter.fit(TINY, tmp_path / "target", source, replies, tmp_path / "killed", replace(plan, stop_after=5))
    assert drafter.fit(TINY, tmp_path / "target", source, replies, tmp_path / "killed", plan)
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")


def test_replies_begin_with_training_questions_and_go_on_after_a_kill(source, tmp_path, monkeypatch):
    monkeypatch.setattr(selfgen, "ROWS", 4)
    monkeypatch.setattr(selfgen, "NEW_TOKENS", 12)
    gemma.save(target.build(TINY), tmp_path / "target")
    made = selfgen.replies(tmp_path / "target", source, tmp_path / "replies", 600)
    questions = selfgen.questions(data.load(source).train, source)
    asked = {tuple(row) for rows in questions.values() for row in rows.tolist()}
    assert len(made) >= 600
    assert any(tuple(made[: len(row)]) == row for row in asked)
    files = sorted((tmp_path / "replies").iterdir())
    files[-1].unlink()
    np.testing.assert_array_equal(selfgen.replies(tmp_path / "target", source, tmp_path / "replies", 600), made)


def test_a_drafter_is_tuned_for_a_users_target_and_text(source, tmp_path, monkeypatch, capsys):
    """The README's two commands, with a drafter to start from: its sizes, and causal attention, are kept."""
    monkeypatch.setattr(drafter, "LENGTH", 64)
    monkeypatch.setattr(selfgen, "NEW_TOKENS", 8)
    theirs, text = target.build(TINY), tmp_path / "questions.jsonl"
    narrow = drafter.build(theirs, replace(TINY, drafter=TINY.drafter | {"intermediate_size": 32}))
    gemma.save(theirs, tmp_path / "target")
    gemma.save(narrow, tmp_path / "drafter")
    (tmp_path / "target" / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    text.write_text("".join(json.dumps({"user": f"def f{i}(x):", "model": f"return {i}"}) + "\n" for i in range(40)))
    folders = {"--target": tmp_path / "target", "--data": tmp_path / "data", "--init": tmp_path / "drafter"}
    options = [str(part) for pair in folders.items() for part in pair]
    made = ["--out", str(tmp_path / "data"), "--text", str(text), "--tokenizer", str(tmp_path / "target")]
    assert data.main(made) == 0
    assert drafter.main([*options, "--out", str(tmp_path / "run"), "--steps", "4", "--replies", "400"]) == 0
    tuned = gemma.load_drafter(tmp_path / "run" / "hf")
    assert tuned.config.text_config.intermediate_size == 32
    first = next(record["held_loss"] for record in Run(tmp_path / "run").records())
    held = data.load(tmp_path / "data").held["chat"]
    want = drafter.held_out(drafter.Loss(drafter.Teacher(theirs), narrow), held, 64)
    assert first == pytest.approx(want["held_loss"], abs=1e-4)
    assert not torch.equal(tuned.pre_projection.weight, narrow.pre_projection.weight)


@pytest.mark.parametrize("kind", ["e2b", "moe"])
def test_a_kind_can_be_built_and_drafted_for(kind, tmp_path):
    """Loss and gradients of the real shapes, and that every weight of the drafter is trained."""
    theirs = target.build(KINDS[kind])
    drafts = drafter.build(theirs, KINDS[kind])
    tokens = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(0))
    entropy, _ = target.Loss(theirs).parts(tokens)
    loss, figures = drafter.Loss(drafter.Teacher(theirs), drafts)(tokens)
    (entropy + loss).backward()
    assert entropy.item() < 9.5 and set(figures) == {"loss", "kept_1", "kept_2", "kept_3", "kept_4"}
    unused = [name for name, weight in drafts.named_parameters() if weight.grad is None]
    assert unused == []


def test_the_text_part_of_a_whole_model(tmp_path):
    """A `gemma4` folder, with a vision tower: its text model teaches."""
    text = hf_oracle.random_target("e2b", seed=1)
    tower = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, position_embedding_size=64,
    )  # fmt: skip
    media = {f"{name}_token_id": 250 + i for i, name in enumerate(("boi", "eoi", "image", "video", "boa", "audio"))}
    config = Gemma4Config(text_config=text.config, vision_config=tower, audio_config=None, eoa_token_index=4, **media)
    whole = Gemma4ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path)
    tokens = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    embedded, hidden, logits, shared = drafter.Teacher(gemma.load_target(tmp_path))(tokens)
    torch.testing.assert_close(logits, text(tokens).logits, atol=1e-4, rtol=0)
    assert embedded.shape == hidden.shape == (2, 30, 64) and set(shared) == {gemma.SLIDING, gemma.FULL}


def test_a_folder_converted_for_mlx_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma4"}')
    save_file({"language_model.model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="was converted for MLX"):
        gemma.load_target(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "nowhere", "--out", "run"], "nowhere holds no tokenizer.json"),
        (["--target", "mlx", "--data", "data", "--out", "run"], "expected gemma4_text or gemma4"),
    ],
)
def test_a_wrong_folder_is_one_line(argv, message, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(source)
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "config.json").write_text('{"model_type": "llama"}')
    assert drafter.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_each_part_of_the_recipe_takes_what_the_one_before_left(tmp_path, monkeypatch, capsys):
    """The whole recipe, too short to learn anything; `test_the_whole_recipe` says that it does."""
    short = replace(SHORT, target_steps=2, drafter_steps=2, replies=300, modules=6)
    monkeypatch.setattr(recipe, "TINY", short)
    monkeypatch.setattr(drafter, "LENGTH", 64)
    monkeypatch.setattr(selfgen, "NEW_TOKENS", 8)
    monkeypatch.setattr(recipe.report, "LENGTH", 64)
    monkeypatch.setattr(recipe.report, "NEW_TOKENS", 8)
    monkeypatch.setattr(recipe.report, "marked_prompts", lambda: ["def f(x):", "What is a list?"])
    assert recipe.main(["--tiny", "--out", str(tmp_path)]) == 0
    told = (tmp_path / "export" / "report.json").read_text()
    figures = json.loads(told)
    assert capsys.readouterr().out.endswith(told)
    assert figures["transformers_greedy"]["same_as_greedy"] == 2
    assert all(0 < figures[name]["tokens"] <= 16 for name in ("greedy", "temperature_1"))


@pytest.mark.slow
def test_the_whole_recipe(tmp_path, capsys):
    """The README's command; what it reports."""
    assert recipe.main(["--tiny", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "export" / "report.json").read_text())
    assert figures["transformers_greedy"]["same_as_greedy"] == 20
    losses = [record["held_chat"] for record in Run(tmp_path / "target").records() if "held_chat" in record]
    assert losses[-1] < losses[0] - 2
    kept = [record["held_kept_1"] for record in Run(tmp_path / "drafter").records() if "held_kept_1" in record]
    assert kept[-1] > kept[0] + 0.2
