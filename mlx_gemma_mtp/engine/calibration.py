"""What rounds cost here: measured by running the loop itself, kept in a file, corrected in use."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..cache.cache import Cache
from ..cache.spec import KVSpec, row_bytes
from ..files.files import CACHE
from ..files.folder import weight_files
from ..files.hub import Pair
from ..machine import blas, device, memory
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.linear import measured_rules
from ..models.loading import format_of, model_bytes, step_bytes
from ..ops import kernels
from ..sampling.distribution import Rules
from ..sampling.params import SamplingParams
from ..speculative.costs import (
    CONTEXTS,
    MAX_DRAFTS,
    ROWS,
    WIDEST,
    Attention,
    Cell,
    CostFile,
    CostTable,
    Drafted,
    Place,
    Verified,
    distance,
    updated,
)
from ..speculative.drafting import DEFAULT_DRAFTING, MTP, Drafting
from ..speculative.loop import Speculation
from ..speculative.prefill import prefill

QUICK_SECONDS = 2.0  # of rounds, after which a first start times no others; a slow machine takes a dozen rounds
QUICK_REPEATS = 4
QUICK = (0, 1, 4)  # drafts that a first start verifies; in one row WIDEST, too, which says what more rows cost
SLOW = 0.3  # seconds of the first width, from which the whole takes long enough to be announced
# Rounds are timed after this text.
TEXT = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n"
WIDE = (8, 11, WIDEST)  # drafts of all sources: beyond eight queries a row MLX's attention goes another way
COPIES = 2  # of a batch's K/V: a cache that grows is copied
LONG_WIDTHS = (0, 1, 3, 7, 8, WIDEST)  # after a long text, where times are linear between
# Kinds of text: their rounds differ in cost (noise, filters) and in acceptance.
KINDS = {
    "greedy": SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, seed=0),
    "sampled": SamplingParams(temperature=1.0, top_p=0.95, top_k=64, seed=0),
}


Grid = Sequence[tuple[Place, Sequence[int]]]  # places, and the drafts that are verified in each, rising
Filed = tuple[dict[Cell, float], dict[Place, float], set[Cell]]  # verified, drafted, and which of them use corrected


@dataclass
class Timings:
    """Seconds of measured rounds, a list of repeats for each cell.

    chained: rounds that also make as many new drafts as they verify. alone: rounds that make none.
    """

    chained: dict[Cell, list[float]] = field(default_factory=dict)
    alone: dict[Cell, list[float]] = field(default_factory=dict)

    def add(self, cell: Cell, chained: Sequence[float], alone: Sequence[float]) -> None:
        """Adds one more repeat of a cell, in seconds. A round without drafts is of both kinds."""
        if cell[2] == 0:
            chained = alone = (*chained, *alone)
        self.chained.setdefault(cell, []).extend(chained)
        self.alone.setdefault(cell, []).extend(alone)

    def parts(self) -> tuple[dict[Cell, float], dict[Place, float]]:
        """Splits the times into the seconds of each verify (costs.Verified) and of one draft (costs.Drafted).

        A verify is what both kinds of rounds say of it, as far as the drafter makes so many drafts: wider ones are of
        copies, which cost nothing to make. No part is below a thousandth of the fastest round, however noisy the times
        are.
        """
        rounds, alone = ({cell: _usual(s) for cell, s in part.items()} for part in (self.chained, self.alone))
        floor, each = min(rounds.values()) * 1e-3, {}
        for cell in rounds:
            if width := cell[2]:
                each.setdefault(cell[:2], []).append((width, rounds[cell] - alone[cell]))
        drafted = {place: max(_slope(some), floor) for place, some in each.items()}
        verified = {}
        for cell, seconds in alone.items():
            if cell[2] <= MAX_DRAFTS:
                seconds = (seconds + rounds[cell] - cell[2] * drafted.get(cell[:2], 0.0)) / 2
            verified[cell] = max(seconds, floor)
        return verified, drafted


def _usual(seconds: Sequence[float]) -> float:
    """Returns the geometric mean of the fastest two thirds: noise mostly adds, and what is far off was something else,
    such as a kernel's compilation.
    """
    return geometric_mean(sorted(seconds)[: max(1, 2 * len(seconds) // 3)])


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Returns the slope of the line from the origin that is nearest to these points."""
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


