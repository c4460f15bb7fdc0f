"""What the plan of a round is made of: jobs come in, pieces and places go out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Job:
    """What the plan knows of a request.

    id: unique. prompt: its tokens. limit: the most tokens to generate. priority: -100 to 100, higher goes first.
    deadline: when it ends unfinished, by the clock of `plan`; None for never. keys: the i-th stands for the first (i +
    1) * grid tokens of the prompt, its last token left out: two jobs with an equal key begin with the same tokens.
    cached: how many of its tokens were kept from others when it came.
    """

    id: int
    prompt: int
    limit: int
    priority: int = 0
    deadline: float | None = None
    keys: tuple[int, ...] = ()
    cached: int = 0


class Known(NamedTuple):
    """What is kept for a request that is staged. tokens: how many of its first tokens have K/V already. keep: numbers
    of tokens: what is to be kept of its prompt for others, once it is so far.
    """

    tokens: int = 0
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Tokens start to stop of a request's prompt, to be prefilled in this round.

    They begin where the last piece ended, or behind what was kept of it. keep: numbers of tokens, rising, above `start`
    and up to `stop`: so many first tokens are kept for others once the piece is prefilled. Of a requeued request the
    text so far belongs to the prompt, but for its newest token, which its first verify feeds.
    """

    id: int
    start: int
    stop: int
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a round does, in the order of the fields. Ids are those of jobs.

    ended: who leaves unfinished, and why ('cancelled', 'timeout' or what `cancel` was told); all K/V of it go.
    forget: whose K/V go, be they a row, saved or staged; it will be prefilled anew from its first token.
    save: rows whose K/V are saved before their places are given away.
    trim: whether the batch gives back the rows and slots that it holds for nobody, once those that leave are out.
    places: the requests of the batch's rows in order. Those that had a row and stay keep it or move; all others join. A
    hole goes to a joiner first, then to the last row.
    begins: whether no row stays and no request of `places` has its first token yet: the round draws it from the hidden
    state of its prompt's last token, and prefills nothing. Otherwise every joiner has a newest token.
    pieces: what is prefilled in this round, in one forward.
    firsts: staged requests whose prompt is prefilled with this round's pieces, or was before: their first tokens are
    drawn in this round. Empty where `places` is, and where the batch begins: then a later plan draws them or lets them
    begin the batch, so the hidden state of a prompt's last token is kept until then.
    """

    ended: tuple[tuple[int, str], ...] = ()
    forget: tuple[int, ...] = ()
    save: tuple[int, ...] = ()
    trim: bool = False
    places: tuple[int, ...] = ()
    begins: bool = False
    pieces: tuple[Piece, ...] = ()
    firsts: tuple[int, ...] = ()
