"""How many distinct experts a set of tokens wakes, and how many two tokens share: pure functions of logged choices.

A router that chose k of E experts evenly and independently would wake E (1 - (1 - k / E) ** M) of them with M tokens;
two tokens would share k / E of theirs. What is below that is what a pass that reads each expert once saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .routing_trace import Verify

TOKENS = (*range(1, 9), 12, 16, 24, 32)  # M of U(M)
FITTED = range(2, 9)  # M that gamma is fitted to: the widths of one row's verify


def uniform(experts: int, top_k: int, tokens: float) -> float:
    """Expected distinct experts of independent tokens, each with its own even choice."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def independent_tokens(experts: int, top_k: int, distinct: float) -> float:
    """How many tokens with even and independent choices would wake so many experts: `uniform` the other way round.

    Of all experts: infinity.
    """
    left = 1 - distinct / experts
    return math.log(left) / math.log(1 - top_k / experts) if left > 0 else math.inf


def gamma(top_k: int, distinct: dict[int, float]) -> float:
    """The exponent of U(M) = k M ** gamma by least squares in log U, over the M of FITTED that `distinct` has."""
    points = [(math.log(m), math.log(distinct[m] / top_k)) for m in FITTED if m in distinct]
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points) if points else math.nan


def marks(experts: np.ndarray, count: int) -> np.ndarray:
    """Expert numbers [..., k] -> bool [..., count], true where chosen."""
    chosen = np.zeros((*experts.shape[:-1], count), bool)
    np.put_along_axis(chosen, experts.astype(np.int64), True, axis=-1)
    return chosen


def windows(chosen: np.ndarray, tokens: int) -> np.ndarray:
    """Distinct experts of so many consecutive tokens, from every place. [layers, T, E] -> [layers, T - tokens + 1]."""
    counts = np.cumsum(chosen, axis=1, dtype=np.int32)
    counts = np.pad(counts, ((0, 0), (1, 0), (0, 0)))
    return (counts[:, tokens:] > counts[:, :-tokens]).sum(axis=-1)


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of a's experts that b chose, too. bool [..., E], equally many each -> [...]."""
    return (a & b).sum(axis=-1) / a.sum(axis=-1)


@dataclass
class Mean:
    """Of a value of every layer, over samples. total: [layers]."""

    total: np.ndarray | float = 0.0
    samples: int = 0

    def add(self, values: np.ndarray) -> None:
        """values: [layers, samples]."""
        self.total = self.total + values.sum(axis=1)
        self.samples += values.shape[1]

    @property
    def by_layer(self) -> list[float]:
        return (self.total / self.samples).tolist()

    @property
    def pooled(self) -> float:
        return float(np.mean(self.by_layer))


NEIGHBOURS, ROWS, FIRST, LATER = KINDS = (
    "neighbours in a text",
    "rows of a batch",
    "first rejected draft",
    "drafts rejected after it",
)


