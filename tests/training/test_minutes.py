"""The pair in minutes: its forward is transformers', its pairs follow their question, and a run leaves weights."""

import json
import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from safetensors.torch import load_file

from mlx_gemma_mtp.errors import UserError
from training import (
    adopt,
    bundled,
    corpus,
    dense,
    drafter,
    following,
    gemma,
    minutes,
    shards,
    smalltalk,
    target,
    together,
)
from training.kinds import MOE

pytestmark = pytest.mark.parity
SOURCE = '''
def load_rows(path, limit=10):
    """Load the rows of a file."""
    with open(path) as file:
        return file.read().splitlines()[:limit]
'''


@pytest.fixture(scope="module")
def models():
    """A target and its drafter as transformers has them, with norms that are not one, and both as `dense` has them."""
    torch.manual_seed(0)
    model = target.build(MOE, 3).eval()
    drafts = drafter.build(model, MOE).eval()
    for name, weight in [*model.named_parameters(), *drafts.named_parameters()]:
        if "norm" in name or "scale" in name:
            weight.data.mul_(1 + 0.2 * torch.rand_like(weight))
    mine = dense.Target(dense.Sizes()), dense.Drafter(dense.Sizes())
    for other, own in zip((model, drafts), mine, strict=True):
        own.load_state_dict({name: w for name, w in other.state_dict().items() if name != "lm_head.weight"})
    return model, drafts, *mine


@torch.no_grad()
def test_the_dense_forward_is_transformers(models):
    model, _, mine, _ = models
    tokens = torch.randint(20, 4096, (2, 300))
    expected = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.allclose(mine(tokens).hidden, expected, atol=1e-4)


@torch.no_grad()
def test_the_dense_drafter_is_transformers(models):
    model, drafts, mine, own = models
    loss = drafter.Loss(drafter.Teacher(model), drafts)
    tokens, length = torch.randint(20, 4096, (2, 204)), 200
    embedded, hidden, _, shared = loss.teacher(tokens)
    shared = {kind: (k[:, :, :length], v[:, :, :length]) for kind, (k, v) in shared.items()}
    state = mine_state = hidden[:, :length]
    positions = torch.arange(1, length + 1)[None]
    kept = {kind: tuple(x[:, :, :length] for x in mine(tokens).kept[layer]) for kind, layer in ((True, 4), (False, 5))}
    for step in (1, 2):
        read = embedded[:, step : step + length]
        out, state = loss._step(read, state, shared, positions)
        mine_out, mine_state = own(read, mine_state, kept)
        assert torch.allclose(out, mine_out, atol=1e-4) and torch.allclose(state, mine_state, atol=1e-4)


def test_replies_of_different_lengths_are_those_of_plain_decoding(models):
    mine = models[2]
    asked = [torch.randint(20, 4096, (size,)).tolist() for size in (9, 140, 31)]
    made = dense.generate(mine, asked, 12, (1, 6))
    for question, row in zip(asked, made, strict=True):
        whole = list(question)
        while len(whole) < len(row):
            with torch.no_grad():
                whole.append(int(mine.logits(mine(torch.tensor([whole])).hidden[0, -1]).argmax()))
        assert whole == row


def test_an_edit_is_the_given_code_with_the_change():
    function = next(corpus.functions(SOURCE))
    for seed in range(40):
        made = following.moved(random.Random(seed), function, function.code)
        if made:
            old, new = sorted(set(made[1].split()) ^ set(function.code.split()))[:2]
            assert made[1] != function.code and len(made[1].split("\n")) == len(function.code.split("\n")), (old, new)
    asked, after = following.valued(random.Random(1), function, function.code)
    new = next(word.strip(".:") for word in reversed(asked.split()) if word.strip(".:").isdigit() and word != "10")
    assert after == function.code.replace("10", new)


@pytest.mark.parametrize("seed", range(20))
def test_replies_with_code_name_what_was_asked(seed):
    source = following.Source([corpus.Module("pack/rows.py", SOURCE)])
    rng = random.Random(seed)
    function, module = source.functions[0]
    function = following.renamed(rng, function)
    pair = following.write(rng, function, module)
    assert function.name in pair.user and f"def {function.name}(" in pair.model
    pair = following.go_on(rng, function, module)
    assert f"def {function.name}(" in pair.user and f"def {function.name}(" in pair.model


def test_a_sentence_tells_what_was_asked():
    assert following.sentence("a.copy", "Copy the file.\n\nMore.") == "`a.copy` copies the file."
    assert following.sentence("a.b", "Returns the :class:`Row` of it.") == "`a.b` returns the Row of it."
    assert following.sentence("a.b", "Nothing that begins so.") is None


def test_small_functions_parse():
    rng = random.Random(0)
    for _ in range(500):
        compile(smalltalk.small_function(rng).model.removeprefix("```python").removesuffix("```"), "reply", "exec")


def test_measuring_prompts_are_never_asked():
    asked = smalltalk.talk(random.Random(0)).user
    source = following.Source([corpus.Module("pack/rows.py", SOURCE)], frozenset([asked]))
    rng = random.Random(3)
    assert asked not in [source.pair(rng).user for _ in range(500)]