class Bench:
    """A batch of equal rows after `context` committed tokens, on which a round can be timed repeatedly.

    Real text fills the first tokens of the cache, so the router chooses experts as in use. The rest of a long context
    is zeros, which take the same time.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        prompt: Sequence[int],
        params: SamplingParams,
        rows: int,
        context: int,
        drafting: Drafting = DEFAULT_DRAFTING,
        specs: Sequence[KVSpec] | None = None,
    ):
        """specs: of the caches; None for those of the model's type."""
        self.target, self.drafter, self.drafting = target, drafter, drafting
        self.rows, self.context = rows, max(context, len(prompt))
        specs = target.config.kv if specs is None else specs
        (prefilled,), hidden = prefill(target, [prompt], len(prompt), drafting.lookback, specs=specs)
        self.cache = Cache(specs, WIDEST + 1, target.dtype, drafting.lookback)
        self.cache.arrange([prefilled.save(0)] * rows)
        self.hidden = mx.repeat(hidden, rows, axis=0)
        self.rules = Rules.of([params] * rows, target.config.vocab_size)

    def rounds(self, width: int) -> tuple[list[float], list[float]]:
        """Returns the seconds of rounds that verify `width` drafts and make as many, and of rounds that make none.

        They are timed after another round, since in use the weights are in the processor's caches. Of what copies alone
        make so wide the first ones do not count (see Timings.parts), so there is one.
        """
        self.cache.lengths = mx.full((self.rows,), self.context, mx.int32)
        self.cache.length_bound = [self.context] * self.rows
        loop = Speculation(self.target, self.drafter, self.cache, self.drafting.alone, confident=True)
        loop.begin(self.hidden, self.rules)
        loop.step([width] * self.rows)
        chained = [_seconds(loop, width) for _ in range(2 if width <= MAX_DRAFTS else 1)]
        alone = [_seconds(loop, 0)]
        loop.launch()  # what was built must not stay behind as a copy of the cache
        mx.synchronize()
        return chained, alone


def grid_of(target: Gemma4, drafter: Drafter, specs: Sequence[KVSpec], full: bool = False) -> Grid:
    """Returns what a calibration measures: all rows after a short text, one row after those long ones of CONTEXTS that
    the model and its memory reach.

    full: all rows and widths after the long texts, too.
    """
    drafts, found = (*range(MAX_DRAFTS + 1), *WIDE), []
    free = memory.total_bytes() - model_bytes(target) - model_bytes(drafter)
    for context in CONTEXTS:
        for rows in ROWS if full or not context else ROWS[:1]:
            taken = rows * row_bytes(specs, context, WIDEST + 1, target.dtype.size)
            if context < target.config.context and (not context or COPIES * taken <= free):
                found.append(((rows, context), LONG_WIDTHS if context and not full else drafts))
    return found


def quick(rows: int) -> Grid:
    """Returns what a first start measures: rounds of that one of ROWS that is nearest, after a short text."""
    count = min(ROWS, key=lambda each: distance((each, 0), (rows, 0)))
    return [((count, 0), (*QUICK, WIDEST) if count == 1 else QUICK)]


def _seconds(loop: Speculation, drafts: int) -> float:
    began = time.perf_counter()
    loop.launch()
    loop.step([drafts] * loop.cache.rows)
    return time.perf_counter() - began


def measure(
    target: Gemma4,
    drafter: Drafter,
    prompt: Sequence[int],
    params: SamplingParams,
    grid: Grid,
    repeats: int,
    seconds: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
    drafting: Drafting = DEFAULT_DRAFTING,
    specs: Sequence[KVSpec] | None = None,
) -> Timings:
    """Times every cell `repeats` times, as `timed` does.

    prompt: token ids. params: how tokens are drawn. drafting: whose drafts are timed. specs: of the caches, as Bench
    takes them.
    """

    def bench(rows: int, context: int) -> Bench:
        return Bench(target, drafter, prompt, params, rows, context, drafting, specs)

    return timed(bench, grid, repeats, seconds, progress)


