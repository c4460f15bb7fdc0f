"""The mixture: whose drafts a row has, by what each source would have had kept, and how wide its verify may be."""

import mlx.core as mx
import pytest

from mlx_gemma_mtp.sampling.distribution import Distribution
from mlx_gemma_mtp.speculative.copies import RowText
from mlx_gemma_mtp.speculative.correction import Prices
from mlx_gemma_mtp.speculative.costs import CostTable
from mlx_gemma_mtp.speculative.drafting import COPY, FORCED, MTP, Drafting, Drafts
from mlx_gemma_mtp.speculative.guide import Guide, only
from mlx_gemma_mtp.speculative.mixture import HOT, PLACES, Chain, Mixture, Rates, mixed, reason_of
from mlx_gemma_mtp.speculative.widening import wider

FILE = list(range(100, 160))
START = [*FILE, 1, *FILE[:8]]  # the first 8 tokens of a file are said again


def mixture(text=START, sources="mtp,copy") -> Mixture:
    made = Mixture(Drafting(sources=sources))
    made.begin([RowText(text)])
    return made


def chain(made: Mixture, drafts, reach=12, confidences=(), drawn=False) -> Chain:
    return made.chains([drafts], [list(confidences)], [reach], drawn)[0]


def test_a_copy_extends_drafts_that_it_agrees_with():
    found = chain(mixture(), [108, 109], confidences=[0.9, 0.9])
    assert found.tokens == FILE[8:20] and found.sources == [MTP] * 2 + [COPY] * 10 and found.own == 2
    assert found.rates[:2] == [0.9, 0.9] and all(0 < rate < 1 for rate in found.rates)


def test_a_copy_that_disagrees_with_sure_drafts_is_left():
    found = chain(mixture(), [108, 5], confidences=[0.99, 0.99])
    assert (found.tokens, found.sources) == ([108, 5], [MTP, MTP])


def test_a_copy_takes_the_place_of_drafts_that_are_doubted():
    found = chain(mixture(), [5, 6], confidences=[0.1, 0.1])
    count = len(found.tokens)  # not all of 12: that so many are kept is not likely
    assert 6 < count < 12 and found.tokens == FILE[8 : 8 + count]
    assert set(found.sources) == {COPY} and found.replaced and found.own == 0


def test_what_was_drawn_chooses_nothing():
    """Under rejection the drafts of a row, and how sure they are, must not decide whether they are verified."""
    made = mixture()
    assert not chain(made, [5, 6], confidences=[0.01, 0.01], drawn=True).replaced
    assert not chain(made, [5, 6], confidences=[0.99, 0.99], drawn=True).replaced
    for _ in range(40):
        made.rows[0].drafter.add(0, False)  # the past may
    assert all(chain(made, [5, 6], confidences=[sure] * 2, drawn=True).replaced for sure in (0.01, 0.99))


def test_no_row_has_more_drafts_than_it_reaches():
    assert chain(mixture(), [108, 109], reach=2).tokens == [108, 109]
    assert chain(mixture(), [], reach=0).tokens == [] and len(chain(mixture(), [], reach=3).tokens) == 3


def test_without_copies_the_drafts_are_the_drafters():
    found = chain(mixture(sources="mtp,forced"), [5, 6], confidences=[0.1, 0.2])
    assert found == Chain([5, 6], [MTP, MTP], [0.1, 0.2])


def test_a_source_is_judged_though_it_was_not_verified():
    """Copies that were not tried and would have been kept take the place of sure drafts that were not."""
    made, at = mixture([*FILE, *FILE, *FILE, 1, *FILE[:8]]), 8
    for _ in range(8):
        chain(made, [7, 7], confidences=[0.95, 0.95])
        made.take([[FILE[at]]])
        at += 1
    assert made.pool.copies.rate(5) > 0.9 and made.pool.drafter.rate(PLACES + 9) < 0.4
    fresh = Mixture(Drafting(sources=(MTP, COPY, FORCED)), made.pool)
    fresh.begin([RowText(START)])
    assert chain(fresh, [7, 7], confidences=[0.95, 0.95]).replaced  # another row knows it from the pool


