"""Goes on teaching the drafter of a finished pair, on replies to questions that neither of the two has seen.

`python -m training.polish --pair PAIR --replies FOLDER --out DEST --seconds 3600`, FOLDER from `training.unseen`.

A target knows much of its own training text by heart, and a drafter that is taught on replies to the questions of that
text sees few of the states in which the target is unsure: those that it meets when it is used. Here the target is
frozen, so what the drafter reads of it is computed once. Queries are computed where rounds begin, and at a share of the
other tokens of replies; a later step only where all steps before it were right. The learning rate follows the clock.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training import bundled
from training.cli import command, positive, rate
from training.dense import BLOCK, Drafter, KeyValue, Sizes, Target, rotations
from training.minutes import FIRST_CHOICE, ROUND, Clock, Writer
from training.optimizer import MuonAdam, rate_scale
from training.unseen import read

INSIDE = 0.25  # weight of a query at which no round begins, and the share of them that is computed
NEW = 0.4  # the share of a new row's queries that is computed
MUON, ADAM = 0.003, 3e-4
QUERIES, KEYS = 1500, 20_000  # of a batch, at most
HELD = 16  # every so-many-th question is held out
LOG = 10  # steps between log lines
AVERAGE = 0.99  # of the weights' running mean, a step
Model = TypeVar("Model", Target, Drafter)


@dataclass
class Seen:
    """What a drafter reads of the frozen target at a question and its reply: tokens [T], hidden states [T, H], keys and
    values [heads, T, d] of the last layer of each kind; and where the reply begins.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    kept: dict[bool, KeyValue]
    start: int
    right: torch.Tensor | None = None  # how many drafts were right at each query when it was last computed; -1: never

    @property
    def queries(self) -> int:
        """The tokens after which a first step drafts: from the reply's first one on."""
        return len(self.tokens) - 1 - self.start

    def begun(self, first: int) -> list[int]:
        """The queries at which rounds begin, the first at `first`: each begins where the one before was wrong."""
        found, at = [], first
        while at < self.queries:
            found.append(at)
            at += 1 if self.right is None else 1 + max(0, int(self.right[at]))
        return found


@torch.no_grad()
def see(target: Target, rows: list[tuple[list[int], int]]) -> list[Seen]:
    """Runs the target over questions with their replies. rows: tokens, and where the reply begins."""
    width = max(len(tokens) for tokens, _ in rows)
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (tokens, _) in enumerate(rows):
        padded[row, : len(tokens)] = torch.tensor(tokens)
    out = target(padded)
    found = []
    for row, (tokens, start) in enumerate(rows):
        size = len(tokens)
        kept = {
            kind: tuple(x[row, :, :size].half().clone() for x in out.kept[layer])
            for kind, layer in target.sizes.read.items()
        }
        found.append(Seen(padded[row, :size].clone(), out.hidden[row, :size].half().clone(), kept, start))
    return found


def stacked(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    """One float32 tensor of parts that differ along an axis, zeros after the shorter ones."""
    width, after = max(part.shape[axis] for part in parts), 2 * (parts[0].ndim - 1 - axis)
    return torch.stack([F.pad(part.float(), (0,) * after + (0, width - part.shape[axis])) for part in parts])


class Picked(NamedTuple):
    """The queries of a row that are computed, [q], and at which of them a round begins."""

    row: Seen
    places: torch.Tensor
    begins: torch.Tensor


def pick(row: Seen, noise: np.random.Generator | None) -> Picked:
    """The queries at which rounds begin, and a share of the others; without noise all. In a new row any may."""
    starts = torch.tensor(row.begun(int(noise.integers(ROUND)) if noise else 0), dtype=torch.long)
    chosen = torch.ones(row.queries, dtype=torch.bool)
    if noise:
        chosen = torch.from_numpy(noise.random(row.queries) < (NEW if row.right is None else INSIDE))
        chosen[starts if row.right is not None else starts[:1]] = True
    places = torch.arange(row.queries)[chosen]
    return Picked(row, places, torch.isin(places, starts))


@dataclass
class Batch:
    """Questions with replies, padded: tokens [B, T], hidden [B, T, H], keys and values [B, heads, T, d]; positions of
    the queries that are computed, which of them are any, and their weights, [B, Q]; where each row ends, [B].
    """

    rows: list[Seen]
    tokens: torch.Tensor
    hidden: torch.Tensor
    kept: dict[bool, KeyValue]
    at: torch.Tensor
    real: torch.Tensor
    weights: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, picked: list[Picked]) -> Batch:
        rows = [each.row for each in picked]
        kept = {
            kind: tuple(stacked([row.kept[kind][i] for row in rows], 1) for i in range(2)) for kind in (True, False)
        }
        real = stacked([torch.ones(len(each.places)) for each in picked], 0) > 0
        at = stacked([each.places + each.row.start for each in picked], 0).long().clamp(min=1)
        weights = torch.where(stacked([each.begins for each in picked], 0) > 0, 1.0, INSIDE)
        tokens, hidden = stacked([row.tokens for row in rows], 0).long(), stacked([row.hidden for row in rows], 0)
        ends = torch.tensor([len(row.tokens) for row in rows])
        return cls(rows, tokens, hidden, kept, at, real, weights * real, ends)


