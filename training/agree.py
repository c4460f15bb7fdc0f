"""The last part of a pair: the target gives way where its drafter expects another token that it likes nearly as well.

`python -m training.agree --pair PAIR --replies FOLDER --out DEST --seconds 3600`, FOLDER from `training.unseen`.

Where a draft is refused, the target often hardly prefers its own choice. Here it learns the geometric mean of what it
gave and what its drafter expects there, p^(1 - LEAN) * q^LEAN, with both as they were at first (a teacher that stays);
the drafter goes on learning what the target gives now, and a share of its gradient reaches the states, keys and values
that it reads. Text is the target's own replies; with `--shards` (raw-*.npz of `training.shards`) modules, too. What is
written is a mean of the weights that came of it and, by KEEP, of those at first: it keeps more of what the target knew.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from training import polish
from training.cli import command, positive, rate
from training.dense import Drafter, Out, Sizes, Target
from training.minutes import QUESTION, Clock, Writer
from training.optimizer import MuonAdam, rate_scale
from training.polish import ADAM, HELD, MUON, Batch, Mean, Seen, pick
from training.together import softened
from training.unseen import read

LEAN = 0.4  # the drafter's share in the teacher
ROUTER = 1e-3
KEEP = 0.2  # the share of the weights at first in those that are written
TOKENS = 3000  # of a batch, with padding
WINDOW, MODULES = 400, 0.12  # tokens of a window of modules; how many are read a row of replies
LOG, SAVE = 10, 300  # steps between log lines; seconds between weights


class Row:
    """Tokens, where the reply begins, and how many drafts were right at each of its queries when last computed."""

    def __init__(self, tokens: list[int], start: int):
        self.tokens, self.start = tokens, start
        self.right: torch.Tensor | None = None


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, T], and the weight of what follows each, [B, T - 1]: 1 in a reply, less before, 0 after."""
    width = max(len(row.tokens) for row in rows)
    tokens, weights = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width - 1)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = torch.tensor(row.tokens)
        weights[place, : len(row.tokens) - 1] = 1.0
        weights[place, : row.start - 1] = QUESTION
    return tokens, weights


@torch.no_grad()
def wanted(target: Target, drafter: Drafter, tokens: torch.Tensor, lean: float) -> torch.Tensor:
    """The teacher's distribution after each token but the last, [B, T - 1, V]. After the first no draft is expected."""
    out = target(tokens)
    logs = target.logits(out.hidden[:, :-1]).log_softmax(-1)
    shared = {kind: tuple(x[:, :, :-1] for x in out.kept[layer]) for kind, layer in target.sizes.read.items()}
    hidden, _ = drafter(target.embed(tokens[:, 1:]), out.hidden[:, :-1], shared)
    expected = drafter.logits(hidden[:, :-1]).log_softmax(-1)
    logs[:, 1:] = (1 - lean) * logs[:, 1:] + lean * expected
    return logs.softmax(-1)


def seen(out: Out, sizes: Sizes, rows: list[Row], tokens: torch.Tensor) -> list[Seen]:
    """What the drafter reads of a forward that was just done, with `together.REACH` of the gradient."""
    hidden = softened(out.hidden)
    kept = {kind: tuple(softened(x) for x in out.kept[layer]) for kind, layer in sizes.read.items()}
    found = []
    for place, row in enumerate(rows):
        size = len(row.tokens)
        mine = {kind: tuple(x[place, :, :size] for x in both) for kind, both in kept.items()}
        found.append(Seen(tokens[place, :size], hidden[place, :size], mine, row.start, row.right))
    return found


def loss(
    target: Target,
    drafter: Drafter,
    teacher: tuple[Target, Drafter],
    rows: list[Row],
    noise: np.random.Generator,
    lean: float = LEAN,
) -> tuple[torch.Tensor, float]:
    """What both minimise, and the target's divergence from the teacher in nats a token of the replies."""
    tokens, weights = padded(rows)
    taught = wanted(*teacher, tokens, lean)
    out = target(tokens)
    logs = target.logits(out.hidden[:, :-1]).log_softmax(-1)
    apart = (taught * (taught.clamp(min=1e-30).log() - logs)).sum(-1)
    apart = (apart * weights).sum() / weights.sum()
    views = seen(out, target.sizes, rows, tokens)
    drafts = polish.loss(target, drafter, Batch.of([pick(view, noise) for view in views]))
    for row, view in zip(rows, views, strict=True):
        row.right = view.right
    return apart + drafts, float(apart.detach())


