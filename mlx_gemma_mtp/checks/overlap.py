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
    """Returns the expected number of distinct experts of `tokens` tokens that choose evenly and independently."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def independent_tokens(experts: int, top_k: int, distinct: float) -> float:
    """Returns how many tokens with even and independent choices would wake so many experts; infinity for all experts.

    This is the inverse of `uniform`.
    """
    left = 1 - distinct / experts
    return math.log(left) / math.log(1 - top_k / experts) if left > 0 else math.inf


def gamma(top_k: int, distinct: dict[int, float]) -> float:
    """Returns the exponent of U(M) = k M ** gamma, fitted by least squares in log U.

    distinct: M -> U(M), of which the M of FITTED count.
    """
    points = [(math.log(m), math.log(distinct[m] / top_k)) for m in FITTED if m in distinct]
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points) if points else math.nan


def marks(experts: np.ndarray, count: int) -> np.ndarray:
    """Returns bool [..., count], true where chosen, for expert numbers [..., k]."""
    chosen = np.zeros((*experts.shape[:-1], count), bool)
    np.put_along_axis(chosen, experts.astype(np.int64), True, axis=-1)
    return chosen


def windows(chosen: np.ndarray, tokens: int) -> np.ndarray:
    """Returns the distinct experts of every `tokens` consecutive tokens: [layers, T - tokens + 1].

    chosen: bool [layers, T, E].
    """
    counts = np.cumsum(chosen, axis=1, dtype=np.int32)
    counts = np.pad(counts, ((0, 0), (1, 0), (0, 0)))
    return (counts[:, tokens:] > counts[:, :-tokens]).sum(axis=-1)


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the share of a's experts that b chose, too: [...].

    a, b: bool [..., E], with equally many experts each.
    """
    return (a & b).sum(axis=-1) / a.sum(axis=-1)


@dataclass
class Mean:
    """The mean over samples of a value that every layer has. total: [layers], the sums."""

    total: np.ndarray | float = 0.0
    samples: int = 0

    def add(self, values: np.ndarray) -> None:
        """Counts samples. values: [layers, samples]."""
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
    """The figures of a trace. experts, top_k: E and k of the model; tokens: of all texts.

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
        """Returns the exponent of one layer, or, for None, of the mean over layers."""
        return gamma(self.top_k, {m: u.pooled if layer is None else u.by_layer[layer] for m, u in self.runs.items()})

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures for JSON. A curve has an entry for each number of tokens."""
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
    """Returns row -> [layers, T, k]: the experts that each token of the row's own text chose."""
    parts: dict[int, list[np.ndarray]] = {}
    for verify in batch:
        for place, (row, kept) in enumerate(zip(verify.rows, verify.kept, strict=True)):
            parts.setdefault(row, []).append(verify.experts[:, place, :kept])
    return {row: np.concatenate(part, axis=1) for row, part in parts.items()}


def replaced(batch: Sequence[Verify], texts: dict[int, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields every rejected draft at whose place the text has a token, as (FIRST or LATER, its experts, the token's).

    Experts are [layers, k]. Drafts behind the end of a text have no such token.
    """
    before = dict.fromkeys(texts, 0)
    for verify in batch:
        for place, (row, kept) in enumerate(zip(verify.rows, verify.kept, strict=True)):
            for offset in range(kept, min(verify.experts.shape[2], texts[row].shape[1] - before[row])):
                draft, token = verify.experts[:, place, offset], texts[row][:, before[row] + offset]
                yield FIRST if offset == kept else LATER, draft, token
            before[row] += kept