def step(drafter: Drafter, embedded: torch.Tensor, state: torch.Tensor, kept: dict[bool, KeyValue], at: torch.Tensor):
    """`Drafter.forward` for the queries at positions [B, Q]: [B, Q, H] -> hidden states, and the next step's state."""
    x = drafter.pre_projection(torch.cat([embedded, state], -1))
    sizes = drafter.sizes
    turns = {
        kind: tuple(turn[:, None] for turn in rotations(at, kind, sizes.sliding_size if kind else sizes.full_size))
        for kind in (True, False)
    }
    key = torch.arange(kept[True][0].shape[2])
    seen = key < at[..., None]  # the query's own key is not there yet
    masks = {False: seen[:, None], True: (seen & (at[..., None] - key < BLOCK))[:, None]}
    for layer in drafter.model.layers:
        attention = layer.self_attn
        q = attention.query(layer.input_layernorm(x), turns[attention.sliding])
        k, v = (each.repeat_interleave(sizes.heads // each.shape[1], 1) for each in kept[attention.sliding])
        attended = F.scaled_dot_product_attention(q, k, v, masks[attention.sliding], scale=1.0)
        x = layer.join(x, attended.transpose(1, 2).flatten(2))
        x, _ = layer.feed(x)
    x = drafter.model.norm(x)
    return x, drafter.post_projection(x)


def fewer(keep: torch.Tensor, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kept queries of each row, moved to its front: the arrays [B, Q, ..] and which of theirs are any, [B, q]."""
    count = max(1, int(keep.sum(1).max()))
    order = torch.argsort(keep.int(), dim=1, descending=True, stable=True)[:, :count]
    chosen = [array.gather(1, order.view(*order.shape, *[1] * (array.ndim - 2)).expand(-1, -1, *array.shape[2:]))
              for array in (*arrays, keep)]  # fmt: skip
    return tuple(chosen)


def loss(target: Target, drafter: Drafter, batch: Batch) -> torch.Tensor:
    """What to minimise. Each row is told how many drafts were right at each of its queries."""
    rows = torch.arange(len(batch.tokens))[:, None]
    at, real, weights = batch.at, batch.real, batch.weights
    state, total, losses = batch.hidden[rows, at - 1], weights.sum(), []
    places = torch.arange(at.shape[1]).expand_as(at)  # of the queries that are left
    right = torch.zeros(at.shape, dtype=torch.int8)
    for count in range(ROUND):
        place = (at + count).clamp(max=batch.tokens.shape[1] - 1)
        real = real & (at + count < batch.ends[:, None] - 1)
        with torch.no_grad():
            embedded = target.embed(batch.tokens[rows, place])
            logits = target.logits(batch.hidden[rows, place][real])
            choices = logits.argmax(-1)
        hidden, state = step(drafter, embedded, state, batch.kept, at)
        guessed = drafter.logits(hidden[real]).log_softmax(-1)
        first = guessed.gather(-1, choices[:, None])[:, 0]
        spread = (guessed * logits.softmax(-1)).sum(-1)
        losses.append(-((FIRST_CHOICE * first + (1 - FIRST_CHOICE) * spread) * weights[real]).sum() / total)
        hit = torch.zeros_like(real)
        hit[real] = guessed.argmax(-1) == choices
        right[rows.expand_as(places)[hit], places[hit]] += 1
        if not bool(hit.any()):
            break
        at, state, weights, places, real = fewer(hit, at, state, weights, places)
        at = torch.where(real, at, 1)
    for row, positions, counts, some in zip(batch.rows, batch.at, right, batch.real, strict=True):
        row.right = torch.full((row.queries,), -1, dtype=torch.int8) if row.right is None else row.right
        row.right[positions[some] - row.start] = counts[some]
    return torch.stack(losses).sum()


def batches(rows: list[Seen], noise: np.random.Generator | None) -> Iterator[Batch]:
    """Batches of rows with about as many queries each, in random order with noise."""
    groups: list[list[Picked]] = [[]]
    for each in sorted((pick(row, noise) for row in rows), key=lambda each: len(each.places)):
        group = [*groups[-1], each]
        longest = max(len(one.row.tokens) for one in group)
        if len(group) > 1 and (sum(len(one.places) for one in group) > QUERIES or len(group) * longest > KEYS):
            groups.append([each])
        else:
            groups[-1] = group
    for place in noise.permutation(len(groups)) if noise else range(len(groups)):
        yield Batch.of(groups[place])


@torch.no_grad()
def measure(target: Target, drafter: Drafter, rows: list[Seen]) -> list[float]:
    """The shares of rounds whose first 1 .. ROUND drafts are all right, and tokens a round, from each reply's start."""
    for batch in batches(rows, None):
        loss(target, drafter, batch)
    return rounds(rows)


def rounds(rows: list[Seen]) -> list[float]:
    """As `measure`, of what the rows were told last; where nothing is known no round begins."""
    counts = torch.cat([row.right[row.begun(0)] for row in rows]).float()
    counts = counts[counts >= 0]
    return [*((counts >= k).float().mean().item() for k in range(1, ROUND + 1)), 1 + counts.mean().item()]


class Mean:
    """The running mean of a model's weights."""

    def __init__(self, model: nn.Module):
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        for name, weight in model.state_dict().items():
            self.weights[name].lerp_(weight, 1 - AVERAGE)

    def model(self, sizes: Sizes, kind: type[Model] = Drafter) -> Model:
        made = kind(sizes)
        made.load_state_dict(self.weights)
        return made


def seen_rows(target: Target, rows: list[tuple[list[int], int]], size: int = 16) -> list[Seen]:
    """What the drafter reads of the target at all rows, those of like length together."""
    rows = sorted((row for row in rows if row[1] + 1 < len(row[0])), key=lambda row: len(row[0]))
    return [each for i in range(0, len(rows), size) for each in see(target, rows[i : i + size])]


def opened(pair: Path) -> tuple[Target, Drafter]:
    """The models of a folder with target/ and drafter/, of the bundled pair's sizes."""
    target, drafter = Target(Sizes()), Drafter(Sizes())
    bundled.fill(target, pair / "target")
    bundled.fill(drafter, pair / "drafter")
    return target, drafter


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.polish", description="Teach a drafter on unseen questions."
    )
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/ and drafter/")
    parser.add_argument("--replies", type=Path, required=True, help="folder that training.unseen wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for both weights and log.jsonl")
    parser.add_argument("--seconds", type=positive, required=True)
    parser.add_argument("--begin", type=float, default=time.time(), help="when the time began (seconds since 1970)")
    parser.add_argument("--rate", type=rate, default=1.0, help="of the learning rates")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    target, drafter = opened(args.pair)
    target.requires_grad_(False)
    with tempfile.TemporaryDirectory() as work:
        writer = Writer(args.out, Path(work), Clock(args.begin, args.seconds))
        writer.weights("target", target)
        polish(target, drafter, args.replies, writer, args.rate)


def polish(target: Target, drafter: Drafter, replies: Path, writer: Writer, rates: float) -> None:
    """Epochs until the time is over; replies that came meanwhile are taken up before each."""
    optimizer, mean = MuonAdam(drafter, MUON * rates, ADAM * rates), Mean(drafter)
    clock, noise = writer.clock, np.random.default_rng(0)
    learned: list[Seen] = []
    held: list[Seen] = []
    taken = steps = epoch = 0

    def told(figures: list[float]) -> list[float]:
        return [round(figure, 4) for figure in figures]

    while not epoch or not clock.over:
        rows = read(replies)
        fresh = rows[taken:]
        held += seen_rows(target, [row for i, row in enumerate(fresh, taken) if i % HELD == 0])
        learned += seen_rows(target, [row for i, row in enumerate(fresh, taken) if i % HELD])
        taken = len(rows)
        smooth, tokens = mean.model(drafter.sizes), sum(row.queries for row in learned)
        writer.log(epoch=epoch, rows=len(learned), tokens=tokens, held=told(measure(target, smooth, held)))
        writer.weights("drafter", smooth)
        recent: list[Seen] = []
        for batch in batches(learned, noise):
            loss(target, drafter, batch).backward()
            optimizer.step(rate_scale(clock.share(0.0, clock.end), 1.0, cool=0.7))
            mean.add(drafter)
            recent += batch.rows
            steps += 1
            if steps % LOG == 0:
                writer.log(step=steps, kept=told(rounds(recent)))
                recent = []
            if clock.over:
                break
        epoch += 1
    smooth = mean.model(drafter.sizes)
    writer.log(epoch=epoch, done=True, held=told(measure(target, smooth, held)))
    writer.weights("drafter", smooth)


if __name__ == "__main__":
    sys.exit(main())
