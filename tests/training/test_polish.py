"""A drafter goes on learning on unseen questions: what is computed is drafting, at the queries that are picked."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from safetensors.torch import load_file
from test_packages import wheel

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from training import bundled, dense, packages, polish, unseen

pytestmark = pytest.mark.parity
ROWS = [([2, 5, 40, 6, *range(60, 60 + size)], 4) for size in (3, 40, 161)]
CODE = '''
def load_rows(path, limit=10):
    """Load the rows of a file."""
    with open(path) as file:
        return file.read().splitlines()[:limit]


def save_rows(path, rows):
    """Save rows to a file."""
    with open(path, "w") as file:
        file.writelines(rows)
'''


@torch.no_grad()
def drafted(target, drafter, tokens, out, at):
    """Each draft step's scores at one query, over keys before it, and the target's, whose forward is `out`: pairs."""
    kept = {kind: tuple(x[:, :, :at] for x in out.kept[layer]) for kind, layer in ((True, 4), (False, 5))}
    state, embedded, found = out.hidden[:, :at], target.embed(tokens), []
    for count in range(min(polish.ROUND, tokens.shape[1] - 1 - at)):
        read = torch.zeros_like(state)
        read[:, -1] = embedded[:, at + count]
        hidden, after = drafter(read, state, kept)
        state = torch.zeros_like(state)
        state[:, -1] = after[:, -1]
        found.append((drafter.logits(hidden[0, -1]), target.logits(out.hidden[0, at + count])))
    return found


def test_what_was_right_and_the_loss_are_those_of_drafting(pair):
    """With rows of other lengths beside it, past the window, up to the last token."""
    target, drafter = pair
    seen = polish.see(target, ROWS)
    polish.loss(target, drafter, polish.Batch.of([polish.pick(row, None) for row in seen]))
    for row, (tokens, start) in zip(seen, ROWS, strict=True):
        whole = torch.tensor([tokens])
        out, expected = target(whole), 0.0
        for place in range(0, row.queries, 1 if row.queries < 50 else 7):
            right = 0
            for scores, wanted in drafted(target, drafter, whole, out, start + place):
                guessed = scores.log_softmax(-1)
                hard, soft = guessed[wanted.argmax()], (guessed * wanted.softmax(-1)).sum()
                expected -= (polish.FIRST_CHOICE * hard + (1 - polish.FIRST_CHOICE) * soft).item()
                if scores.argmax() != wanted.argmax():
                    break
                right += 1
            assert int(row.right[place]) == right, (place, tokens[:8])
        if row.queries < 50:  # nothing was known of the row before: each query begins a round
            row.right = None
            value = polish.loss(target, drafter, polish.Batch.of([polish.pick(row, None)])).item()
            assert value == pytest.approx(expected / row.queries, rel=2e-3)  # states are kept in half precision


def row_with(right):
    row = polish.Seen(torch.zeros(5 + len(right), dtype=torch.long), torch.zeros(0), {}, 4)
    row.right = torch.tensor(right, dtype=torch.int8)
    return row


def test_rounds_begin_where_the_one_before_was_wrong():
    row = row_with([2, 4, 0, 1, 3, 0])
    assert row.begun(0) == [0, 3, 5] and row.begun(2) == [2, 3, 5] and row.begun(9) == []
    *shares, tokens = polish.rounds([row])
    assert shares == pytest.approx([2 / 3, 1 / 3, 0, 0]) and tokens == pytest.approx(1 + (2 + 1 + 0) / 3)
    row = row_with([1, 4, -1, 0, -1, 3])  # two were never computed: the next query begins a round, they are not counted
    assert row.begun(0) == [0, 2, 3, 4, 5] and polish.rounds([row])[-1] == pytest.approx(1 + (1 + 0 + 3) / 3)


def test_picked_are_the_begun_and_a_share_of_the_others():
    row, noise = row_with([4, 0, 0, 0, 0] * 200), np.random.default_rng(0)
    assert polish.pick(row, None).places.tolist() == list(range(1000))  # without noise all are measured
    assert polish.pick(row, None).begins.nonzero()[:, 0].tolist() == list(range(0, 1000, 5))
    made = polish.pick(row, noise)
    begun = made.places[made.begins].tolist()
    assert begun == row.begun(begun[0]) and begun[0] < polish.ROUND
    others = len(made.places) - len(begun)
    assert 0.2 < others / (1000 - len(begun)) < 0.3
    row.right = None
    made = polish.pick(row, noise)
    assert 300 < len(made.places) < 500 and (made.begins | (made.places < polish.ROUND)).all()


def test_queries_that_go_on_move_to_the_front():
    keep = torch.tensor([[False, True, False, True], [False, False, True, False]])
    places, states, kept = polish.fewer(keep, torch.arange(8).view(2, 4), torch.arange(16.0).view(2, 4, 2))
    assert places[kept].tolist() == [1, 3, 6] and states[kept].tolist() == [[2.0, 3.0], [6.0, 7.0], [12.0, 13.0]]


def test_a_drafter_learns_replies(pair):
    """More of its drafts are right. (The loss says less: where more are right, more steps are in it.)"""
    target, drafter = pair[0], dense.Drafter(dense.Sizes())
    drafter.load_state_dict(pair[1].state_dict())
    seen = polish.see(target, ROWS[:2])
    before = polish.measure(target, drafter, seen)
    optimizer = polish.MuonAdam(drafter, polish.MUON, polish.ADAM)
    for _ in range(12):
        polish.loss(target, drafter, polish.Batch.of([polish.pick(row, None) for row in seen])).backward()
        optimizer.step(1.0)
    after = polish.measure(target, drafter, seen)
    assert after[0] > before[0] + 0.1 and after[-1] > before[-1] + 0.1, (before, after)


def test_a_run_ends_in_time_and_writes_both_weights(tmp_path, pair):
    replies = tmp_path / "replies"
    replies.mkdir()
    asked = [2, 5, 40, 6]
    entries = [{"asked": asked, "reply": [100 + i, *range(300, 330)]} for i in range(18)]
    (replies / "000000.json").write_text(json.dumps(entries))
    arguments = ["--pair", str(hub.DEMO), "--replies", str(replies), "--out", str(tmp_path / "out"), "--seconds", "1"]
    assert polish.main(arguments) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert log[0]["rows"] == 16 and len(log[0]["held"]) == polish.ROUND + 1 and log[-1]["done"]
    target, drafter = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("target", "drafter"))
    for name, weight in pair[0].state_dict().items():
        assert torch.equal(weight, target[name].float())  # frozen
    assert any(not torch.equal(weight, drafter[name].float()) for name, weight in pair[1].state_dict().items())


def test_questions_are_about_the_wheels_and_none_is_forbidden(tmp_path):
    path = wheel(tmp_path, "MIT", {"rows/io.py": CODE * 2})
    found, names = packages.of_wheels([path])
    assert names == [{"name": "Rows", "version": "1.2", "licence": "MIT"}] and [m.path for m in found] == ["rows/io.py"]
    asked = unseen.questions(found, frozenset(), 60)
    assert len(set(asked)) == 60 and sum("load_rows" in each or "save_rows" in each for each in asked) > 20
    forbidden = frozenset(asked[:30])
    assert not forbidden & set(unseen.questions(found, forbidden, 60))


@pytest.mark.parametrize("licence", ["LGPL-3.0", "MPL-2.0 AND MIT", "MIT OR GPL-2.0"])
def test_a_licence_that_does_not_permit_it_is_refused(tmp_path, licence):
    with pytest.raises(UserError, match=licence):
        packages.of_wheels([wheel(tmp_path, licence, {"rows/io.py": CODE})])


def test_replies_are_those_of_the_target(tmp_path):
    """Three batches of two questions, one of them there before: it is not asked again."""
    path = wheel(tmp_path, "MIT", {"rows/io.py": CODE * 2})
    out = tmp_path / "out"
    out.mkdir()
    (out / "000000.json").write_text(json.dumps([{"user": "", "asked": [2, 5], "reply": [7, 6]}]))
    arguments = ["--wheels", str(path.parent), "--pair", str(hub.DEMO), "--out", str(out), "--count", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unseen, "BATCH", 1)
        patch.setattr(unseen, "NEW_TOKENS", 8)
        assert unseen.main(arguments) == 0
    rows = unseen.read(out)
    assert len(rows) == 3 and rows[0] == ([2, 5, 7, 6], 2)
    target = dense.Target(dense.Sizes())
    bundled.fill(target, hub.DEMO / "target")
    for tokens, start in rows[1:]:
        assert 0 < len(tokens) - start <= 8
        with torch.no_grad():
            scores = target.logits(target(torch.tensor([tokens])).hidden[0, start - 1 : -1])
        assert scores.argmax(-1).tolist() == tokens[start:]
