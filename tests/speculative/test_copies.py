"""Copies: what followed an earlier occurrence of the last tokens, found by the host."""

import random

import pytest

from mlx_gemma_mtp.speculative.copies import LEAST, MOST, PATIENCE, Copy, RowText, agreeing


def test_the_continuation_of_the_longest_match_is_found():
    text = RowText([1, 2, 3, 4, 50, 2, 3, 60, 9, 1, 2, 3])
    assert text.find(3) == Copy([4, 50, 2], 3, 3)  # of 1 2 3; the later 2 3 is a shorter match
    text.add([60])
    assert text.find(2) == Copy([9, 1], 3, 8)


def test_the_latest_of_equal_matches_is_taken():
    assert RowText([5, 6, 7, 0, 5, 6, 8, 1, 5, 6]).find(1) == Copy([8], 2, 6)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [7, 1, 2, 7]])
def test_where_nothing_matches_nothing_is_found(tokens):
    """One equal token is no match."""
    assert RowText(tokens).find(4) is None
    assert RowText([1, 2, 3, 1, 2]).find(0) is None


def test_a_text_that_repeats_itself_goes_on_so():
    assert RowText([9, 1, 2, 1, 2]).find(6).tokens == [1, 2, 1, 2, 1, 2]
    assert RowText([4, 4, 4]).find(3).tokens == [4, 4, 4]


def slowly(text: list[int], most: int) -> tuple[list[int], int] | None:
    """The same by trying every place: the latest of the longest matches."""
    found = (0, -1)
    for end in range(len(text) - 1):
        length = 0
        while length < MOST and length <= end and text[end - length] == text[len(text) - 1 - length]:
            length += 1
        found = max(found, (length, end))
    if found[0] < LEAST:
        return None
    tokens = text[found[1] + 1 :]
    return [tokens[i % len(tokens)] if i >= len(tokens) else tokens[i] for i in range(most)], found[0]


def test_random_texts_have_what_a_slow_search_finds():
    rng = random.Random(0)
    for _ in range(300):
        whole = [rng.randrange(rng.choice([2, 3, 9])) for _ in range(rng.randrange(1, 60))]
        cut = rng.randrange(len(whole) + 1)
        text = RowText(whole[:cut])
        for token in whole[cut:]:
            text.add([token])
        assert text.tokens == whole
        found, most = text.find(5), 5
        assert (None if found is None else (found.tokens, found.length)) == slowly(whole, most), whole


def test_a_copy_that_was_left_goes_on_behind_what_was_changed():
    """As in an edit of one token: nothing matches behind it, and the place is still known."""
    text = RowText([*range(10, 40), 1, 10, 11, 12])
    copy = text.find(6)
    assert copy.tokens == [13, 14, 15, 16, 17, 18]
    text.add([13, 14, 99], copy)  # 99 for 15
    assert text.find(3) == Copy([16, 17, 18], 0, 6)
    text.add([98], text.find(3))  # 98 for 16
    assert text.find(3).tokens == [17, 18, 19]
    for i in range(PATIENCE):
        text.add([200 + i])
    assert text.find(3) is None


def test_of_equal_matches_the_one_near_the_last_copy_is_taken():
    """A file whose lines are alike: the copy stays where it was, though a later place matches as well."""
    lines = [1, 2, 3, 20, 1, 2, 3, 30, 1, 2, 3, 40]
    text = RowText([7, 8, *lines, 9, 7, 8])
    copy = text.find(4)
    assert copy.tokens == [1, 2, 3, 20]
    text.add([1, 2, 3, 77], copy)
    text.add([1, 2, 3])
    assert text.find(1).tokens == [30]


def test_a_prediction_is_proposed_from_its_beginning():
    text = RowText([1, 2, 3], [50, 51, 52, 53])
    assert text.find(3).tokens == [50, 51, 52]
    text.add([50, 60], text.find(3))
    assert text.find(3).tokens == [52, 53]  # what stands behind it is not its continuation
    assert RowText([1, 2, 50, 51], [50, 51, 52]).find(5).tokens == [52]


def test_tokens_that_are_expected_count_as_text():
    text = RowText([1, 2, 3, 4, 5, 9])
    assert text.find(2) is None and text.find(2, [2, 3]).tokens == [4, 5]
    assert text.find(4, [9, 9]) is None
    assert text.tokens == [1, 2, 3, 4, 5, 9]


def test_a_long_text_grows():
    text = RowText([1, 2])
    for i in range(3000):
        text.add([3 + i])
    text.add([3, 4])
    assert text.find(2).tokens == [5, 6] and len(text.tokens) == 3004


def test_texts_agree_as_far_as_they_do():
    assert [agreeing(*pair) for pair in (([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]))] == [0, 1, 2]


class Counted(list):
    """A list that counts the elements that are read of it."""

    read = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self):
        self.read += len(self)
        return super().__iter__()


def test_a_search_reads_no_more_than_what_ends_alike():
    """Between the readback and the next dispatch nothing is scanned, however long the text is."""
    text = RowText([*range(8000), 5, 5000, 5001])
    text.tokens = Counted(text.tokens)
    assert text.find(3).tokens == [5002, 5003, 5004] and text.tokens.read < 3 * MOST
    text.add([9000])
    text.tokens.read = 0
    assert text.find(3) is None and text.tokens.read <= MOST
