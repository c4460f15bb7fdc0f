"""Replays sources of drafts on recorded texts: `python -m benchmarks.mixtures [--record [CLASS ...]]`.

A recorded text (tests/data/mixtures.npz, by `--record`) has at each token what the drafter drafts and how sure it is,
and where a schema binds it, which tokens that forces and which drafts it refuses. With a table of costs that gives the
course of a text by any sources: here the drafter alone, and all. A verify that could not be built before the host knows
the drafts costs `--rebuild` of a plain round more. Observed times are noisy, and a single course differs by some 10 %
from the next: so each ratio is of the mean times of `--seeds` courses, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_gemma_mtp.speculative.copies import RowText, agreeing
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS, ROWS, WIDEST, CostTable
from mlx_gemma_mtp.speculative.depth import AUTO, Depth, DraftRow
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.guide import Constraint, allows, guide, only, sole
from mlx_gemma_mtp.speculative.mixture import Chain, Mixture, Pool, leading
from mlx_gemma_mtp.speculative.widening import verified

from .replay import CONTEXT, DATA, FREE, LONG, NOISY, Clock, after_long_texts, by, read_table

FILE = DATA / "mixtures.npz"
ALONE, ALL = ("mtp",), ("mtp", "copy", "forced")
REBUILD = 0.05  # of a plain round
BAR = 0.97
VOCAB = 4096  # of the bundled pair
CLASSES = "code", "prose", "shuffled", "summary", "edit", "json", "tools"
PARTNERS = ("prose", "code", "shuffled", "summary")  # of an editor, in turn


@dataclass(frozen=True)
class Recorded:
    """A text.

    prompt: token ids. tokens: of the reply, [n + MAX_DRAFTS]. drafts, confidences: [n, MAX_DRAFTS], the drafter's after
    each token of the reply but the last ones. forced: bool [n + MAX_DRAFTS], which tokens are the only ones that a
    schema allows. allowed: [n], how many of the drafts it allows. These two are None where the text is free.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    drafts: np.ndarray
    confidences: np.ndarray
    forced: np.ndarray | None = None
    allowed: np.ndarray | None = None


PARTS = {
    **{"prompt": np.uint16, "tokens": np.uint16, "drafts": np.uint16, "confidences": np.float16},
    **{"forced": np.bool_, "allowed": np.uint8},
}


class Along:
    """A recorded text's schema, as a Constraint. Of texts that leave the recorded one it knows nothing, and allows
    all.
    """

    def __init__(self, text: Recorded, at: int, said: Sequence[int] = ()):
        """at: the place of the reply's newest token. said: tokens behind it, emitted or not."""
        self.text, self.at, self.said = text, at, list(said)

    def copy(self) -> Along:
        return Along(self.text, self.at, self.said)

    def mask(self) -> np.ndarray | None:
        count, drafts = len(self.said), self.text.drafts[self.at].tolist()
        follows = self.text.tokens[self.at + 1 : self.at + count + 2].tolist()
        if self.said == follows[:count] and any(self.text.forced[self.at + count + 1 : self.at + count + 2]):
            return only(follows[count:], VOCAB)
        if count == self.text.allowed[self.at] < len(drafts) and self.said == drafts[:count]:
            return ~only([drafts[count]], VOCAB)
        return None

    def advance(self, token: int) -> None:
        self.said.append(token)


class Course(NamedTuple):
    """How rows were decoded.

    tokens: that each emitted. passes: verifies of each. ends: seconds until the end of each. rounds: after each round
    the seconds so far, and the tokens of each row.
    """

    tokens: list[int]
    passes: list[int]
    ends: list[float]
    rounds: list[tuple[float, tuple[int, ...]]]

    def tokens_at(self, seconds: float, row: int) -> float:
        """Returns how many tokens a row has after so long, linear between two rounds."""
        times, tokens = zip((0.0, (0,) * len(self.tokens)), *self.rounds, strict=True)
        return float(np.interp(seconds, times, [each[row] for each in tokens]))


Text = tuple[str, list[int], list[int], Any, Constraint | None]