def test_copies_that_fail_are_left():
    made = mixture([])
    for i in range(60):  # pairs of tokens come again, with another token behind them
        chain(made, [500 + i], confidences=[0.6])
        made.take([[300 + i, 1, 2]])
    assert made.pool.copies.rate(1) < 0.1 and not chain(made, [5], confidences=[0.3]).replaced


def test_the_drafter_is_not_asked_while_copies_are_kept_whole():
    made, at = mixture(), 8
    for _ in range(HOT + 1):
        chain(made, [])
        made.take([FILE[at : at + 10]])
        at += 10
    assert made.hot([0]) and not made.hot([])
    chain(made, [])
    made.take([[3]])
    assert not made.hot([0])


class Forcing:
    """A Constraint that leaves one token alone in every place but the third."""

    def __init__(self, tokens, at=0):
        self.tokens, self.at = tokens, at

    def copy(self):
        return Forcing(self.tokens, self.at)

    def mask(self):
        return None if self.at == 2 else only([self.tokens[self.at]], 200)

    def advance(self, token):
        self.at += 1


def test_what_a_grammar_forces_says_nothing_of_who_drafted_it():
    """Both sources say all six tokens, and each is judged by the one that was free."""
    made, ahead = mixture(sources="mtp,copy,forced"), FILE[8:14]
    chains = made.chains([ahead], [[0.95] * 6], [6])
    found, look = made.led(Guide([Forcing(ahead)], 200), chains, [6])
    assert found[0].tokens == ahead and look.counts == [6]
    made.take([ahead])
    assert sum(made.pool.copies.tried) == sum(made.pool.copies.kept) == 1
    assert sum(made.pool.drafter.tried) == sum(made.pool.drafter.kept) == 1
    chain(made, FILE[14:16], confidences=[0.9, 0.9])  # the next round has no grammar
    made.take([FILE[14:17]])
    assert sum(made.pool.drafter.kept) > 2.9 < sum(made.pool.copies.kept)


def test_rows_move_with_what_is_known_of_them():
    made = Mixture(Drafting(sources=(MTP, COPY, FORCED)))
    made.begin([RowText([1]), RowText(START)])
    made.arrange([1, RowText([2])])
    assert made.rows[0].text.tokens == START and chain_of_rows(made) == [FILE[8:11], []]
    made.take([[FILE[8]], [3]])
    assert made.rows[1].text.tokens == [2, 3]


def chain_of_rows(made: Mixture) -> list[list[int]]:
    return [each.tokens for each in made.chains([[], []], [[], []], [3, 3])]


def test_rates_begin_with_the_pool_and_become_the_rows_own():
    pool = Rates([0.5], 0.99)
    own, other = Rates([0.5], 0.95, pool), Rates([0.5], 0.95, pool)
    for _ in range(50):
        own.add(0, True)
    assert own.rate(0) > 0.95 and other.rate(0) == pool.rate(0) > 0.9
    for _ in range(50):
        other.add(0, False)
    assert other.rate(0) < 0.1 < 0.8 < own.rate(0)


def test_drafts_that_nothing_changes_are_the_same_object():
    """A verify that was built of them stands."""
    own = Drafts(mx.array([[5, 6]]), mx.zeros((1, 0)))
    assert mixed(own, [[5, 6]], [Chain([5, 6], [MTP, MTP], [0.5, 0.5])]) is own
    longer = mixed(own, [[5, 6]], [Chain([5, 6, 7], [MTP, MTP, COPY], [0.5] * 3)])
    assert longer.tokens.tolist() == [[5, 6, 7]] and longer.named == [(MTP, MTP, COPY)]
    cut = mixed(own, [[5, 6]], [Chain([5], [MTP], [0.5], 1)])
    assert (cut.tokens.tolist(), cut.of_each, cut.refused) == ([[5]], [1], (1,))