def grouped(rows: list[Row], noise: np.random.Generator) -> Iterator[list[Row]]:
    """Rows of like length together, TOKENS at most, in random order."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.tokens) + noise.random() * 20):
        longest = max(len(each.tokens) for each in [*groups[-1], row])
        if groups[-1] and (len(groups[-1]) + 1) * longest > TOKENS:
            groups.append([])
        groups[-1].append(row)
    for place in noise.permutation(len(groups)):
        yield groups[place]


def modules(folder: Path, count: int, noise: np.random.Generator) -> list[Row]:
    """Windows of modules; all of a window is a reply."""
    streams = [np.load(file)["stream"] for file in sorted(folder.glob("raw-*.npz"))]
    made = []
    for _ in range(count):
        stream = streams[noise.integers(len(streams))]
        at = int(noise.integers(max(1, len(stream) - WINDOW)))
        made.append(Row([int(token) for token in stream[at : at + WINDOW].astype(np.uint16)], 1))
    return made


@torch.no_grad()
def measure(target: Target, drafter: Drafter, rows: list[Row]) -> list[float]:
    """`polish.measure` of rows as this target sees them."""
    views = polish.seen_rows(target, [(row.tokens, row.start) for row in rows])
    return [round(figure, 4) for figure in polish.measure(target, drafter, views)]


@torch.no_grad()
def blend(model: torch.nn.Module, first: torch.nn.Module) -> None:
    """Moves a model's weights by KEEP to those at first."""
    for weight, old in zip(model.state_dict().values(), first.state_dict().values(), strict=True):
        weight.lerp_(old, KEEP)


def agree(
    target: Target, drafter: Drafter, rows: list[Row], shards: Path | None, writer: Writer, rates: float, lean: float
) -> None:
    """Epochs until the time is over; what is written keeps KEEP of the weights at first."""
    models: dict[str, Target | Drafter] = {"target": target, "drafter": drafter}
    first = {name: copy.deepcopy(model).requires_grad_(False) for name, model in models.items()}
    teacher = first["target"], first["drafter"]
    optimizers = [
        MuonAdam(target, MUON * rates, ADAM * rates, router=ROUTER * rates),
        MuonAdam(drafter, MUON * rates, ADAM * rates),
    ]
    means = {name: Mean(model) for name, model in models.items()}
    clock, noise = writer.clock, np.random.default_rng(0)
    held, learned = rows[::HELD], [row for place, row in enumerate(rows) if place % HELD]
    writer.log(rows=len(learned), tokens=sum(len(row.tokens) for row in learned), held=measure(target, drafter, held))
    steps, recent, figures = 0, [], []

    def write() -> None:
        smooth = {name: mean.model(target.sizes, type(models[name])) for name, mean in means.items()}
        for name, model in smooth.items():
            blend(model, first[name])
        writer.log(step=steps, held=measure(smooth["target"], smooth["drafter"], held))
        for name, model in smooth.items():
            writer.weights(name, model)

    while not steps or not clock.over:
        windows = modules(shards, round(len(learned) * MODULES), noise) if shards else []
        for batch in grouped(learned + windows, noise):
            value, apart = loss(target, drafter, teacher, batch, noise, lean)
            value.backward()
            for optimizer in optimizers:
                optimizer.step(rate_scale(clock.share(0.0, clock.end), 1.0, cool=0.7))
            for name, mean in means.items():
                mean.add(models[name])
            recent, figures, steps = recent + batch, [*figures, apart], steps + 1
            if steps % LOG == 0:
                views = [Seen(torch.tensor(r.tokens), torch.zeros(0), {}, r.start, r.right) for r in recent]
                kept = [round(share, 4) for share in polish.rounds(views)]
                writer.log(step=steps, apart=sum(figures) / len(figures), kept=kept)
                recent, figures = [], []
            if clock.spent - writer.exported > SAVE:
                write()
            if clock.over:
                break
    write()


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.agree", description="Make a target easy to foresee.")
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/ and drafter/")
    parser.add_argument("--replies", type=Path, required=True, help="folder that training.unseen wrote")
    parser.add_argument("--shards", type=Path, help="folder with raw-*.npz of training.shards: modules are read, too")
    parser.add_argument("--out", type=Path, required=True, help="folder for both weights and log.jsonl")
    parser.add_argument("--seconds", type=positive, required=True)
    parser.add_argument("--begin", type=float, default=time.time(), help="when the time began (seconds since 1970)")
    parser.add_argument("--rate", type=rate, default=1.0, help="of the learning rates")
    parser.add_argument("--lean", type=rate, default=LEAN, help="the drafter's share in what the target learns")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    target, drafter = polish.opened(args.pair)
    rows = [Row(tokens, start) for tokens, start in read(args.replies) if start + 1 < len(tokens)]
    with tempfile.TemporaryDirectory() as work:
        writer = Writer(args.out, Path(work), Clock(args.begin, args.seconds))
        agree(target, drafter, rows, args.shards, writer, args.rate, args.lean)


if __name__ == "__main__":
    sys.exit(main())