@dataclass
class Figures:
    """What a trace says. experts, top_k: E and k of the model; tokens: of all texts.

    runs[M]: distinct experts of M consecutive tokens of a text. verifies[R, T]: of R rows x T tokens of one verify,
    rejected drafts included. shares: of the experts of a token, how many another one chose too: its neighbour in the
    text (NEIGHBOURS); the token at the same offset of another row's verify (ROWS); for a rejected draft, the token that
    came to stand at its place. The first rejected draft of a round (FIRST) has the same text before it as that token,
    those behind it (LATER) have not.
    """

    experts: int
    top_k: int
    tokens: int = 0
    runs: dict[int, Mean] = field(default_factory=dict)
    verifies: dict[tuple[int, int], Mean] = field(default_factory=dict)
    shares: dict[str, Mean] = field(default_factory=dict)

    def add(self, batch: Sequence[Verify]) -> None:
        """Counts the verify passes of one batch."""
        texts = texts_of(batch)
        for text in texts.values():
            chosen = marks(text, self.experts)
            self.tokens += chosen.shape[1]
            for count in TOKENS:
                if count <= chosen.shape[1]:
                    self.runs.setdefault(count, Mean()).add(windows(chosen, count))
            self._share(NEIGHBOURS, chosen[:, :-1], chosen[:, 1:])
        for verify in batch:
            self._add_verify(marks(verify.experts, self.experts))
        for kind, draft, token in replaced(batch, texts):
            self._share(kind, *(marks(each, self.experts)[:, None] for each in (draft, token)))

    def _add_verify(self, chosen: np.ndarray) -> None:
        """chosen: [layers, B, T, E]. Groups of R neighbouring rows, for every R; every pair of rows."""
        layers, rows, width, count = chosen.shape
        for size in range(1, rows + 1):
            groups = chosen[:, : rows // size * size].reshape(layers, rows // size, size * width, count)
            self.verifies.setdefault((size, width), Mean()).add(groups.any(axis=2).sum(axis=-1))
        for distance in range(1, rows):
            pairs = (chosen[:, distance:], chosen[:, :-distance])
            self._share(ROWS, *(part.reshape(layers, -1, count) for part in pairs))

    def _share(self, kind: str, a: np.ndarray, b: np.ndarray) -> None:
        """a, b: bool [layers, samples, E]."""
        if a.shape[1]:
            self.shares.setdefault(kind, Mean()).add(shared(a, b))

    def gamma(self, layer: int | None = None) -> float:
        """Of one layer, or of the mean over layers."""
        return gamma(self.top_k, {m: u.pooled if layer is None else u.by_layer[layer] for m, u in self.runs.items()})

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a curve has an entry for each number of tokens."""
        even = lambda tokens: uniform(self.experts, self.top_k, tokens)  # noqa: E731
        return {
            "experts": self.experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "gamma": self.gamma(),
            "gamma_uniform": gamma(self.top_k, {m: even(m) for m in self.runs}),
            "gamma_by_layer": [self.gamma(layer) for layer in range(len(self.runs[1].by_layer))],
            "runs": [{"tokens": m, "uniform": even(m), **_numbers(u)} for m, u in sorted(self.runs.items())],
            "verifies": [
                {"rows": rows, "tokens": width, "uniform": even(rows * width), **_numbers(u)}
                for (rows, width), u in sorted(self.verifies.items())
            ],
            "shares": [
                {"kind": kind, "chance": self.top_k / self.experts, **_numbers(self.shares[kind])}
                for kind in KINDS
                if kind in self.shares
            ],
        }


def _numbers(mean: Mean) -> dict[str, Any]:
    return {"samples": mean.samples, "measured": mean.pooled, "by_layer": mean.by_layer}


def texts_of(batch: Sequence[Verify]) -> dict[int, np.ndarray]:
    """What each row's own text chose, token after token: row -> [layers, T, k]."""
    parts: dict[int, list[np.ndarray]] = {}
    for verify in batch:
        for place, (row, kept) in enumerate(zip(verify.rows, verify.kept, strict=True)):
            parts.setdefault(row, []).append(verify.experts[:, place, :kept])
    return {row: np.concatenate(part, axis=1) for row, part in parts.items()}


def replaced(batch: Sequence[Verify], texts: dict[int, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every rejected draft at whose place the text has a token: (FIRST or LATER, the draft's experts, the token's).

    Experts are [layers, k]. Drafts behind the end of a text have no such token.
    """
    before = dict.fromkeys(texts, 0)
    for verify in batch:
        for place, (row, kept) in enumerate(zip(verify.rows, verify.kept, strict=True)):
            for offset in range(kept, min(verify.experts.shape[2], texts[row].shape[1] - before[row])):
                draft, token = verify.experts[:, place, offset], texts[row][:, before[row] + offset]
                yield FIRST if offset == kept else LATER, draft, token
            before[row] += kept
