"""A target gives way where its drafter expects another token: what it is taught is what is said, and it learns it."""

import copy
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from safetensors.torch import load_file

from mlx_gemma_mtp.files import hub
from training import agree, polish, together

pytestmark = pytest.mark.parity
ROWS = [([2, 5, 40, 6, *range(60, 60 + size)], 4) for size in (40, 3, 161)]


def rows():
    return [agree.Row(tokens, start) for tokens, start in ROWS]


def learning(pair):
    """Copies that learn, and the teacher."""
    target, drafter = (copy.deepcopy(model).requires_grad_(True) for model in pair)
    return target, drafter, pair


@torch.no_grad()
def test_the_teacher_is_the_geometric_mean_of_target_and_first_draft(pair):
    """Each place by itself: a drafter's first step over the keys before the token after which it drafts."""
    target, drafter = pair
    tokens, weights = agree.padded(rows())
    taught = agree.wanted(target, drafter, tokens, 0.4)
    assert taught.shape == (3, 164, 4096) and torch.allclose(taught.sum(-1), torch.ones(3, 164), atol=1e-5)
    for place, (text, start) in enumerate(ROWS):
        marks = [agree.QUESTION] * (start - 1) + [1.0] * (len(text) - start) + [0.0] * (165 - len(text))
        assert weights[place].tolist() == pytest.approx(marks)
        out = target(torch.tensor([text]))
        for at in {1, 2, len(text) // 2, len(text) - 2}:
            kept = {kind: tuple(x[:, :, :at] for x in out.kept[layer]) for kind, layer in ((True, 4), (False, 5))}
            state, embedded = out.hidden[:, :at], torch.zeros_like(out.hidden[:, :at])
            embedded[:, -1] = target.embed(torch.tensor(text[at]))
            first = drafter.logits(drafter(embedded, state, kept)[0][0, -1]).softmax(-1)
            own = target.logits(out.hidden[0, at]).softmax(-1)
            mean = own**0.6 * first**0.4
            assert torch.allclose(taught[place, at], mean / mean.sum(), atol=1e-4), (place, at)
        assert torch.allclose(taught[place, 0], target.logits(out.hidden[0, 0]).softmax(-1), atol=1e-5)


def test_whoever_leans_on_itself_is_not_apart(pair):
    target, drafter, teacher = learning(pair)
    _, apart = agree.loss(target, drafter, teacher, rows(), np.random.default_rng(0), lean=0.0)
    assert apart == pytest.approx(0.0, abs=1e-5)
    _, apart = agree.loss(target, drafter, teacher, rows(), np.random.default_rng(0), lean=0.5)
    assert apart > 0.01


def test_the_drafter_reaches_what_it_reads_of_the_target(pair):
    """With a share of its gradient: the target's share of it is REACH of what it would be."""
    grads = []
    for reach in (together.REACH, 1.0):
        target, drafter, _ = learning(pair)
        tokens, _ = agree.padded(rows()[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(together, "REACH", reach)
            seen = agree.seen(target(tokens), target.sizes, rows()[:1], tokens)
        polish.loss(target, drafter, polish.Batch.of([polish.pick(seen[0], None)])).backward()
        grads.append(target.model.layers[0].mlp.down_proj.weight.grad)
    assert grads[0].abs().max() > 0
    assert torch.allclose(grads[0], grads[1] * together.REACH, rtol=1e-3, atol=1e-7)


def test_both_learn_to_agree(pair):
    """The target comes nearer to the teacher, and more first drafts are its choice."""
    target, drafter, teacher = learning(pair)
    learned, noise = rows()[:1], np.random.default_rng(0)
    before = agree.measure(target, drafter, learned)
    optimizers = [polish.MuonAdam(target, 0.001, 1e-4, router=1e-4), polish.MuonAdam(drafter, 0.003, 3e-4)]
    apart = []
    for _ in range(16):
        value, now = agree.loss(target, drafter, teacher, learned, noise)
        value.backward()
        apart.append(now)
        for optimizer in optimizers:
            optimizer.step(1.0)
    assert min(apart[-3:]) < 0.5 * apart[0], apart
    after = agree.measure(target, drafter, learned)
    assert after[0] > before[0] + 0.1 and after[-1] > before[-1] + 0.1, (before, after)


def test_rows_of_like_length_stand_together_and_each_stands_once():
    made = [agree.Row([1] * size, 1) for size in np.random.default_rng(1).integers(2, 400, 300)]
    groups = list(agree.grouped(made, np.random.default_rng(0)))
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, made))
    for group in groups:
        longest = max(len(row.tokens) for row in group)
        assert longest * len(group) <= agree.TOKENS and longest - min(len(row.tokens) for row in group) < 100


def test_what_is_written_keeps_a_share_of_the_weights_at_first(pair):
    made, first = copy.deepcopy(pair[1]), pair[1]
    with torch.no_grad():
        for weight in made.parameters():
            weight += 1.0
    agree.blend(made, first)
    for weight, old in zip(made.state_dict().values(), first.state_dict().values(), strict=True):
        moved = 0.0 if weight.numel() == 1 else 1 - agree.KEEP  # a layer's scalar is no parameter
        assert torch.allclose(weight, old + moved, atol=1e-5)


def test_a_run_ends_in_time_and_writes_both_weights(tmp_path, pair):
    replies, shards = tmp_path / "replies", tmp_path / "shards"
    replies.mkdir()
    shards.mkdir()
    entries = [{"asked": [2, 5, 40, 6], "reply": [100 + i, *range(300, 330)]} for i in range(18)]
    (replies / "000000.json").write_text(json.dumps(entries))
    np.savez(shards / "raw-00.npz", stream=np.arange(600, dtype=np.uint16))
    arguments = ["--pair", str(hub.DEMO), "--replies", str(replies), "--shards", str(shards), "--out",
                 str(tmp_path / "out"), "--seconds", "1"]  # fmt: skip
    assert agree.main(arguments) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[0]["rows"] == 16 and len(log[0]["held"]) == polish.ROUND + 1 and log[-1]["step"] >= 1
    for name, model in zip(("target", "drafter"), pair, strict=True):
        written = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert set(written) == set(model.state_dict())
        assert any(not torch.equal(weight, written[key].float()) for key, weight in model.state_dict().items()), name