def texts(engine: Any, count: int, tokens: int, names: Sequence[str]) -> Iterator[Text]:
    """Yields (class, prompt, reply, how it is drawn, what binds it): replies of the target, and edits of
    benchmarks.sources. names: of the classes.
    """
    from mlx_gemma_mtp.engine.intake import Options

    from . import sources
    from .texts import GREEDY, tasks
    from .texts import texts as classes

    for name, some in (classes(count) | tasks(count)).items():
        for prompt, chat, params, options in some if name in names else ():
            params, options = replace(params, max_tokens=tokens), {**options, "chat_template": chat}
            [request] = engine._intake.requests([prompt], params, Options(**options))
            result = engine.generate(prompt, params, num_draft_tokens=0, **options)
            end = [] if result.end_token is None else [result.end_token] * MAX_DRAFTS
            yield name, request.prompt, result.tokens + end, params, request.constraint
    for _, before, after in sources.edits(count) if "edit" in names else ():
        reply = engine.text.spelled(sources.REPLY.format(after))
        yield "edit", engine.text.encode(sources.ASK.format(before)), reply[:tokens], GREEDY, None


def binding(constraint: Constraint, reply: Sequence[int], drafts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `forced` and `allowed` of a text, see Recorded."""
    forced, allowed = np.zeros(len(reply), bool), np.zeros(len(drafts), np.uint8)
    for at, row in enumerate(drafts.tolist()):
        constraint.advance(reply[at])
        forced[at + 1] = sole(constraint.mask()) is not None
        ahead = constraint.copy()
        for token in row:
            if not allows(ahead.mask(), token):
                break
            ahead.advance(token)
            allowed[at] += 1
    return {"forced": forced, "allowed": allowed}


def record(path: Path, count: int, tokens: int, names: Sequence[str]) -> None:
    """Records the drafter on texts of the bundled pair. names: of the classes; what the file has of others stays."""
    from mlx_gemma_mtp import load

    from .traces import drafts_along

    arrays = dict(np.load(path)) if path.exists() else {}
    arrays = {key: each for key, each in arrays.items() if key.partition("/")[0] not in names}
    with load(num_draft_tokens=0, dtype="float32") as engine:
        for i, (name, head, reply, params, constraint) in enumerate(texts(engine, count, tokens, names)):
            drafts, sure = drafts_along(engine, [*head, *reply], len(head), params)
            parts = {"prompt": head, "tokens": reply, "drafts": drafts, "confidences": sure}
            parts |= {} if constraint is None else binding(constraint, reply, drafts)
            arrays |= {f"{name}/{i}/{key}": np.array(each, PARTS[key]) for key, each in parts.items()}
            print(f"{name}: {len(reply)} tokens", flush=True)
    np.savez_compressed(path, **arrays)


def read(path: Path = FILE) -> dict[str, list[Recorded]]:
    """Returns the recorded texts of each class."""
    arrays, found = dict(np.load(path)), {}
    for head in (key.removesuffix("/prompt") for key in arrays if key.endswith("/prompt")):
        parts = {part: arrays[f"{head}/{part}"] for part in PARTS if f"{head}/{part}" in arrays}
        found.setdefault(head.partition("/")[0], []).append(Recorded(**parts))
    return found


@dataclass(frozen=True)
class Costs:
    """What rounds take. context: committed tokens. rebuild: of a plain round, see above. clock: how it is observed."""

    table: CostTable
    context: int = CONTEXT
    rebuild: float = REBUILD
    clock: Clock = NOISY

    def of(self, rows: int, width: int, made: int, rebuilt: bool) -> float:
        """Returns the seconds of a round. width: drafts verified. made: drafts of the drafter, for the next round."""
        verify = self.table.verify_at(rows, self.context)
        drafted = made * self.table.draft_at(rows, self.context)
        return verify[width] + drafted + self.rebuild * verify[0] * rebuilt


class Rows:
    """Rows of recorded texts and their drafts, mixed as the loop mixes them.

    live: which of the texts go on. at: the place of the newest token of each text. chains: the drafts of those that go
    on. built: drafts of the verify that is built before the host knows them; None where none is.
    """

    def __init__(self, some: Sequence[Recorded], sources: Sequence[str], reach: int, pool: Pool | None):
        self.some, self.reach = some, reach
        self.mixture = Mixture(Drafting(sources=tuple(sources)), pool)
        self.mixture.begin([RowText([*text.prompt.tolist(), int(text.tokens[0])]) for text in some])
        self.live, self.at = list(range(len(some))), [0] * len(some)
        self.chains: list[Chain] = []
        self.built: list[list[int]] | None = None
        self._early = True  # whether the verify is built before the host knows its drafts, as far as copies go

    def mix(self, made: Sequence[int]) -> None:
        """Puts the drafts of the next round together."""
        places = [(self.some[row], self.at[row]) for row in self.live]
        reach = [self.reach] * len(places)
        waits = [(text, at, count) for (text, at), count in zip(places, made, strict=True)]
        self.built = [text.drafts[at][:count].tolist() for text, at, count in waits]
        sure = [text.confidences[at][:count].astype(float).tolist() for text, at, count in waits]
        self.chains = self.mixture.chains(self.built, sure, reach)
        led = guide([None if text.forced is None else Along(text, at) for text, at in places], VOCAB)
        if led is not None:
            self.chains, _ = self.mixture.led(led, self.chains, reach)
        if led is not None or not self._early:
            self.built = None

    def take(self, counts: Sequence[int]) -> list[int]:
        """Returns how many of the first counts[i] drafts of each row are kept, and goes on behind them."""
        after = [self.some[row].tokens[self.at[row] + 1 :].tolist() for row in self.live]
        kept = [agreeing(chain.tokens[:n], text) for chain, n, text in zip(self.chains, counts, after, strict=True)]
        self._early = not self.mixture.hot(range(len(kept)))
        self.mixture.take([text[: count + 1] for text, count in zip(after, kept, strict=True)])
        for row, count in zip(self.live, kept, strict=True):
            self.at[row] += count + 1
        return kept

    def arrange(self) -> list[int]:
        """Drops the rows whose texts have ended, and returns the places of the others."""
        stay = [i for i, row in enumerate(self.live) if self.at[row] < len(self.some[row].drafts)]
        self.live = [self.live[i] for i in stay]
        self.mixture.arrange(stay)
        return stay


def run(
    some: Sequence[Recorded],
    costs: Costs,
    sources: Sequence[str],
    drafts: int | str = AUTO,
    seed: int = 0,
    pool: Pool | None = None,
    depth: Depth | None = None,
) -> Course:
    """Decodes these texts in one batch, in the order in which the runner does it."""
    draws, depth, count = np.random.default_rng(seed), depth or by(costs.table), len(some)
    rows = Rows(some, sources, WIDEST if drafts == AUTO else int(drafts), pool)
    asked = [DraftRow(row, drafts, FREE, False) for row in rows.live]
    passes, ends, took, rounds = [0] * count, [0.0] * count, 0.0, []
    made = _made(depth, rows.mixture, asked, costs.context)
    rows.mix(made)
    while rows.live:
        chains = rows.chains
        sure, waiting = [chain.rates[: chain.own] for chain in chains], [len(chain.tokens) for chain in chains]
        most, timed = verified(depth, asked, costs.context, chains, sure, waiting)
        counts = [each if most is None else min(each, most) for each in waiting]
        rebuilt = [chain.tokens[:n] for chain, n in zip(chains, counts, strict=True)] != rows.built
        made = _made(depth, rows.mixture, asked, costs.context)
        taken = costs.of(len(asked), max(counts), max(made), rebuilt)
        took += taken
        kept = rows.take(counts)
        if timed:
            depth.timed(costs.clock.observe(taken, draws, len(rounds) + 1))
        depth.observe({row.id: min(n, leading(c.sources)) for row, n, c in zip(asked, kept, chains, strict=True)})
        rounds.append((took, tuple(rows.at)))
        for row in rows.live:
            passes[row], ends[row] = passes[row] + 1, took
        stay = rows.arrange()
        depth.forget([row.id for row in asked if row.id not in rows.live])
        asked, made = [asked[i] for i in stay], [made[i] for i in stay]
        if rows.live:
            rows.mix(made)
    return Course(rows.at, passes, ends, rounds)


def _made(depth: Depth, mixture: Mixture, rows: Sequence[DraftRow], context: int) -> list[int]:
    """How many drafts the drafter makes for each row."""
    counts = depth.draft(rows, context)
    asked = [i for i, count in enumerate(counts) if count]
    if asked and mixture.hot(asked):
        depth.give_way([row.id for row in rows], made=False)
        return [0] * len(rows)
    return counts


class Ratio(NamedTuple):
    """A time over another, each the mean of some courses, and the 95 % interval of that."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Sequence[float], other: Sequence[float]) -> Ratio:
        """Returns the ratio of the means. The courses are independent (the delta method)."""
        a, b = np.array(one), np.array(other)
        spread = [np.var(each, ddof=1) / len(each) / np.mean(each) ** 2 if len(each) > 1 else 0.0 for each in (a, b)]
        mean, half = a.mean() / b.mean(), 1.96 * np.sqrt(sum(spread))
        return cls(float(mean), float(mean * np.exp(-half)), float(mean * np.exp(half)))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Ratios(NamedTuple):
    """The times of plain decoding and of the drafter alone over that of all sources; and the latter for the row that
    these serve worst, its mean.
    """

    plain: Ratio
    alone: Ratio
    worst: float


def ratios(some: Sequence[Recorded], costs: Costs, rows: int, seeds: int = 1) -> Ratios:
    """Returns the ratios for batches of so many of these texts, each with so many courses."""
    batches = [[some[(i + j) % len(some)] for j in range(rows)] for i in range(0, len(some), min(rows, len(some)))]
    plain = sum(max(run(batch, costs, ALONE, 0).ends) for batch in batches)

    def course(sources: Sequence[str], seed: int) -> list[list[float]]:
        pool = Pool()
        return [run(batch, costs, sources, seed=100 * seed + i, pool=pool).ends for i, batch in enumerate(batches)]

    ways = [np.array([course(sources, seed) for seed in range(seeds)]) for sources in (ALONE, ALL)]
    alone, every = (each.max(2).sum(1) for each in ways)  # of [seeds, batches, rows]
    return Ratios(Ratio.of([plain], every), Ratio.of(alone, every), float((ways[0].mean(0) / ways[1].mean(0)).min()))


class Edited(NamedTuple):
    """A batch of eight rows of which one edits, with all sources and with the drafter alone.

    editor: its time alone over that with all. others: tokens of the other rows while it edits, all over alone. worst:
    the same of the row that is served worst, its mean.
    """

    editor: Ratio
    others: Ratio
    worst: float


def edited(some: dict[str, list[Recorded]], costs: Costs, seeds: int = 1) -> Edited:
    """Returns the ratios for each edit in the company of seven texts of other classes, each with so many courses."""
    ends, tokens = [], []
    for i, edit in enumerate(some["edit"]):
        others = [some[PARTNERS[j % len(PARTNERS)]] for j in range(max(ROWS) - 1)]
        batch = [edit, *(each[(i + j) % len(each)] for j, each in enumerate(others))]
        for seed in range(seeds):
            both = [run(batch, costs, sources, seed=100 * seed + i) for sources in (ALONE, ALL)]
            ends.append([each.ends[0] for each in both])
            tokens.append([[each.tokens_at(ends[-1][1], row) for each in both] for row in range(1, len(batch))])
    (alone, every), made = np.array(ends).T, np.array(tokens)
    each = made[:, :, 1].mean(0) / made[:, :, 0].mean(0)
    return Edited(Ratio.of(alone, every), Ratio.of(*made.sum(1).T[::-1]), float(each.min()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.mixtures", description=__doc__.splitlines()[0])
    parser.add_argument("--record", nargs="*", choices=CLASSES, help="record these classes anew (none named: all)")
    parser.add_argument("--texts", type=int, default=4, help="of each class, to record")
    parser.add_argument("--max-tokens", type=int, default=200, help="of each text, to record")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--costs", type=Path, nargs="+", default=sorted((DATA / "costs").glob("*.json")))
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=CLASSES, help="to replay")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seeds", type=int, default=8, help="courses of each batch")
    parser.add_argument("--rebuild", type=float, default=REBUILD, help="of a plain round, what a late verify costs")
    parser.add_argument("--editor", action="store_true", help="eight rows of which one edits, instead")
    args = parser.parse_args(argv)
    if args.record is not None:
        record(args.file, args.texts, args.max_tokens, args.record or CLASSES)
        return 0
    some, below = read(args.file), []
    columns = ("the editor", "the others", "worst") if args.editor else ("plain", "the drafter alone", "worst row")
    print("machine          context text      rows  all sources over: {:26} {:21} {}".format(*columns))
    short = {path.stem: read_table(path) for path in args.costs}
    for context, tables in ((CONTEXT, short), (LONG, after_long_texts(short))):
        for machine, table in tables.items():
            costs = Costs(table, context, args.rebuild)
            every = [(name, rows) for name in args.classes for rows in args.rows]
            cells = [("edit + 7", max(ROWS))] if args.editor else every
            for name, rows in cells:
                found = edited(some, costs, args.seeds) if args.editor else ratios(some[name], costs, rows, args.seeds)
                low = min(each.mean for each in found[:2]) < BAR
                below += [found] if low else []
                cell = f"{machine:16} {context:7} {name:9} {rows:4}"
                print(f"{cell} {found[0]!s:>37} {found[1]!s:>21} {found[2]:6.3f}{' BELOW' if low else ''}", flush=True)
    sure = sum(min(each.high for each in found[:2]) < BAR for found in below)
    print(f"{len(below)} below {BAR}, {sure} of them with the whole interval")
    return 0


if __name__ == "__main__":
    sys.exit(main())
