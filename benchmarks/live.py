"""The automatic draft length against plain decoding, live: `python -m benchmarks.live [--model FOLDER]`.

Classes of text as in benchmarks/texts.py. A pair is the same answers made plainly and with `auto`, in turn; reported
are the median of the pairs' ratios (decoding, without the prefill) and its 95 % interval by order statistics. Exit code
1 where a whole interval lies below 0.97: the machine's noise alone fails nothing.

`--draft-sources mtp,copy,forced` compares these sources with plain decoding and with the drafter alone instead: a pair
is then all three in turn. There are more classes: summaries, JSON by schemas, arguments of tools, and edits of files
from this repository's history. An edit is led by a regular expression that leaves the file after alone, so that any
pair makes it; its drafts are never forced ones, which would know the edit.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.texts import ENDING, Asked, tasks, texts
from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.machine import blas
from mlx_gemma_mtp.sampling.params import MTP
from mlx_gemma_mtp.speculative.costs import ROWS, CostFile
from mlx_gemma_mtp.speculative.depth import AUTO

if TYPE_CHECKING:
    from mlx_gemma_mtp.engine.engine import Engine

BAR = 0.97
PLAIN, ALONE = "plain", "the drafter alone"
FORCED = "forced"  # speculative/drafting.py imports MLX
EDIT = "edit"


def interval(values: list[float], chance: float = 0.95) -> tuple[float, float]:
    """Of the median, without any assumption on the law of the values: binomial ranks."""
    ordered, n = sorted(values), len(values)
    for rank in range(n // 2, 0, -1):
        tail = sum(math.comb(n, i) for i in range(rank)) / 2**n
        if 2 * tail <= 1 - chance:
            return ordered[rank - 1], ordered[n - rank]
    return ordered[0], ordered[-1]


def flatten(file: CostFile) -> None:
    """Writes a table from a bad moment: a verify of many drafts is no dearer than one of 1, a draft hardly costs."""
    file.write(
        {(rows, 0, width): 0.01 + 0.0005 * (width > 0) for rows in ROWS for width in (0, 1, 4, 7)}, {(1, 0): 1e-4}
    )


@dataclass
class Way:
    """A way to make answers.

    drafts: as in Engine.generate. rounds: of the first row, by how many drafts were verified. drafted, accepted: drafts
    by source.
    """

    engine: Engine
    drafts: int | str
    rounds: Counter[int] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    def seconds(self, some: Sequence[Asked], rows: int, tokens: int) -> float:
        """Returns the seconds a token of decoding these answers, without the prefill."""
        took, made = 0.0, 0
        for prompt, chat, params, options in some:
            params = replace(params, max_tokens=tokens)
            batch = self.engine.generate(
                [prompt] * rows, [params] * rows, num_draft_tokens=self.drafts, chat_template=chat, **options
            )
            count = sum(len(result.tokens) for result in batch)
            took, made = took + count / batch[0].stats.batch_generation_tps, made + count
            for length, reasons in batch[0].stats.depths.items():
                self.rounds[length] += sum(reasons.values())
            for source, counts in batch[0].stats.sources.items():
                self.drafted[source] += counts["drafted"]
                self.accepted[source] += counts["accepted"]
        return took / max(made, 1)


def edits(count: int) -> list[Asked]:
    """Requests whose answers are edits from this repository's history."""
    from benchmarks import sources

    return [
        Asked(sources.ASK.format(before), True, replace(ENDING, regex=re.escape(sources.REPLY.format(after))))
        for _, before, after in sources.edits(count)
    ]