def test_rows_of_different_lengths_are_padded():
    own = Drafts(mx.array([[5, 6], [7, 8]]), mx.zeros((2, 0)))
    chains = [Chain([5, 6], [MTP] * 2, [0.5] * 2), Chain([1, 2, 3], [COPY] * 3, [0.5] * 3)]
    found = mixed(own, [[5, 6], [7, 8]], chains)
    assert found.of_each == [2, 3] and found.tokens.tolist()[1] == [1, 2, 3]
    turned = found.arranged([1, 2], mx.array([9]))
    assert turned.named == [(COPY,) * 3, ()] and turned.of_each == [3, 0]
    assert found.counted([1, 1]).named == [(MTP,), (COPY,)]


@pytest.mark.parametrize("shortlist", [False, True])
def test_a_copy_is_certain_where_drafts_were_drawn(shortlist):
    """q of a copied token is one, and of every other 0; that of the drafter's drafts stays."""
    tokens = mx.array([[[3, 8, 1], [2, 9, 7]]]) if shortlist else None
    q = Distribution(mx.array([[3, 2]]), mx.log(mx.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]])), tokens)
    vocab = 10 if shortlist else 3
    own = Drafts(mx.array([[1, 2]]), mx.zeros((1, 0)), q)
    copied = 9 if shortlist else 0
    found = mixed(own, [[1, 2]], [Chain([1, 2, copied], [MTP, MTP, COPY], [0.5] * 3)])
    p = found.q.at(None, vocab)
    assert mx.allclose(p[:, :2], q.at(None, vocab)) and p[0, 2].tolist() == [float(i == copied) for i in range(vocab)]


def test_the_reason_of_a_width_is_the_last_other_source():
    assert [reason_of(each) for each in ([], [MTP], [MTP, COPY], [FORCED, COPY, MTP])] == ["", "", COPY, COPY]


def prices(verify, draft=0.1) -> Prices:
    rounds = tuple(each + i * draft for i, each in enumerate(verify))
    return Prices(rounds, draft, rounds)


FLAT = prices([1 + 0.01 * i for i in range(16)])
DEAR = prices([1 + 0.8 * i for i in range(16)])
STEP = prices([1 + 0.01 * i + 3 * (i > 7) for i in range(16)])  # beyond eight queries a row another kernel


def test_a_wide_verify_costs_what_was_measured():
    """And where nothing was, it goes on as over the last widths that were."""
    sure = [[0.95] * 15]
    assert wider(sure, [15], 3, STEP, 3, 0) == 7 and wider(sure, [15], 3, FLAT, 3, 0) == 15
    costs = CostTable.of({(1, 0, width): 1 + 0.1 * width for width in (0, 1, 4)}, {(1, 0): 0.1})
    assert costs.verify_at(1, 0)[15] == pytest.approx(2.5)
    assert wider([[0.95] * 20], [20], 3, FLAT, 3, 0) == 15


def test_a_verify_is_as_wide_as_pays():
    sure, doubted = [[0.95] * 15], [[0.5] * 3 + [0.05] * 12]
    assert wider(sure, [15], 3, FLAT, 3, 0) == 15
    assert wider(sure, [6], 3, FLAT, 3, 0) == 6  # the text ends there
    assert wider(doubted, [15], 3, FLAT, 3, 0) == 3
    assert wider(sure, [15], 1, DEAR, 1, 0) < 6  # each draft costs most of a step
    assert wider([[1.0] * 15], [15], 0, DEAR, 0, 0) == 15 and wider(sure, [15], 3, None, 3, 0) == 3


def test_no_partner_pays_for_a_rows_copies():
    """Where the batch's verify grows with its width, the others would lose; where it does not, the row gains."""
    rates = [[0.95] * 15] + [[0.6] * 3] * 7
    assert wider(rates, [15] * 8, 3, DEAR, 3, 0) == 3
    assert wider(rates, [15] * 8, 3, prices([1 + 1e-4 * i for i in range(16)]), 3, 0) == 15
    assert wider(rates[:1], [15], 3, DEAR, 3, 7) == 3  # partners of a fixed length, too
