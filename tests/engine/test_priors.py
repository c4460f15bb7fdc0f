"""What drafts had kept, from one start to the next."""

from dataclasses import replace

import pytest
from cost_tables import table

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.engine.priors import Priors
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.speculative.acceptance import SHIPPED, AcceptanceFile, shipped
from mlx_gemma_mtp.speculative.auto import Auto
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS
from mlx_gemma_mtp.speculative.drafting import DEFAULT_DRAFTING, Drafting
from mlx_gemma_mtp.speculative.history import BINS, Acceptance, History, Trust

GREEDY = SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True, seed=0)
SOME = Acceptance(History((9.0,) * MAX_DRAFTS, (8.0,) * MAX_DRAFTS), Trust((9.0,) * BINS, (8.0,) * BINS))
KEY = {"pair": "a"}


def test_a_start_leaves_it_for_the_next(tmp_path, monkeypatch):
    """Without learning nothing is written, and equal starts choose equally, whatever another one learned meanwhile."""
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    kept = lambda: sorted(tmp_path.glob("acceptance-*"))  # noqa: E731
    depths = []
    for _ in range(2):
        with load(dtype="float32", learning=False) as engine:
            depths.append(engine.generate("def area(width, height):", GREEDY).stats.depths)
    assert depths[0] == depths[1] and not kept()
    with load(dtype="float32") as engine, monkeypatch.context() as patch:
        patch.setattr(Auto, "timed", lambda *round: None)  # drafts pay by the table, whatever rounds take here
        engine.depth.adopt({"greedy": table(0.02, 0.02)})
        first = engine.generate("def area(width, height):", GREEDY, num_draft_tokens=0).tokens
        shipped = dict(engine.depth.priors)
        assert engine.generate("def area(width, height):", GREEDY).tokens == first
        for prompt in ("def f(x):", "import os"):
            engine.generate(prompt, GREEDY)
    (file,) = kept()
    assert len(list(tmp_path.glob("*.part"))) == 0
    before = file.read_bytes()
    for _ in range(2):
        with load(dtype="float32", learning=False) as engine:
            assert engine.depth.priors["greedy"] != shipped.get("greedy")
            depths.append(engine.generate("def area(width, height):", GREEDY).stats.depths)
    assert depths[2] == depths[3] and file.read_bytes() == before


def test_more_is_added_to_what_is_kept(tmp_path):
    """What is there weighs less, and kinds of text that learned nothing stay."""
    priors = Priors(AcceptanceFile(KEY, tmp_path))
    assert priors.known == {}
    priors.learn({})
    assert not any(tmp_path.iterdir())
    priors.learn({"greedy": SOME, "sampled": SOME})
    priors.learn({"greedy": SOME})
    known = Priors(AcceptanceFile(KEY, tmp_path)).known
    assert known["sampled"] == SOME and 9 < known["greedy"].rounds < 18
    assert known["greedy"].history.kept[0] / known["greedy"].history.tried[0] == pytest.approx(8 / 9, abs=1e-3)


def test_a_shipped_one_holds_until_something_is_learned(tmp_path):
    (tmp_path / SHIPPED).write_text(shipped({"greedy": SOME, "sampled": SOME}, KEY))
    file, notices = AcceptanceFile(KEY, tmp_path / "cache"), []
    priors = Priors(file, tmp_path, KEY, notices.append)
    assert priors.known == {"greedy": SOME, "sampled": SOME}
    priors.learn({"greedy": SOME})
    assert Priors(file, tmp_path, KEY, notices.append).known["greedy"].rounds > 9
    assert Priors(file, tmp_path, KEY, notices.append).known["sampled"] == SOME
    assert Priors(None, tmp_path, {"pair": "b"}, notices.append).known == {}
    assert len(notices) == 1 and SHIPPED in notices[0] and "another pair's" in notices[0]


@pytest.mark.parametrize("broken", ["corrupt", "foreign", "unwritable"])
def test_a_file_that_is_no_use_is_said_once_and_ignored(tmp_path, broken):
    file, notices = AcceptanceFile(KEY, tmp_path / "cache"), []
    if broken == "unwritable":
        (tmp_path / "cache").write_text("a file where the folder should be")
    else:
        file.path.parent.mkdir()
        file.path.write_text("{" if broken == "corrupt" else shipped({"greedy": SOME}, {"pair": "b"}))
    priors = Priors(file, notice=notices.append)
    assert priors.known == {} and len(notices) == (broken != "unwritable")
    priors.learn({"greedy": SOME})
    priors.learn({"greedy": SOME})
    assert len(notices) <= 2 and all(str(file.path) in each and "\n" not in each for each in notices)
    if broken != "unwritable":
        assert Priors(AcceptanceFile(KEY, tmp_path / "cache")).known["greedy"].rounds > 9


def test_other_drafts_have_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    pair = hub.find_pair(None, "auto", None)
    ways = (DEFAULT_DRAFTING, Drafting(-1), Drafting(0, 0.5), Drafting(accept="rejection"))
    priors = [Priors.of_pair(pair, each, pytest.fail) for each in ways]
    assert len({each.file.path for each in priors}) == len(ways)
    assert all(each.known == {} for each in priors[1:])
    assert set(priors[0].known) == {"greedy", "sampled"}  # what the bundled pair ships
    assert Priors.of_pair(replace(pair, drafter=None), ways[0], pytest.fail).file is None