def timed(
    bench: Callable[[int, int], Bench],
    grid: Grid,
    repeats: int,
    seconds: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Timings:
    """Times every cell `repeats` times, with the widths in turn. One batch is in memory at a time.

    bench: makes that of some rows and a context. seconds: a budget of round time; once it is spent, nothing more
    begins, but two widths of each place are always timed. progress: called with the cells timed and all of them.
    """
    timings, spent, done = Timings(), 0.0, 0
    total = sum(len(widths) for _, widths in grid) * repeats
    for place, widths in grid:
        batch = bench(*place)
        for cell in [(repeat, width) for repeat in range(repeats) for width in widths]:
            if spent > seconds and cell not in ((0, width) for width in widths[:2]):
                break
            chained, alone = batch.rounds(cell[1])
            timings.add((*place, cell[1]), chained, alone)
            spent += sum(chained) + sum(alone) + chained[0]  # one more comes before them
            done += 1
            progress(done, total)
    return timings


class Costs:
    """The source of an engine's cost table for one kind of text: the file of its pair on this machine, else a short
    measurement.

    kind: a key of KINDS. file: None keeps nothing. notice: called with a sentence that the user should know. seconds:
    the budget of a first start's measurement (see `measure`). drafting: whose drafts are timed. specs: of the caches,
    as Bench takes them. attention: by which a long context is estimated until it is measured.
    """

    def __init__(
        self,
        kind: str,
        file: CostFile | None = None,
        notice: Callable[[str], None] = lambda message: None,
        seconds: float = QUICK_SECONDS,
        drafting: Drafting = DEFAULT_DRAFTING,
        specs: Sequence[KVSpec] | None = None,
        attention: Attention | None = None,
    ):
        self.kind, self.file, self.notice, self.seconds = kind, file, notice, seconds
        self.drafting, self.specs, self.attention = drafting, specs, attention
        self._unwritten: Filed | None = None

    @classmethod
    def of_pair(
        cls,
        pair: Pair,
        target: Gemma4,
        drafter: Drafter | None,
        notice: Callable[[str], None],
        drafting: Drafting,
        specs: Sequence[KVSpec] = (),
    ) -> dict[str, Costs]:
        """Returns the Costs of every kind of text, by kind. Without a drafter they have no file."""
        if drafter is None:
            return {kind: cls(kind) for kind in KINDS}
        key = _key(pair, target, drafter) | {"source": drafting.source or MTP} | _bits(specs)
        files = {kind: CostFile({"text": kind} | key) for kind in KINDS}
        how = {"drafting": drafting, "specs": specs or None, "attention": attention(target, drafter, specs)}
        return {kind: cls(kind, file, notice, **how) for kind, file in files.items()}

    def table(self, target: Gemma4, drafter: Drafter, prompt: Sequence[int], rows: int = 1) -> CostTable:
        """Returns the table from the file. Where that says nothing of so many rows, a few of their rounds are timed
        first, and written to it; but not where even the fewest would take far longer than the budget.

        prompt: token ids that rounds are timed after.
        """
        if (kept := self.kept()) is not None and (kept.knows(rows) or self._too_slow(kept, rows)):
            return kept
        began = time.perf_counter()

        def told(done: int, total: int) -> None:
            if done == 1 and time.perf_counter() - began > SLOW:
                self.notice(
                    f"measuring what drafts cost on this machine, once for {rows} row{'s' * (rows > 1)}; after long "
                    "texts it is estimated until `python -m mlx_gemma_mtp.calibrate` measures it"
                )

        timings = measure(
            target,
            drafter,
            prompt,
            KINDS[self.kind],
            quick(rows),
            QUICK_REPEATS,
            self.seconds,
            told,
            self.drafting,
            self.specs,
        )
        verified, drafted = timings.parts()
        cells, drafts, learned = self._known() or ({}, {}, set())
        known = cells | verified, drafts | drafted, learned
        self._write(*known)
        return self._table(*known)

    def measured(
        self,
        target: Gemma4,
        drafter: Drafter,
        prompt: Sequence[int],
        repeats: int,
        progress: Callable[[int, int], None],
        full: bool = False,
    ) -> CostTable:
        """Measures the whole grid now, writes it, and returns its table. Takes a minute or two, or, with `full`, much
        longer.
        """
        cells = grid_of(target, drafter, self.specs or target.config.kv, full)
        how = {"progress": progress, "drafting": self.drafting, "specs": self.specs}
        verified, drafted = measure(target, drafter, prompt, KINDS[self.kind], cells, repeats, **how).parts()
        known = verified, drafted, {cell for cell in verified if cell[2]}  # as sure as what use has corrected
        self._write(*known)
        return self._table(*known)

    def kept(self) -> CostTable | None:
        """Returns the table in the file, or None where there is none."""
        known = self._known()
        return self._table(*known) if known else None

    @property
    def where(self) -> str:
        """The path of the file, or "nowhere"."""
        return "nowhere" if self.file is None else str(self.file.path)

    def learn(self, verified: Verified, drafted: Drafted) -> None:
        """Overwrites cells of the file with times from use. Starts a file where there is none."""
        if verified and self.file is not None:
            *before, learned = self._known() or ({}, {}, set())
            self._write(*updated(*before, verified, drafted), learned | {cell for cell in verified if cell[2]})

    def _too_slow(self, kept: CostTable, rows: int) -> bool:
        """Whether the fewest rounds of so many rows, two widths four times each, would take twice the budget."""
        return 4 * sum(kept.rounds_at(rows, 0)[:2]) > 2 * self.seconds

    def _table(self, verified: Verified, drafted: Drafted, learned: Iterable[Cell]) -> CostTable:
        return CostTable.of(verified, drafted, learned, self.attention, verified)

    def _known(self) -> Filed | None:
        """Returns what the file has, or where it could not be written, what it would have."""
        if self._unwritten is not None:
            return self._unwritten
        try:
            return self.file and self.file.read()
        except ValueError as error:
            self.notice(f"the costs in {self.file.path} are ignored: {error}; they are measured anew")
            return None

    def _write(self, verified: Verified, drafted: Drafted, learned: Iterable[Cell] = ()) -> None:
        self._unwritten = None
        try:
            if self.file is not None:
                return self.file.write(verified, drafted, learned)
        except OSError as error:
            self.notice(
                f"the costs of rounds cannot be kept in {self.file.path} ({error.strerror}), so that every start "
                f"measures them; name a folder that can be written: {CACHE}=FOLDER"
            )
        self._unwritten = dict(verified), dict(drafted), set(learned)


def attention(target: Gemma4, drafter: Drafter, specs: Sequence[KVSpec] = ()) -> Attention | None:
    """Returns what the longest context adds to a round, by the bytes of K/V that full layers read beside a plain step's
    weights, or None where the model reaches no long context. Each query reads them anew, to be careful.
    """
    context = max(each for each in CONTEXTS if each < target.config.context)
    specs, share = specs or target.config.kv, context / step_bytes(target)
    slots = [spec.slot_bytes(target.dtype.size) if spec.window is None else 0 for spec in specs]
    read = (sum(slots[layer.kv_layer] for layer in model.config.layers) for model in (target, drafter))
    return Attention(*(each * share for each in read), context) if context else None


def _key(pair: Pair, target: Gemma4, drafter: Drafter) -> dict[str, Any]:
    """What a round's cost depends on."""
    on_cpu = device.kind() is device.Kind.CPU
    return {
        "target": fingerprint(pair.target),
        "drafter": fingerprint(pair.drafter),
        "weights": [format_of(target), format_of(drafter)],
        "dtype": [str(target.dtype), str(drafter.layers[0].input_layernorm.weight.dtype)],
        "kernels": _kernels(target),
        "backend": f"CPU, {os.cpu_count()} cores, {blas.name()}, {_threads()}" if on_cpu else device.kind(),
        "chip": _processor() if on_cpu else device.name(),
        "versions": {"mlx": mx.__version__, "mlx_gemma_mtp": __version__},
    }


def _bits(specs: Sequence[KVSpec]) -> dict[str, Any]:
    """Returns the bits of each layer's K/V; nothing where all are of the model's type."""
    bits = [spec.bits for spec in specs]
    return {"kv_bits": bits} if any(bits) else {}


def _kernels(target: Gemma4) -> dict[str, Any]:
    """Which kernels run: ours or their references, and which way products and experts of a pass go, by its tokens.

    Both change by a switch, a failed check or the doctor's rules, on the same machine with the same versions.
    """
    widths = range(1, ROWS[-1] * (WIDEST + 1) + 1)
    products = [str(target.embed_tokens.path(target.dtype, tokens)) for tokens in widths]
    found: dict[str, Any] = {"ours": kernels.status(), "products": _runs(products)}
    if rules := measured_rules(target):
        found["measured"] = rules
    if moe := target.config.moe:
        experts = target.layers[0].experts
        found["experts"] = _runs([str(experts.path(target.dtype, moe.top_k * tokens)) for tokens in widths])
    return found


def _runs(ways: Sequence[str]) -> list[list[str | int]]:
    """Each path with how many widths take it, one after the other."""
    return [[path, len(list(run))] for path, run in groupby(ways)]


def _threads() -> str:
    """How many threads the BLAS was told to take."""
    return f"{os.environ.get('OPENBLAS_NUM_THREADS', 'any number of')} threads"


def fingerprint(folder: Path) -> str:
    """Of a model folder: its config, and the sizes of its weight files."""
    sizes = sorted((file.name, file.stat().st_size) for file in weight_files(folder))
    return sha256((folder / "config.json").read_bytes() + repr(sizes).encode()).hexdigest()[:16]


def _processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