def compared(ways: Mapping[str, Way], some: Sequence[Asked], args: argparse.Namespace, name: str) -> list[list[float]]:
    """Returns for each way but the last the seconds of each pair over those of the last way."""
    names, ratios = list(ways), []
    for pair in tqdm(range(args.pairs + 1), desc=name, disable=None, leave=False):
        turn = pair % len(names)
        took = {each: ways[each].seconds(some, args.rows, args.max_tokens) for each in (*names[turn:], *names[:turn])}
        if pair:  # the first warms up
            ratios.append([took[each] / took[names[-1]] for each in names[:-1]])
    return [list(each) for each in zip(*ratios, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.live", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the bundled pair")
    parser.add_argument("--draft-model", default="auto")
    parser.add_argument("--draft-sources", help="compare these with plain decoding and with the drafter alone")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--texts", type=int, default=2, help="of each class in a run")
    parser.add_argument("--classes", help="names, with commas (default: all)")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rows", type=int, default=1, help="of each text, in a batch (default: 1)")
    parser.add_argument("--flat", action="store_true", help="begin with a table by which drafts are nearly free")
    parser.add_argument("--json", help="append one line for each class")
    args = parser.parse_args(argv)
    blas.preload()
    try:
        return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    free = texts(args.texts)
    names = None if args.classes is None else args.classes.split(",")
    known = [*free, *(() if args.draft_sources is None else (*tasks(1), EDIT))]
    if wrong := [name for name in names or () if name not in known]:
        raise UserError(f"--classes names {wrong[0]!r}, expected some of {', '.join(known)}, with commas")
    asked = lambda some: {name: each for name, each in some.items() if names is None or name in names}  # noqa: E731
    from mlx_gemma_mtp import load

    if args.draft_sources is None:
        with load(args.model, args.draft_model) as engine:
            return _report({PLAIN: Way(engine, 0), AUTO: Way(engine, AUTO)}, asked(free), args)
    beside = ",".join(each for each in args.draft_sources.split(",") if each != FORCED)
    groups = [(args.draft_sources, asked(free | tasks(args.texts)))]
    if beside not in ("", MTP):
        groups.append((beside, asked({EDIT: edits(args.texts)})))
    failed = False
    with load(args.model, args.draft_model, draft_sources=MTP) as alone:
        for sources, classes in groups:
            if not classes:
                continue
            with load(args.model, args.draft_model, draft_sources=sources) as engine:
                ways = {PLAIN: Way(alone, 0), ALONE: Way(alone, AUTO), sources: Way(engine, AUTO)}
                failed |= bool(_report(ways, classes, args))
    return int(failed)


def _report(ways: Mapping[str, Way], classes: Mapping[str, Sequence[Asked]], args: argparse.Namespace) -> int:
    """Prints a line for each class and each way that the last one is compared with. Returns the exit code."""
    *others, last = ways
    about = ways[last].engine.description
    print(f"{about}; {last}: {args.pairs} pairs, {args.texts} texts of {args.max_tokens} tokens", flush=True)
    if args.flat:
        for costs in (costs for way in ways.values() for costs in way.engine.costs.values()):
            flatten(costs.file)
    failed = False
    for name, some in classes.items():
        way = ways[last]
        for counts in (way.rounds, way.drafted, way.accepted):
            counts.clear()
        for other, ratios in zip(others, compared(ways, some, args, name), strict=True):
            low, high = interval(ratios)
            bad = high < BAR
            failed |= bad
            head = f"{name:9} {median(ratios):.3f} [{low:.3f}, {high:.3f}] of {other}{' BELOW' if bad else ''}"
            kept = ", ".join(f"{source} {way.accepted[source]} of {count}" for source, count in way.drafted.items())
            rounds = ", ".join(f"{length}: {count}" for length, count in sorted(way.rounds.items()))
            print(f"{head}; rounds by drafts {rounds}; kept {kept or 'none'}", flush=True)
            if args.json:
                line = {"text": name, "ways": [other, last], "ratio": median(ratios), "interval": [low, high]}
                line |= {"ratios": ratios, "depths": way.rounds, "drafted": way.drafted, "accepted": way.accepted}
                with open(args.json, "a", encoding="utf-8") as file:
                    print(json.dumps(line | {"measured": about}), file=file)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