def test_rows_begin_with_a_document_and_are_whole():
    rows = shards.Rows(8)
    for document in ([2, 1, 1, 1, 1], [2, 3, 3, 3, 3], [2, 4, 4]):
        rows.add(document, [0, *[1] * (len(document) - 1)])
    tokens, replies = rows.arrays()
    assert tokens.tolist() == [[2, 1, 1, 1, 1, 2, 3, 3]] and replies.tolist() == [[0, 1, 1, 1, 1, 0, 1, 1]]


def test_a_run_leaves_weights_that_become_a_pair(tmp_path, models):
    """The state dict of `dense` opens in transformers, and a cut run names what is missing."""
    clock = minutes.Clock(0, 1)
    (tmp_path / "work").mkdir()
    writer = minutes.Writer(tmp_path, tmp_path / "work", clock)
    writer.weights("target", models[2])
    assert load_file(tmp_path / "target.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    adopt.adopt(tmp_path, tmp_path / "pair", target_only=True)
    opened = gemma.load_target(tmp_path / "pair" / "trained" / "target")
    wanted = models[0].model.layers[1].experts.down_proj.to(torch.bfloat16).float()
    assert torch.equal(opened.model.layers[1].experts.down_proj, wanted)


def test_a_pair_opens_where_a_run_goes_on_from_it(tmp_path, models):
    """What `adopt` wrote has the weights again that it was made from, and another pair's sizes are refused by name."""
    (tmp_path / "work").mkdir()
    writer = minutes.Writer(tmp_path, tmp_path / "work", minutes.Clock(0, 1))
    writer.weights("target", models[2])
    writer.weights("drafter", models[3])
    adopt.adopt(tmp_path, tmp_path / "pair")
    fresh = dense.Target(dense.Sizes()), dense.Drafter(dense.Sizes())
    for name, model, old in zip(("target", "drafter"), fresh, models[2:], strict=True):
        bundled.fill(model, tmp_path / "pair" / name)
        for key, weight in old.state_dict().items():
            assert torch.equal(model.state_dict()[key], weight.to(torch.bfloat16).float()), key
    with pytest.raises(UserError, match=r"model.embed_tokens.weight is \(4096, 192\), expected \(4096, 64\)"):
        bundled.fill(dense.Target(minutes.TINY), tmp_path / "pair" / "target")


def gradients(model):
    taken = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    return taken


def test_the_drafter_reaches_the_target_by_what_it_reads(monkeypatch):
    """Without reach and lean the target learns the text alone; each of the two changes what it learns.

    Gradients of up to 0.25: sums in another order differ by some 3e-5.
    """
    torch.manual_seed(0)
    mine, own = dense.Target(minutes.TINY), dense.Drafter(minutes.TINY)
    dense.initialise(mine, 0)
    dense.initialise(own, 1)
    tokens, weights = torch.randint(20, 4096, (2, 68)), torch.rand(2, 68)
    minutes.target_loss(mine, tokens, weights)[0].backward()
    alone, learned = gradients(mine), {}
    for name, reach, lean in (("alone", 0.0, 0.0), ("reach", 0.3, 0.0), ("lean", 0.0, 0.15)):
        monkeypatch.setattr(together, "REACH", reach)
        monkeypatch.setattr(together, "LEAN", lean)
        total, figures = together.loss(mine, own, tokens, weights)
        total.backward()
        learned[name] = gradients(mine), gradients(own)
        assert figures.shape == (1 + minutes.ROUND,)
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(alone, learned["alone"][0], strict=True))
    for name in ("reach", "lean"):
        assert max((a - b).abs().max().item() for a, b in zip(alone, learned[name][0], strict=True)) > 1e-3, name
    for name in ("reach", "lean"):
        assert all(torch.allclose(*two, atol=2e-4) for two in zip(learned["alone"][1], learned[name][1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [False, True], ids=["from nothing", "from a pair"])
def test_the_whole_run_on_toys(tmp_path, monkeypatch, pair):
    """Shards are read, the target learns, its replies train the drafter, and both files and the log lie there.

    From a pair, both learn together in between; a second call finds all done.
    """
    monkeypatch.setattr(bundled, "fill", lambda model, folder: None)  # a pair of toy sizes: as it was initialised
    monkeypatch.setattr(together, "RATES", (1.0, 1.0))
    monkeypatch.setattr(minutes, "NEW_TOKENS", 8)
    rng = np.random.default_rng(0)
    rows = rng.integers(20, 60, (64, 65)).astype(np.uint16)
    rows[:, 1::2] = rows[:, ::2][:, :32]
    data = {"rows": rows, "replies": np.ones_like(rows, np.uint8), "asked": rows[0][:20], "lengths": np.array([9, 11])}
    (tmp_path / "shards").mkdir()
    shards.put(tmp_path / "shards" / "pairs-00-000.npz", **data)
    shards.put(tmp_path / "shards" / "raw-00.npz", stream=np.tile(rows.ravel(), 2))
    options = ["--device", "cpu", "--tiny", "--rows", "4", "--length", "64", "--replies", "2", "--seconds", "30"]
    folders = [
        "--shards",
        tmp_path / "shards",
        "--tokenizer",
        "none",
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "w",
    ]
    options += ["--init", str(tmp_path)] if pair else []
    assert minutes.main([*map(str, folders), *options]) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 1 and records[-1]["done"]
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"target.safetensors", "drafter.safetensors"}
    assert [record["part"] for record in records if record.get("done") and "part" in record] == [
        "together" if pair else "target",
        "drafter",
    ]
